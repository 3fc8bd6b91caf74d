// Scores of pages on CUDA, and the lists of the best made in the same launch.
//
//   scores[s, g, p] = reduce over the group's heads h of  relu(q_h) . high_p - relu(-q_h) . low_p
//     min_max:  low, high = the page's bounds, exact or code * scale;  mean_std: mu - sigma, mu + sigma of its keys
//
// Shapes: q [seqs, heads, head_dim]; bounds (exact, or codes with scales [pages, kv_heads, 2, spans] beside them) and
//   moments [pages, kv_heads, 2, head_dim]; scores [seqs, kv_heads, pages].
//
// Bounds (score_bounds): the score is one product over 2 head_dim channels, of a page's row (low, high) with
//   (min(q, 0), max(q, 0)), which are exact in the 16-bit type: tensor cores take 16 pages by the group's heads, so
//   that bounds are read once for all of them. Grid (pieces, kv_heads, seqs), a piece being rounds of 64 pages; in a
//   block of 16 warps four share 16 pages, a quarter of the channels each, so that a round of few pages has all its
//   bytes in flight at once: lane 4 r + c reads chunks c, c + 4 ... of eight channels of rows r and r + 8, and holds
//   the same channels of head r. Those of the next round are read before this one's products; those of the first before
//   the kernel in front of this one is done, where the piece has no page that the step wrote to.
// Bounds in 8 bits: the same with half the bytes; see attention/page_rows.cuh.
// Lists: the block that finishes a list's last piece (a counter, left at zero) chooses its pages at once
//   (attention/select_list.cuh), while other blocks go on with other lists. Scores are what they are and the choice is
//   exact, so the order of blocks does not show.
// Moments (score_moments): eight lanes share a page, a lane takes every eighth chunk of 8 channels over all heads.
//   Every operation that makes a box is one IEEE operation, as on the CPU: where a variance cancels, both devices keep
//   the same bits of it.
// Byte bound: bounds read once, 4 * head_dim bytes a page and KV head (1 / page_tokens of K and V), in 8 bits 17 / 32
// of
//   that, or moments, twice that; q, scores and lists beside them.
// Mapping of fragments: attention/mma.cuh.
// Source: Tang et al., "Quest", arXiv 2406.10774, Algorithm 1; the split into two plain products, mean_std and the
//   choice by the last block are ours.
#include <algorithm>
#include <cassert>

#include "attention/last_block.cuh"
#include "attention/mma.cuh"
#include "attention/page_products.cuh"
#include "attention/page_rows.cuh"
#include "attention/select_list.cuh"
#include "attention/select_pages.h"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/vector.cuh"

namespace vesper::cuda {
namespace {

constexpr int kWarps = kSelectThreads / static_cast<int>(kWarpThreads);
constexpr int kTile = 16;                             // pages of one product
constexpr int kParts = 4;                             // warps that share a tile, by channels
constexpr int kRoundPages = kWarps / kParts * kTile;  // of a block
constexpr int kMaxRounds = 8;
constexpr int kColumns = 8;  // query heads of one product
constexpr int kMaxGroup = 16;

template <typename T>
struct ScoreArgs {
  TensorView<const T, 3> q;            // [seqs, heads, head_dim]
  PageBounds<T> bounds;                // of these or of the moments one has data
  TensorView<const float, 4> moments;  // [pages, kv_heads, 2, head_dim]
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 2> page_table;
  TensorView<float, 3> scores;
  SelectArgs select;
  TensorView<std::int32_t, 2> tickets;  // [seqs, kv_heads]; without data: scores only
  GroupScore group_score = GroupScore::kMax;
  std::int32_t dense_tokens = 0;
  int kv_heads = 0;
  int group = 0;
  int page_tokens = 0;
  int piece_pages = 0;
};

// Partial scores of a round: of each part of the channels, page and head. Two, so that a round has one barrier.
template <int kProducts>
struct Partial {
  float score[2][kParts][kRoundPages][kProducts * kColumns];
};

// The group's scores of the pages of one round: thread 8 i + j takes heads j and j + 8 of page i.
template <typename T, int kProducts>
__device__ void write_scores(const ScoreArgs<T>& args, const Partial<kProducts>& partial, int buffer, int s, int g,
                             int first, int end) {
  static_assert(kRoundPages * kColumns == kSelectThreads);
  const int page = static_cast<int>(threadIdx.x) / kColumns;
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  float largest = -INFINITY;
  float sum = 0.0F;
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
    const int head = m * kColumns + column;
    if (head >= args.group) continue;
    float score = 0.0F;
#pragma unroll
    for (int part = 0; part < kParts; ++part) score += partial.score[buffer][part][page][head];
    largest = fmaxf(largest, score);  // a head whose score is NaN does not count
    sum += score;
  }
#pragma unroll
  for (int step = kColumns / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (column != 0 || first + page >= end) return;
  const float mean = sum / static_cast<float>(args.group);
  args.scores(s, g, first + page) = args.group_score == GroupScore::kMax   ? largest
                                    : args.group_score == GroupScore::kSum ? sum
                                                                           : mean;
}

template <typename T, int kHeadDim, int kProducts, bool kInt8>
__global__ void __launch_bounds__(kSelectThreads, 2) score_bounds(const __grid_constant__ ScoreArgs<T> args) {
  constexpr int kChannels = 2 * kHeadDim / kParts;           // of a warp
  constexpr int kChunks = kChannels / (4 * kChunkElements);  // of a lane
  static_assert(4 * kChunkElements == kBoundSpan && kChannels % kBoundSpan == 0);
  union Shared {
    Partial<kProducts> partial;
    SelectShared select;
  };
  __shared__ __align__(16) unsigned char memory[sizeof(Shared)];
  auto& partial = *reinterpret_cast<Partial<kProducts>*>(memory);

  const int g = static_cast<int>(blockIdx.y);
  const int s = static_cast<int>(blockIdx.z);
  const int kv_len = args.kv_len(s);
  const int pages = page_count(kv_len, args.page_tokens);
  const int begin = static_cast<int>(blockIdx.x) * args.piece_pages;
  const int end = min(begin + args.piece_pages, pages);
  let_next_start();
  if (kv_len <= args.dense_tokens || begin >= pages) return wait_for_previous();

  const int r = this_lane() / 4;
  const int c = this_lane() % 4;
  const int part = this_warp() % kParts;
  const int row = this_warp() / kParts * kTile + r;  // of a round, and row + 8
  const int channel = part * kChannels + c * kChunkElements;
  const auto page_of = [&](int p) { return args.page_table(s, min(p, end - 1)); };
  const auto read_rows = [&](const int(&page)[2], PageRows<T, kChunks, kInt8>& rows) {
    const std::int64_t of_heads[2] = {std::int64_t{page[0]} * args.kv_heads + g,
                                      std::int64_t{page[1]} * args.kv_heads + g};
    rows.read(args.bounds, of_heads, 2 * kHeadDim, channel);
  };
  int page[2] = {page_of(begin + row), page_of(begin + row + 8)};
  if (end == pages) wait_for_previous();  // all pages but the newest are older than the kernel before this one
  PageRows<T, kChunks, kInt8> rows;
  read_rows(page, rows);
  page[0] = page_of(begin + kRoundPages + row);
  page[1] = page_of(begin + kRoundPages + row + 8);
  wait_for_previous();

  uint4 query[kProducts][kChunks];
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
    const int head = m * kColumns + r;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int d = channel + 4 * kChunkElements * i;
      query[m][i] = {};
      if (head >= args.group) continue;
      query[m][i] =
          one_sign<T>(*reinterpret_cast<const uint4*>(&args.q(s, g * args.group + head, d % kHeadDim)), d >= kHeadDim);
    }
  }
  float2 unit[kProducts];  // of sums, where queries are scaled
  if constexpr (kInt8) {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) unit[m] = scale_queries<T>(query[m]);
  }

  int buffer = 0;
  for (int first = begin; first < end; first += kRoundPages, buffer ^= 1) {
    PageRows<T, kChunks, kInt8> next = {};
    if (first + kRoundPages < end) {
      read_rows(page, next);
      page[0] = page_of(first + 2 * kRoundPages + row);
      page[1] = page_of(first + 2 * kRoundPages + row + 8);
    }
    float d[kProducts][4] = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int m = 0; m < kProducts; ++m) rows.multiply(i, query[m][i], d[m]);
    }
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      if constexpr (kInt8) {
        d[m][0] *= unit[m].x;
        d[m][1] *= unit[m].y;
        d[m][2] *= unit[m].x;
        d[m][3] *= unit[m].y;
      }
      auto& to = partial.score[buffer][part];
      *reinterpret_cast<float2*>(&to[row][m * kColumns + 2 * c]) = {d[m][0], d[m][1]};
      *reinterpret_cast<float2*>(&to[row + 8][m * kColumns + 2 * c]) = {d[m][2], d[m][3]};
    }
    __syncthreads();
    write_scores<T, kProducts>(args, partial, buffer, s, g, first, end);
    rows = next;
  }

  if (args.tickets.data() == nullptr) return;
  if (!is_last_block(&args.tickets(s, g), (pages + args.piece_pages - 1) / args.piece_pages)) return;
  auto& select = *reinterpret_cast<SelectShared*>(memory);
  clear_bins(select.search);
  __syncthreads();
  select_list(select, args.select, s, g, page_choice(args.select.budget, kv_len, args.page_tokens));
}

constexpr int kMomentThreads = 128;
constexpr int kPageLanes = 8;                              // that share a page
constexpr int kPagesAtOnce = kMomentThreads / kPageLanes;  // by a block
constexpr int kPiecePages = 4 * kPagesAtOnce;              // of a block in all

// Eight channels of a page's box.
template <typename T>
__device__ void load_box(const ScoreArgs<T>& args, int page, int g, int lines, int d, float (&low)[kVectorWidth],
                         float (&high)[kVectorWidth]) {
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

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMomentThreads) score_moments(const __grid_constant__ ScoreArgs<T> args) {
  constexpr int kChunks = kHeadDim / (kPageLanes * kVectorWidth);  // of a lane
  __shared__ __align__(16) float queries[kMaxGroup][kHeadDim];
  const int g = static_cast<int>(blockIdx.y);
  const auto s = blockIdx.z;
  const int kv_len = args.kv_len(s);
  const int begin = static_cast<int>(blockIdx.x) * kPiecePages;
  const int pages = page_count(kv_len, args.page_tokens);
  if (kv_len <= args.dense_tokens || begin >= pages) return;
  for (int i = static_cast<int>(threadIdx.x); i < args.group * kHeadDim; i += kMomentThreads) {
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
      load_box(args, page, g, lines, (c * kPageLanes + page_lane) * kVectorWidth, low[c], high[c]);
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

template <typename T, int kHeadDim, bool kInt8>
void launch_bounds(const Exec& exec, ScoreArgs<T> args, int seqs) {
  // About twice as many pieces as the device runs side by side: the first lists are chosen while the last are scored.
  const auto lists = std::int64_t{args.kv_heads} * seqs;
  const std::int64_t rounds = (args.scores.shape(2) + kRoundPages - 1) / kRoundPages;
  const std::int64_t together = std::int64_t{4} * multiprocessor_count();
  const std::int64_t of_piece = std::clamp<std::int64_t>((lists * rounds + together - 1) / together, 1, kMaxRounds);
  args.piece_pages = static_cast<int>(of_piece) * kRoundPages;
  launch("score_bounds",
         args.group <= kColumns ? score_bounds<T, kHeadDim, 1, kInt8> : score_bounds<T, kHeadDim, 2, kInt8>,
         {.grid = dim3(static_cast<unsigned>((rounds + of_piece - 1) / of_piece), static_cast<unsigned>(args.kv_heads),
                       static_cast<unsigned>(seqs)),
          .block = dim3(kSelectThreads),
          .overlap = true},
         exec.stream, args);
}

template <typename T, int kHeadDim>
void launch_moments(const Exec& exec, const ScoreArgs<T>& args, int seqs) {
  const auto pieces = static_cast<unsigned>((args.scores.shape(2) + kPiecePages - 1) / kPiecePages);
  launch("score_moments", score_moments<T, kHeadDim>,
         {.grid = dim3(pieces, static_cast<unsigned>(args.kv_heads), static_cast<unsigned>(seqs)),
          .block = dim3(kMomentThreads)},
         exec.stream, args);
}

template <typename T>
ScoreArgs<T> score_args(const AttentionShape& shape, const TensorRef& q, const LayerKv& kv, const Batch& batch,
                        PageScore page_score, GroupScore group_score, DenseLimit dense, TensorView<float, 3> scores) {
  ScoreArgs<T> args;
  args.q = TensorView<const T, 3>(static_cast<const T*>(q.data), q.shape[0], shape.heads, shape.head_dim);
  if (page_score == PageScore::kMeanStd) {
    args.moments = kv.moments.as<const float, 4>();
  } else {
    args.bounds = page_bounds<T>(kv, page_score);
  }
  args.kv_len = batch.kv_len;
  args.page_table = batch.page_table;
  args.scores = scores;
  args.group_score = group_score;
  args.dense_tokens = dense.tokens;
  args.kv_heads = shape.kv_heads;
  args.group = shape.group();
  args.page_tokens = shape.page_tokens;
  return args;
}

template <typename T>
void launch_scores(const Exec& exec, const AttentionShape& shape, const ScoreArgs<T>& args, int seqs) {
  const bool wide = shape.head_dim == 128;
  if (args.bounds.exact != nullptr) {
    return wide ? launch_bounds<T, 128, false>(exec, args, seqs) : launch_bounds<T, 64, false>(exec, args, seqs);
  }
  if (args.bounds.codes != nullptr) {
    return wide ? launch_bounds<T, 128, true>(exec, args, seqs) : launch_bounds<T, 64, true>(exec, args, seqs);
  }
  return wide ? launch_moments<T, 128>(exec, args, seqs) : launch_moments<T, 64>(exec, args, seqs);
}

}  // namespace

void score_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                 const Batch& batch, PageScore page_score, GroupScore group_score, DenseLimit dense,
                 TensorView<float, 3> scores) {
  check_attention_shape(shape);
  assert(q.dtype == kv.k.dtype && q.shape[1] == std::int64_t{shape.heads} * shape.head_dim);
  if (batch.seqs == 0) return;
  dispatch_16bit(kv.k.dtype, "scoring pages on CUDA", [&](auto element) {
    using T = decltype(element);
    launch_scores(exec, shape, score_args<T>(shape, q, kv, batch, page_score, group_score, dense, scores), batch.seqs);
  });
}

void choose_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, PageScore page_score, GroupScore group_score, const PageBudget& budget,
                  DenseLimit dense, const PageScratch& scratch, const Selection& pages) {
  check_attention_shape(shape);
  assert(page_score != PageScore::kMeanStd);
  assert(q.dtype == kv.k.dtype && q.shape[1] == std::int64_t{shape.heads} * shape.head_dim);
  if (batch.seqs == 0) return;
  dispatch_16bit(kv.k.dtype, "choosing pages on CUDA", [&](auto element) {
    using T = decltype(element);
    ScoreArgs<T> args = score_args<T>(shape, q, kv, batch, page_score, group_score, dense, scratch.scores);
    args.select = {.scores = scratch.scores, .budget = budget, .pages = pages};
    args.tickets = scratch.tickets;
    launch_scores(exec, shape, args, batch.seqs);
  });
}

}  // namespace vesper::cuda
