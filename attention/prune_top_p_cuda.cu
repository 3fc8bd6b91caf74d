// Top-p pruning on CUDA; semantics in attention/prune_top_p.h.
//
//   scores [seqs, heads, capacity] f32; tokens.index [seqs, kv_heads, capacity]
//
// A cluster of blocks of kThreads threads takes one KV head of one sequence (1024 where each block has a multiprocessor
// for itself, 512 where two share one): its blocks deal out the query heads, find the least score that each head keeps
// (attention/block_threshold.cuh) and note, a bit a candidate, what it keeps. Then each reads the others' notes (of
// rows too long to hold: the thresholds, and the scores again) for its own part of the candidates, and writes those
// that any head keeps, or that are forced, in their order, behind those of the blocks before it. A cluster has a block
// a query head, at most eight; before compute capability 9.0 it is one block.
//
// The threshold's first bins are distances below the largest score, 1/64 each, so that the bin in which the sum of
// masses reaches p holds few of the scores of a head. Sums are integers: the same scores give the same list on every
// device.
//
// What a launch takes is mostly the fetching of its code, once a step's other kernels have displaced it, and what a
// score takes to be weighed: so loops are short and not unrolled, and what rows seldom need is code of its own
// (docs/kernels.md, "Code").
//
// Bytes: each score once where a row fits into the block's shared memory, else once a pass, and once or twice more for
// the lists, from the second-level cache; 4 for a kept token.
#include <algorithm>
#include <bit>
#include <cassert>
#include <cstdint>
#include <string>

#include "attention/attend_decode.cuh"
#include "attention/block_threshold.cuh"
#include "attention/mass.h"
#include "attention/prune_top_p.h"
#include "engine/core/cluster.cuh"
#include "engine/core/error.h"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {
namespace {

constexpr int kMinPageTokens = 16;

struct PruneArgs {
  TensorView<const float, 3> scores;
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 3> page_index;  // without data: all tokens
  TensorView<const std::int32_t, 2> page_count;
  TensorView<std::int32_t, 3> index;
  TensorView<std::int32_t, 2> count;
  TensorView<std::int32_t, 2> tail_begin;
  TopPRule rule;
  double share;  // share_to_keep(rule.top_p)
  std::int32_t dense_limit;
  int group;
  int page_shift;
  int blocks;  // of a cluster
  int held;    // scores that a block has room for, at most Shared::kMostHeld
};

template <int kThreads>
struct Shared {
  static constexpr int kWarps = kThreads / static_cast<int>(kWarpThreads);
  static constexpr int kWords = kThreads;        // of 32 candidates, marked together: one a thread
  static constexpr int kMostHeld = kWords * 32;  // scores of a row
  ThresholdShared<kThreads, std::uint64_t> search;
  std::int32_t pages[kMostHeld / kMinPageTokens];
  unsigned reached[kWords];       // a bit a candidate that one of this block's heads keeps, where rows are held
  unsigned marks[kWords];         // a bit a candidate that is written
  int before[kWords];             // kept ones among those before these 32
  unsigned threshold[kMaxGroup];  // written by the block that found it
  int kept_by_block[kMaxCluster];
};

// No larger for a better score; the last bin takes all that is farther away, where masses are 0, and an infinite score.
__device__ int distance_bin_of(float score, float largest) {
  const float bins = rounded_product(rounded_sum(largest, -score), 64.0F);
  constexpr float kToInteger = 0x1p23F;
  const float integer = rounded_sum(fminf(bins, static_cast<float>(kThresholdBins - 1)), kToInteger);
  return static_cast<int>(bits_of(integer) - bits_of(kToInteger));
}
static_assert(kThresholdBins > 64 * 29, "masses of scores 28.5 below the largest are 0");

// What is at or above a threshold, in one comparison of scores. NaN counts as -inf, and is equal to no score.
struct Least {
  float score;
  bool all;
  explicit __device__ Least(unsigned order) : score(score_of_order(order)), all(order <= kOrderOfMinusInfinity) {}
  [[nodiscard]] __device__ bool reached_by(float other) const { return other >= score || all; }
};

// How many scores of a row reach a threshold; of a held row also notes which, beside those noted before. A barrier must
// lie before.
template <int kThreads>
__device__ int count_reached(Shared<kThreads>& shared, const HeldRow& row, unsigned threshold) {
  constexpr int kWarps = Shared<kThreads>::kWarps;
  const Least least(threshold);
  const int words = (row.end + 31) / 32;
  const int own = (words + kWarps - 1) / kWarps;  // of a warp, neighbours: at most one a lane
  const int first = this_warp() * own;
  unsigned mine = 0;
#pragma unroll 1
  for (int i = 0; i < own; ++i) {
    const int j = (first + i) * 32 + this_lane();
    const unsigned word = __ballot_sync(kAllLanes, j < row.end && least.reached_by(row.scores[j]));
    if (this_lane() == i) mine = word;
  }
  if (mine != 0) shared.reached[first + this_lane()] |= mine;
  return static_cast<int>(block_sum(shared.search, static_cast<unsigned>(__popc(mine))));
}
template <int kThreads>
__device__ int count_reached(Shared<kThreads>& shared, const ScoreRow& row, unsigned threshold) {
  const Least least(threshold);
  unsigned reached = 0;
  row.for_each<kThreads>([&](float score) { reached += least.reached_by(score) ? 1U : 0U; });
  return static_cast<int>(block_sum(shared.search, reached));
}

// The order of the least of the `number` best scores. What a held row keeps is noted. Seldom needed, and therefore code
// of its own, as search_in_bin.
template <int kThreads, typename Row>
__noinline__ __device__ unsigned threshold_by_number(Shared<kThreads>& shared, Row row, float largest,
                                                     std::int32_t number) {
  const unsigned order =
      find_threshold(
          shared.search, row,
          [](float score) { return std::uint64_t{order_of(score) > kOrderOfMinusInfinity ? 1U : 0U}; },
          [largest](float score) { return distance_bin_of(score, largest); },
          [number](std::uint64_t) { return static_cast<std::uint64_t>(number); })
          .order;
  __syncthreads();
  (void)count_reached(shared, row, order);
  __syncthreads();
  return order;
}

// The largest of a row, which is copied to `held` where that is not null.
template <int kThreads>
__device__ float largest_of(Shared<kThreads>& shared, const float* scores, int candidates, float* held) {
  constexpr int kTogether = 4;  // loads on their way, of four scores
  const int fours = (candidates + 3) / 4;
  float most = -INFINITY;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < fours; first += kTogether * kThreads) {
    float4 some[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      some[i] = reinterpret_cast<const float4*>(scores)[min(first + i * kThreads, fours - 1)];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = first + i * kThreads;
      if (at >= fours) continue;
      float4 four = some[i];
      if (at == candidates / 4) {  // behind the last candidate nothing was written
        if (candidates % 4 < 2) four.y = -INFINITY;
        if (candidates % 4 < 3) four.z = -INFINITY;
        four.w = -INFINITY;
      }
      if (held != nullptr) reinterpret_cast<float4*>(held)[at] = four;
      most = fmaxf(most, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));  // passes by NaN
    }
  }
  return score_of_order(block_max(shared.search, order_of(most), 0U).x);
}

// The order of the least score that one query head keeps: of the two thresholds, by mass and by number, the lower. The
// second is looked for only where the first keeps too few. `row`: where the largest was looked for, or its copy. Of a
// held row what it keeps is noted. Threads leave behind a barrier.
template <int kThreads, typename Row>
__device__ unsigned threshold_of_row(Shared<kThreads>& shared, const Row& row, float largest, double share,
                                     std::int32_t min_tokens) {
  const unsigned by_mass = find_threshold(
                               shared.search, row, [largest](float score) { return mass_of(score, largest); },
                               [largest](float score) { return distance_bin_of(score, largest); },
                               [&](std::uint64_t total) { return mass_to_keep(share, total, row.end); })
                               .order;
  __syncthreads();
  const int reached = count_reached(shared, row, by_mass);
  __syncthreads();
  if (reached >= min_tokens) return by_mass;
  return threshold_by_number(shared, row, largest, min_tokens);
}

// Of a row too long to hold; code of its own, as what is seldom needed.
template <int kThreads>
__noinline__ __device__ unsigned threshold_of_long_row(Shared<kThreads>& shared, const float* scores, int candidates,
                                                       double share, std::int32_t min_tokens) {
  const float largest = largest_of(shared, scores, candidates, nullptr);
  return threshold_of_row(shared, ScoreRow{scores, 0, candidates}, largest, share, min_tokens);
}

// Candidates of one KV head: which token each is, and whether it is kept. By value wherever it goes: behind a reference
// the compiler reads all of it anew for every candidate, since marks might be written over it.
template <int kThreads>
struct Candidates {
  Shared<kThreads>& shared;
  const std::int32_t* pages;  // null: all tokens
  const float* scores;        // of the group's first head
  std::int64_t row;           // from one head's scores to the next
  int page_shift, group, blocks;
  std::int32_t kv_len, sink_end, window_begin;

  [[nodiscard]] __device__ std::int32_t token(int j) const {
    if (pages == nullptr) return j;
    const int slot = j >> page_shift;
    return (pages[slot] << page_shift) + (j - (slot << page_shift));
  }
  // Candidates 32 word ... that a head keeps, of those noted.
  [[nodiscard]] __device__ unsigned noted_in(int word) const {
    unsigned reached = 0;
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) reached |= in_block(shared.reached, i)[word];
    return reached;
  }
  // By its scores.
  [[nodiscard]] __device__ bool reaches(int j) const {
    bool kept = false;
#pragma unroll 4
    for (int h = 0; h < group; ++h) kept = kept | Least(shared.threshold[h]).reached_by(scores[h * row + j]);
    return kept;
  }
  // Of candidates 32 word ..., before `end`: those that are kept, where heads reach `reached`.
  [[nodiscard]] __device__ unsigned kept_of(int word, int end, unsigned reached) const {
    const int run = pages == nullptr ? 32 : min(32, 1 << page_shift);  // neighbours in the context too
    unsigned kept = 0;
#pragma unroll 1
    for (int i = 0; i < 32 && word * 32 + i < end; i += run) {
      const std::int32_t first = token(word * 32 + i);
      const unsigned forced = low_bits(sink_end - first) | ~low_bits(window_begin - first);
      kept |= (((reached >> i) | forced) & low_bits(min(run, kv_len - first))) << i;
    }
    return kept;
  }
  [[nodiscard]] static __device__ unsigned low_bits(int count) {
    return count >= 32 ? ~0U : (1U << max(count, 0)) - 1;
  }
};

// Marks the kept ones of up to kMostHeld candidates from `begin` on, a multiple of 32; how many there are. Threads come
// and leave behind a barrier.
template <bool kNoted, int kThreads>
__device__ int mark_kept(Candidates<kThreads> of, int begin, int end) {
  constexpr int kWarps = Shared<kThreads>::kWarps;
  Shared<kThreads>& shared = of.shared;
  const auto thread = static_cast<int>(threadIdx.x);
  const int words = (min(Shared<kThreads>::kMostHeld, end - begin) + 31) / 32;
  if constexpr (!kNoted) {
    constexpr int kTogether = 4;  // words whose scores are on their way
#pragma unroll 1
    for (int first = this_warp(); first < words; first += kTogether * kWarps) {
      bool reaches[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int j = begin + (first + i * kWarps) * 32 + this_lane();
        reaches[i] = j < end && of.reaches(j);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const unsigned reached = __ballot_sync(kAllLanes, reaches[i]);
        if (this_lane() == 0 && first + i * kWarps < words) shared.marks[first + i * kWarps] = reached;
      }
    }
    __syncthreads();
  }
  unsigned kept = 0;
  if (thread < words) {
    kept = of.kept_of(begin / 32 + thread, end, kNoted ? of.noted_in(begin / 32 + thread) : shared.marks[thread]);
  }
  shared.marks[thread] = kept;
  const auto mine = static_cast<unsigned>(__popc(kept));
  const unsigned through = sum_through_lane(mine);
  if (this_lane() == kWarpThreads - 1) shared.search.reduced[0][this_warp()] = through;
  __syncthreads();
  const unsigned of_warp = this_lane() < kWarps ? shared.search.reduced[0][this_lane()] : 0U;
  shared.before[thread] = static_cast<int>(sum_of_lanes(this_lane() < this_warp() ? of_warp : 0U) + through - mine);
  __syncthreads();
  return static_cast<int>(sum_of_lanes(of_warp));
}

// By scores; code of its own.
template <int kThreads>
__noinline__ __device__ int mark_by_scores(Candidates<kThreads> of, int begin, int end) {
  return mark_kept<false>(of, begin, end);
}

// Writes the marked ones of candidates [begin, end), in their order.
template <int kThreads>
__device__ void write_kept(const Shared<kThreads>& shared, const Candidates<kThreads>& of, int begin, int end,
                           std::int32_t* to) {
  constexpr int kWarps = Shared<kThreads>::kWarps;
  constexpr int kTogether = 4;  // most words have few or none
  const int words = (min(Shared<kThreads>::kMostHeld, end - begin) + 31) / 32;
#pragma unroll 1
  for (int first = this_warp(); first < words; first += kTogether * kWarps) {
    unsigned kept[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      kept[i] = first + i * kWarps < words ? shared.marks[first + i * kWarps] : 0U;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if ((kept[i] >> this_lane()) % 2 == 0) continue;
      const int word = first + i * kWarps;
      to[shared.before[word] + __popc(before_this_lane(kept[i]))] = of.token(begin + word * 32 + this_lane());
    }
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) prune_candidates(const __grid_constant__ PruneArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kThreads>*>(memory);
  auto* held = reinterpret_cast<float*>(memory + sizeof(Shared<kThreads>));
  arrive_in_cluster();
  let_next_start();
  const auto thread = static_cast<int>(threadIdx.x);
  const auto g = static_cast<int>(blockIdx.x);
  const auto rank = static_cast<int>(blockIdx.y);
  const auto s = static_cast<int>(blockIdx.z);
  clear_bins(shared.search);
  shared.reached[thread] = 0;
  wait_for_previous();
  wait_for_cluster();  // the others have begun
  __syncthreads();
  const std::int32_t kv_len = args.kv_len(s);
  if (kv_len <= args.dense_limit) return;
  const bool listed = args.page_index.data() != nullptr;
  const int candidates = listed ? args.page_count(s, g) << args.page_shift : kv_len;
  const bool holds = candidates <= args.held && args.rule.top_p < 1.0F;
  if (listed && holds) {
#pragma unroll 1
    for (int slot = thread; slot < candidates >> args.page_shift; slot += kThreads) {
      shared.pages[slot] = args.page_index(s, g, slot);  // seen behind the cluster's barrier
    }
  }

#pragma unroll 1
  for (int h = rank; h < args.group; h += args.blocks) {
    unsigned threshold = 0;
    if (args.rule.top_p < 1.0F) {
      const float* scores = &args.scores(s, g * args.group + h, 0);
      if (holds) {
        const float largest = largest_of(shared, scores, candidates, held);
        const HeldRow row{held, 0, candidates};
        threshold = threshold_of_row(shared, row, largest, args.share, args.rule.min_tokens);
      } else {
        threshold = threshold_of_long_row(shared, scores, candidates, args.share, args.rule.min_tokens);
      }
    }
    if (thread < args.blocks) in_block(shared.threshold, thread)[h] = threshold;
  }
  meet_cluster();

  const Candidates<kThreads> of{.shared = shared,
                                .pages = !listed ? nullptr
                                         : holds ? shared.pages
                                                 : &args.page_index(s, g, 0),
                                .scores = &args.scores(s, g * args.group, 0),
                                .row = args.scores.shape(2),
                                .page_shift = args.page_shift,
                                .group = args.group,
                                .blocks = args.blocks,
                                .kv_len = kv_len,
                                .sink_end = tokens_of(args.rule.sink_tokens, kv_len),
                                .window_begin = kv_len - max(1, tokens_of(args.rule.window_tokens, kv_len))};
  constexpr int kChunk = Shared<kThreads>::kMostHeld;
  constexpr int kLine = 32;  // scores: parts begin at lines of 128 bytes
  const int part = (candidates + args.blocks * kLine - 1) / (args.blocks * kLine) * kLine;
  const int begin = min(rank * part, candidates);
  const int end = min(begin + part, candidates);
  // What fits into one chunk, as all that is held does, is marked once, else counted first.
  const bool one_chunk = end - begin <= kChunk;
  std::int32_t kept = 0;
  if (holds) {
    kept = mark_kept<true>(of, begin, end);
  } else {
#pragma unroll 1
    for (int chunk = begin; chunk < end; chunk += kChunk) kept += mark_by_scores(of, chunk, end);
  }
  if (thread < args.blocks) in_block(shared.kept_by_block, thread)[rank] = kept;
  meet_cluster();
  std::int32_t before = 0;
#pragma unroll 1
  for (int i = 0; i < rank; ++i) before += shared.kept_by_block[i];
  if (rank == args.blocks - 1 && thread == 0) {
    args.count(s, g) = before + kept;
    args.tail_begin(s, g) = before + kept;
  }
#pragma unroll 1
  for (int chunk = begin; chunk < end; chunk += kChunk) {
    const int of_chunk = one_chunk ? kept : mark_by_scores(of, chunk, end);
    write_kept(shared, of, chunk, end, &args.index(s, g, 0) + before);
    before += of_chunk;
    __syncthreads();
  }
}

template <int kThreads>
void launch_prune(const Exec& exec, PruneArgs args, int kv_heads, int seqs) {
  static const auto room = static_cast<std::int64_t>(
      (device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - sizeof(Shared<kThreads>)) / sizeof(float));
  args.held =
      static_cast<int>(std::min({args.scores.shape(2), room, static_cast<std::int64_t>(Shared<kThreads>::kMostHeld)}));
  launch(
      "prune_candidates", prune_candidates<kThreads>,
      {.grid = dim3(static_cast<unsigned>(kv_heads), static_cast<unsigned>(args.blocks), static_cast<unsigned>(seqs)),
       .block = dim3(kThreads),
       .shared_bytes = sizeof(Shared<kThreads>) + static_cast<std::size_t>(args.held) * sizeof(float),
       .overlap = true,
       .cluster = dim3(1, static_cast<unsigned>(args.blocks))},
      exec.stream, args);
}

}  // namespace

void prune_top_p(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                 const Selection& pages, const TopPRule& rule, DenseLimit dense, const Selection& tokens) {
  check_attention_shape(shape);
  if (batch.seqs == 0 || scores.empty()) return;
  assert(scores.shape(2) % 4 == 0);
  if (scores.shape(2) > kMaxCandidates) {
    refuse({"pruning to top-p on CUDA", std::to_string(scores.shape(2)) + " candidates a head",
            "at most " + std::to_string(kMaxCandidates), "set --max-context or base_budget lower"});
  }
  const int blocks = has_clusters() ? std::min(shape.group(), kMaxCluster) : 1;
  const PruneArgs args{.scores = scores,
                       .kv_len = batch.kv_len,
                       .page_index = pages.index,
                       .page_count = pages.count,
                       .index = tokens.index,
                       .count = tokens.count,
                       .tail_begin = tokens.tail_begin,
                       .rule = rule,
                       .share = share_to_keep(rule.top_p),
                       .dense_limit = dense.tokens,
                       .group = shape.group(),
                       .page_shift = std::countr_zero(static_cast<unsigned>(shape.page_tokens)),
                       .blocks = blocks,
                       .held = 0};
  // Alone too where only so a row fits into shared memory: rounds of blocks that hold theirs are sooner than half as
  // many of blocks that read.
  const bool alone = std::int64_t{shape.kv_heads} * blocks * batch.seqs <= multiprocessor_count() ||
                     (scores.shape(2) > Shared<512>::kMostHeld && scores.shape(2) <= Shared<1024>::kMostHeld);
  alone ? launch_prune<1024>(exec, args, shape.kv_heads, batch.seqs)
        : launch_prune<512>(exec, args, shape.kv_heads, batch.seqs);
}

}  // namespace vesper::cuda
