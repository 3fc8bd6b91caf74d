// Quest's selector on CUDA: page scores, then the best pages of each list.
//
//   score_pages   scores[s, g, p] = reduce over the group's heads h of  relu(q_h) . high_p - relu(-q_h) . low_p
//                 min_max:  low, high = the page's bounds;  mean_std: mu - sigma, mu + sigma of its keys
//   select_pages  the `chosen` pages of the largest score between sink and window, ties to the lower page; ascending
//
// Shapes: q [seqs, heads, head_dim]; bounds, moments [pages, kv_heads, 2, head_dim]; scores [seqs, kv_heads, pages].
// Mapping of score_pages: grid (pieces of kPiecePages pages, kv_heads, seqs). Eight lanes share a page, a lane takes
//   every eighth chunk of 8 channels, low and high in registers over all heads of the group, whose queries lie in
//   shared memory. The grid covers the capacity; blocks behind a sequence's end leave.
// Byte bound of score_pages: bounds read once, 4 * head_dim bytes a page and KV head (1 / page_tokens of K and V), or
//   moments, twice that.
// Mapping of select_pages: grid (kv_heads, seqs), one block a list. Scores become integers of the same order; four
// passes
//   of 8 bits over them find the score of the last chosen page by its histogram, a fifth writes the list through a scan
//   over the block. Counts are integers, so the order of atomics does not show. Scores are read from the second-level
//   cache after the first pass, any number of them.
// Source: Tang et al., "Quest", arXiv 2406.10774, Algorithm 1; the split into two plain products, mean_std and radix
//   selection with forced pages are ours.
#include "attention/mma.cuh"
#include "attention/page_choice.h"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/vector.cuh"

namespace vesper::cuda {
namespace {

constexpr int kScoreThreads = 128;
constexpr int kPageLanes = 8;                             // that share a page
constexpr int kPagesAtOnce = kScoreThreads / kPageLanes;  // by a block
constexpr int kPiecePages = 4 * kPagesAtOnce;             // of a block in all
constexpr int kMaxGroup = 16;

template <typename T>
struct ScoreArgs {
  TensorView<const T, 3> q;            // [seqs, heads, head_dim]
  TensorView<const T, 4> bounds;       // [pages, kv_heads, 2, head_dim], or no data
  TensorView<const float, 4> moments;  // likewise
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 2> page_table;
  TensorView<float, 3> scores;
  GroupScore group_score = GroupScore::kMax;
  std::int32_t dense_tokens = 0;
  int group = 0;
  int page_tokens = 0;
};

// Eight channels of a page's box. Every operation is one IEEE operation, as on the CPU: where a variance cancels, both
// devices keep the same bits of it.
template <PageScore kPageScore, typename T>
__device__ void load_box(const ScoreArgs<T>& args, int page, int g, int lines, int d, float (&low)[kVectorWidth],
                         float (&high)[kVectorWidth]) {
  if constexpr (kPageScore == PageScore::kMinMax) {
    load_widened(&args.bounds(page, g, 0, d), low);
    load_widened(&args.bounds(page, g, 1, d), high);
  } else {
    const float per_line = __fdiv_rn(1.0F, static_cast<float>(lines));
    const float* sum = &args.moments(page, g, 0, d);
    const float* squares = &args.moments(page, g, 1, d);
#pragma unroll
    for (int i = 0; i < kVectorWidth; i += 4) {
      const float4 sums4 = *reinterpret_cast<const float4*>(sum + i);
      const float4 squares4 = *reinterpret_cast<const float4*>(squares + i);
      const float of_sum[4] = {sums4.x, sums4.y, sums4.z, sums4.w};
      const float of_squares[4] = {squares4.x, squares4.y, squares4.z, squares4.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float mean = __fmul_rn(of_sum[j], per_line);
        const float variance = __fsub_rn(__fmul_rn(of_squares[j], per_line), __fmul_rn(mean, mean));
        const float deviation = __fsqrt_rn(fmaxf(variance, 0.0F));
        low[i + j] = __fsub_rn(mean, deviation);
        high[i + j] = __fadd_rn(mean, deviation);
      }
    }
  }
}

template <typename T, int kHeadDim, PageScore kPageScore>
__global__ void __launch_bounds__(kScoreThreads) score_boxes(const __grid_constant__ ScoreArgs<T> args) {
  constexpr int kChunks = kHeadDim / (kPageLanes * kVectorWidth);  // of a lane
  __shared__ __align__(16) float queries[kMaxGroup][kHeadDim];
  const int g = static_cast<int>(blockIdx.y);
  const auto s = blockIdx.z;
  const int kv_len = args.kv_len(s);
  const int begin = static_cast<int>(blockIdx.x) * kPiecePages;
  const int pages = (kv_len + args.page_tokens - 1) / args.page_tokens;
  if (kv_len <= args.dense_tokens || begin >= pages) return;
  for (int i = static_cast<int>(threadIdx.x); i < args.group * kHeadDim; i += kScoreThreads) {
    queries[i / kHeadDim][i % kHeadDim] = widen(args.q(s, g * args.group + i / kHeadDim, i % kHeadDim));
  }
  __syncthreads();

  const int page_lane = static_cast<int>(threadIdx.x % kPageLanes);
  const int end = min(begin + kPiecePages, pages);
  for (int first = begin; first < end; first += kPagesAtOnce) {
    // Lanes without a page of their own repeat the last one's work: all lanes of a warp meet in the shuffles.
    const int own = first + static_cast<int>(threadIdx.x / kPageLanes);
    const int p = min(own, end - 1);
    const int page = args.page_table(s, p);
    const int lines = min(args.page_tokens, kv_len - p * args.page_tokens);
    float low[kChunks][kVectorWidth];
    float high[kChunks][kVectorWidth];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      load_box<kPageScore>(args, page, g, lines, (c * kPageLanes + page_lane) * kVectorWidth, low[c], high[c]);
    }
    float largest = -INFINITY;
    float sum = 0.0F;
    for (int h = 0; h < args.group; ++h) {
      float score = 0.0F;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const float* q = &queries[h][(c * kPageLanes + page_lane) * kVectorWidth];
#pragma unroll
        for (int i = 0; i < kVectorWidth; ++i) {
          score = fmaf(fmaxf(q[i], 0.0F), high[c][i], fmaf(fminf(q[i], 0.0F), low[c][i], score));
        }
      }
#pragma unroll
      for (int step = kPageLanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(kAllLanes, score, step);
      largest = fmaxf(largest, score);  // a head whose score is NaN does not count
      sum += score;
    }
    if (page_lane != 0 || own >= end) continue;
    const float mean = sum / static_cast<float>(args.group);
    args.scores(s, g, p) = args.group_score == GroupScore::kMax   ? largest
                           : args.group_score == GroupScore::kSum ? sum
                                                                  : mean;
  }
}

template <typename T, int kHeadDim, PageScore kPageScore>
void launch_score(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, GroupScore group_score, DenseLimit dense, TensorView<float, 3> scores) {
  ScoreArgs<T> args;
  args.q = TensorView<const T, 3>(static_cast<const T*>(q.data), q.shape[0], shape.heads, kHeadDim);
  if constexpr (kPageScore == PageScore::kMinMax) {
    args.bounds = kv.bounds.as<const T, 4>();
  } else {
    args.moments = kv.moments.as<const float, 4>();
  }
  args.kv_len = batch.kv_len;
  args.page_table = batch.page_table;
  args.scores = scores;
  args.group_score = group_score;
  args.dense_tokens = dense.tokens;
  args.group = shape.group();
  args.page_tokens = shape.page_tokens;
  const auto pieces = static_cast<unsigned>((scores.shape(2) + kPiecePages - 1) / kPiecePages);
  launch("score_boxes", score_boxes<T, kHeadDim, kPageScore>,
         {.grid = dim3(pieces, static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs)),
          .block = dim3(kScoreThreads)},
         exec.stream, args);
}

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / static_cast<int>(kWarpThreads);
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;

struct SelectArgs {
  TensorView<const float, 3> scores;
  TensorView<const std::int32_t, 1> kv_len;
  PageBudget budget;
  Selection pages;
  std::int32_t dense_tokens = 0;
  int page_tokens = 0;
};

// An integer of the same order: NaN counts as -inf, and -0 as +0, so that equal scores are equal integers. Never the
// largest integer, which would be a NaN.
__device__ unsigned ordered(float score) {
  const unsigned bits = __float_as_uint(isnan(score) ? -INFINITY : score + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

// The least integer that is taken and how many pages that have it are taken, the lowest ones.
struct Threshold {
  unsigned key = 0;
  int ties = 0;
};

// By one warp: the digit in whose bin the `wanted`-th largest lies, and its number within the bin.
__device__ void find_digit(const int* bins, int wanted, int* digit, int* wanted_in_bin) {
  constexpr int kOwn = kBins / static_cast<int>(kWarpThreads);
  const int lane = this_lane();
  int own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += bins[lane * kOwn + i];
  int through = own;  // this lane's bins and all above them
#pragma unroll
  for (int step = 1; step < static_cast<int>(kWarpThreads); step *= 2) {
    const int higher = __shfl_down_sync(kAllLanes, through, step);
    if (lane + step < static_cast<int>(kWarpThreads)) through += higher;
  }
  int above = through - own;
  if (above >= wanted || through < wanted) return;
  int bin = lane * kOwn + kOwn - 1;
  while (above + bins[bin] < wanted) above += bins[bin--];
  *digit = bin;
  *wanted_in_bin = wanted - above;
}

// The threshold of the `wanted` largest of pages [begin, end), 0 < wanted < end - begin. All threads call it.
__device__ Threshold find_threshold(const float* scores, int begin, int end, int wanted) {
  __shared__ int bins[kBins];
  __shared__ int digit;
  __shared__ int wanted_in_bin;
  unsigned prefix = 0;  // the digits found so far, in place
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) bins[i] = 0;
    __syncthreads();
    const unsigned found = shift == 32 - kDigitBits ? 0U : ~0U << (shift + kDigitBits);  // bits of the digits found
    for (int p = begin + static_cast<int>(threadIdx.x); p < end; p += kSelectThreads) {
      const unsigned key = ordered(scores[p]);
      if ((key & found) == prefix) atomicAdd(&bins[(key >> shift) % kBins], 1);
    }
    __syncthreads();
    if (this_warp() == 0) find_digit(bins, wanted, &digit, &wanted_in_bin);
    __syncthreads();
    prefix |= static_cast<unsigned>(digit) << shift;
    wanted = wanted_in_bin;
  }
  return {prefix, wanted};
}

// Two counts of a page: surely taken, and equal to the threshold.
struct Counts {
  int taken = 0;
  int equal = 0;
};

// Flags become the counts of all lower threads; `total` those of the block. All threads call it.
__device__ Counts scan_flags(bool taken, bool equal, Counts* total) {
  __shared__ Counts of_warp[kSelectWarps];
  const unsigned below = (1U << this_lane()) - 1U;
  const unsigned taken_lanes = __ballot_sync(kAllLanes, taken);
  const unsigned equal_lanes = __ballot_sync(kAllLanes, equal);
  __syncthreads();  // the scan before is read
  if (this_lane() == 0) of_warp[this_warp()] = {__popc(taken_lanes), __popc(equal_lanes)};
  __syncthreads();
  Counts before = {__popc(taken_lanes & below), __popc(equal_lanes & below)};
  Counts all = {0, 0};
#pragma unroll
  for (int w = 0; w < kSelectWarps; ++w) {
    const Counts counts = of_warp[w];
    if (w < this_warp()) before = {before.taken + counts.taken, before.equal + counts.equal};
    all = {all.taken + counts.taken, all.equal + counts.equal};
  }
  *total = all;
  return before;
}

__global__ void __launch_bounds__(kSelectThreads) select_best(const __grid_constant__ SelectArgs args) {
  const auto g = blockIdx.x;
  const auto s = blockIdx.y;
  const int kv_len = args.kv_len(s);
  if (kv_len <= args.dense_tokens) return;
  const PageChoice choice = page_choice(args.budget, kv_len, args.page_tokens);
  const float* scores = &args.scores(s, g, 0);
  std::int32_t* index = &args.pages.index(s, g, 0);

  // Everything between, or nothing, needs no search.
  const int between = choice.window_begin - choice.sink_end;
  Threshold threshold = {choice.chosen >= between ? 0U : ~0U, 0};
  if (choice.chosen > 0 && choice.chosen < between) {
    threshold = find_threshold(scores, choice.sink_end, choice.window_begin, choice.chosen);
  }

  Counts before = {0, 0};  // of the tiles before
  for (int tile = 0; tile < choice.pages; tile += kSelectThreads) {
    const int p = tile + static_cast<int>(threadIdx.x);
    const bool forced = p < choice.sink_end || (p >= choice.window_begin && p < choice.pages);
    const bool candidate = p >= choice.sink_end && p < choice.window_begin;
    const unsigned key = candidate ? ordered(scores[p]) : 0U;
    const bool taken = forced || (candidate && key > threshold.key);
    const bool equal = candidate && key == threshold.key;
    Counts total;
    const Counts lower = scan_flags(taken, equal, &total);
    const int equal_before = before.equal + lower.equal;
    if (taken || (equal && equal_before < threshold.ties)) {
      index[before.taken + lower.taken + min(equal_before, threshold.ties)] = p;
    }
    before = {before.taken + total.taken, before.equal + total.equal};
  }
  if (threadIdx.x == 0) {
    const int count = before.taken + min(before.equal, threshold.ties);
    args.pages.count(s, g) = count;
    args.pages.tail_begin(s, g) = count;
  }
}

}  // namespace

void score_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                 const Batch& batch, PageScore page_score, GroupScore group_score, DenseLimit dense,
                 TensorView<float, 3> scores) {
  check_attention_shape(shape);
  assert(q.dtype == kv.k.dtype && q.shape[1] == std::int64_t{shape.heads} * shape.head_dim);
  if (batch.seqs == 0) return;
  const auto with_type = [&](auto element) {
    using T = decltype(element);
    const bool wide = shape.head_dim == 128;
    if (page_score == PageScore::kMinMax) {
      return wide ? launch_score<T, 128, PageScore::kMinMax>(exec, shape, q, kv, batch, group_score, dense, scores)
                  : launch_score<T, 64, PageScore::kMinMax>(exec, shape, q, kv, batch, group_score, dense, scores);
    }
    return wide ? launch_score<T, 128, PageScore::kMeanStd>(exec, shape, q, kv, batch, group_score, dense, scores)
                : launch_score<T, 64, PageScore::kMeanStd>(exec, shape, q, kv, batch, group_score, dense, scores);
  };
  dispatch_16bit(kv.k.dtype, "scoring pages on CUDA", with_type);
}

void select_pages(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                  const PageBudget& budget, DenseLimit dense, const Selection& pages) {
  if (batch.seqs == 0) return;
  SelectArgs args;
  args.scores = scores;
  args.kv_len = batch.kv_len;
  args.budget = budget;
  args.pages = pages;
  args.dense_tokens = dense.tokens;
  args.page_tokens = shape.page_tokens;
  launch("select_best", select_best,
         {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs)),
          .block = dim3(kSelectThreads)},
         exec.stream, args);
}

}  // namespace vesper::cuda
