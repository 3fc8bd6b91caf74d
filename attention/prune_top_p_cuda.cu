// Top-p pruning on CUDA; semantics in attention/prune_top_p.h.
//
//   scores [seqs, heads, capacity] f32; tokens.index [seqs, kv_heads, capacity]
//
// A cluster of blocks of kThreads threads takes one KV head of one sequence (1024 where each block has a multiprocessor
// for itself, 512 where two share one): its blocks deal out the query heads, find the
// least score that each head keeps (attention/block_threshold.cuh) and note, a bit a candidate, what it keeps. Then
// each reads the others' notes (of longer rows: the thresholds, and the scores again) for its own part of the
// candidates, and writes those that any head keeps, or that are forced, in their order, behind those of the blocks
// before it. A cluster has a block a query head, at most eight; before compute capability 9.0 it is one block.
//
// The threshold's first bins are distances below the largest score, 1/64 each, so that the bin in which the sum of
// masses reaches p holds few of the scores of a head. Sums are integers: the same scores give the same list on every
// device.
//
// Bytes: each score once for the thresholds where a row fits into the block's shared memory (kHeld), else once a pass;
// once or twice more for the lists, from the second-level cache; 4 for a kept token.
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

constexpr int kHeld = 8192;  // scores of a row that a block holds
constexpr int kWords = 256;  // of 32 candidates, marked together
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
  std::int32_t dense_limit;
  int group;
  int page_shift;
  int blocks;  // of a cluster
};

template <int kThreads>
struct Shared {
  static constexpr int kWarps = kThreads / static_cast<int>(kWarpThreads);
  ThresholdShared<kThreads, std::uint64_t> search;
  std::int32_t pages[kHeld / kMinPageTokens];
  unsigned reached[kWords];       // a bit a candidate that one of this block's heads keeps, where rows are held
  unsigned marks[kWords];         // a bit a candidate that is written
  int before[kWords];             // kept ones among those before these 32
  int kept;                       // of all that are marked
  unsigned threshold[kMaxGroup];  // written by the block that found it
  int kept_by_block[kMaxCluster];
};

// No larger for a better score; the last bin takes all that is farther away, where masses are 0.
__device__ int distance_bin_of(float score, float largest) {
  if (score >= largest) return 0;
  const float bins = rounded_product(rounded_sum(largest, -score), 64.0F);
  return bins < static_cast<float>(kThresholdBins - 1) ? static_cast<int>(bins) : kThresholdBins - 1;
}
static_assert(kThresholdBins > 64 * 29, "masses of scores 28.5 below the largest are 0");

// Notes which scores of a held row reach `threshold`, beside those noted before; how many do. A barrier must lie
// before.
template <int kThreads>
__device__ int note_reached(Shared<kThreads>& shared, const float* held, int candidates, unsigned threshold) {
  unsigned reached = 0;
#pragma unroll 4
  for (int word = this_warp(); word * 32 < candidates; word += Shared<kThreads>::kWarps) {
    const int j = word * 32 + this_lane();
    const unsigned of_word = __ballot_sync(kAllLanes, j < candidates && order_of(held[j]) >= threshold);
    if (this_lane() == 0) shared.reached[word] |= of_word;
    reached += static_cast<unsigned>(__popc(of_word));
  }
  return static_cast<int>(block_sum(shared.search, this_lane() == 0 ? reached : 0U));
}

template <int kThreads>
__device__ int count_reached(Shared<kThreads>& shared, const ScoreRow& row, unsigned threshold) {
  unsigned reached = 0;
  row.for_each<kThreads>([&](float score) { reached += order_of(score) >= threshold ? 1U : 0U; });
  return static_cast<int>(block_sum(shared.search, reached));
}

// The order of the least of the `number` best scores. What a held row keeps is noted. Seldom needed, and therefore code
// of its own, as search_in_bin.
template <int kThreads>
__noinline__ __device__ unsigned threshold_by_number(Shared<kThreads>& shared, ScoreRow row, bool held, float largest,
                                                     std::int32_t number) {
  const unsigned order =
      find_threshold(
          shared.search, row,
          [](float score) { return std::uint64_t{order_of(score) > kOrderOfMinusInfinity ? 1U : 0U}; },
          [largest](float score) { return distance_bin_of(score, largest); },
          [number](std::uint64_t) { return static_cast<std::uint64_t>(number); })
          .order;
  __syncthreads();
  if (held) (void)note_reached(shared, row.scores, row.end, order);
  __syncthreads();
  return order;
}

// The order of the least score that one query head keeps: of the two thresholds, by mass and by number, the lower. The
// second is looked for only where the first keeps too few. `held`: room for kHeld scores; where the row fits, what it
// keeps is noted. Threads leave behind a barrier.
template <int kThreads>
__device__ unsigned threshold_of_head(Shared<kThreads>& shared, const float* scores, int candidates, float* held,
                                      const TopPRule& rule) {
  const bool holds = candidates <= kHeld;
  unsigned order = kOrderOfMinusInfinity;
#pragma unroll 8
  for (int j = static_cast<int>(threadIdx.x); j < candidates; j += kThreads) {
    const float score = scores[j];
    if (holds) held[j] = score;
    order = max(order, order_of(score));
  }
  order = block_max(shared.search, order, 0U).x;
  const ScoreRow row{holds ? held : scores, 0, candidates};
  const float largest = float_of((order >> 31) != 0 ? order & 0x7FFFFFFFU : ~order);
  const unsigned by_mass = find_threshold(
                               shared.search, row, [largest](float score) { return mass_of(score, largest); },
                               [largest](float score) { return distance_bin_of(score, largest); },
                               [&](std::uint64_t total) { return mass_to_keep(share_to_keep(rule.top_p), total, candidates); })
                               .order;
  __syncthreads();
  const int reached = holds ? note_reached(shared, held, candidates, by_mass) : count_reached(shared, row, by_mass);
  __syncthreads();
  if (reached >= rule.min_tokens) return by_mass;
  return threshold_by_number(shared, row, holds, largest, rule.min_tokens);
}

// Candidates of one KV head: which token each is, and whether it is kept.
template <int kThreads>
struct Candidates {
  const PruneArgs& args;
  Shared<kThreads>& shared;
  const std::int32_t* pages;  // null: all tokens
  int s, g;
  std::int32_t kv_len, sink_end, window_begin;

  [[nodiscard]] __device__ std::int32_t token(int j) const {
    if (pages == nullptr) return j;
    const int slot = j >> args.page_shift;
    return (pages[slot] << args.page_shift) + (j - (slot << args.page_shift));
  }
  // Candidates 32 word ... that a head keeps, of those noted.
  [[nodiscard]] __device__ unsigned noted_in(int word) const {
    unsigned reached = 0;
    for (int i = 0; i < args.blocks; ++i) reached |= in_block(shared.reached, i)[word];
    return reached;
  }
  // By its scores.
  [[nodiscard]] __device__ bool reaches(int j) const {
    const float* score = &args.scores(s, g * args.group, j);
    const std::int64_t stride = args.scores.shape(2);
    bool kept = false;
#pragma unroll 4
    for (int h = 0; h < args.group; ++h) kept = kept | (order_of(score[h * stride]) >= shared.threshold[h]);
    return kept;
  }
  [[nodiscard]] __device__ bool forced(std::int32_t token) const {
    return token < sink_end || token >= window_begin;
  }
};

constexpr int kChunk = kWords * static_cast<int>(kWarpThreads);

// Marks the kept ones of up to kChunk candidates from `begin` on, a multiple of 32; how many there are. A barrier must
// lie before. Not inlined: each caller would have both forms of it.
template <bool kNoted, int kThreads>
__noinline__ __device__ int mark_kept(Shared<kThreads>& shared, const Candidates<kThreads>& of, int begin, int end) {
  const int words = (min(kChunk, end - begin) + 31) / 32;
  if constexpr (kNoted) {
    for (int word = static_cast<int>(threadIdx.x); word < words; word += kThreads) {
      shared.marks[word] = of.noted_in(begin / 32 + word);
    }
    __syncthreads();
  }
#pragma unroll 2
  for (int word = this_warp(); word < words; word += Shared<kThreads>::kWarps) {
    const int j = begin + word * 32 + this_lane();
    bool keeps = false;
    if (j < end) {
      const std::int32_t token = of.token(j);
      const bool reaches = kNoted ? (shared.marks[word] >> this_lane()) % 2 != 0 : of.reaches(j);
      keeps = token < of.kv_len && (reaches || of.forced(token));
    }
    const unsigned kept = __ballot_sync(kAllLanes, keeps);
    __syncwarp();  // all have read the word
    if (this_lane() == 0) shared.marks[word] = kept;
  }
  __syncthreads();
  if (this_warp() == 0) {
    unsigned sum = 0;
    for (int first = 0; first < words; first += static_cast<int>(kWarpThreads)) {
      const int word = first + this_lane();
      const auto mine = word < words ? static_cast<unsigned>(__popc(shared.marks[word])) : 0U;
      const unsigned through = sum_through_lane(mine);
      if (word < words) shared.before[word] = static_cast<int>(sum + through - mine);
      sum += __shfl_sync(kAllLanes, through, kWarpThreads - 1);
    }
    if (this_lane() == 0) shared.kept = static_cast<int>(sum);
  }
  __syncthreads();
  return shared.kept;
}

// Writes the marked ones of candidates [begin, end), in their order.
template <int kThreads>
__device__ void write_kept(const Shared<kThreads>& shared, const Candidates<kThreads>& of, int begin, int end,
                           std::int32_t* to) {
  const int words = (min(kChunk, end - begin) + 31) / 32;
  for (int word = this_warp(); word < words; word += Shared<kThreads>::kWarps) {
    const unsigned kept = shared.marks[word];
    if ((kept >> this_lane()) % 2 == 0) continue;
    to[shared.before[word] + __popc(before_this_lane(kept))] = of.token(begin + word * 32 + this_lane());
  }
}

// A barrier of the cluster's blocks.
__device__ void meet_cluster() {
  arrive_in_cluster();
  wait_for_cluster();
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
  for (int word = static_cast<int>(threadIdx.x); word < kWords; word += kThreads) shared.reached[word] = 0;
  wait_for_previous();
  wait_for_cluster();  // the others have begun
  __syncthreads();
  const std::int32_t kv_len = args.kv_len(s);
  if (kv_len <= args.dense_limit) return;
  const bool listed = args.page_index.data() != nullptr;
  const int candidates = listed ? args.page_count(s, g) << args.page_shift : kv_len;
  const bool holds = candidates <= kHeld && args.rule.top_p < 1.0F;
  if (listed && holds) {
    for (int slot = static_cast<int>(threadIdx.x); slot < candidates >> args.page_shift; slot += kThreads) {
      shared.pages[slot] = args.page_index(s, g, slot);  // seen behind the cluster's barrier
    }
  }

  for (int h = rank; h < args.group; h += args.blocks) {
    unsigned threshold = 0;
    if (args.rule.top_p < 1.0F) {
      threshold = threshold_of_head(shared, &args.scores(s, g * args.group + h, 0), candidates, held, args.rule);
    }
    if (thread < args.blocks) in_block(shared.threshold, thread)[h] = threshold;
  }
  meet_cluster();

  const Candidates<kThreads> of{.args = args,
                                .shared = shared,
                                .pages = !listed ? nullptr
                                         : holds ? shared.pages
                                                 : &args.page_index(s, g, 0),
                                .s = s,
                                .g = g,
                                .kv_len = kv_len,
                                .sink_end = tokens_of(args.rule.sink_tokens, kv_len),
                                .window_begin = kv_len - max(1, tokens_of(args.rule.window_tokens, kv_len))};
  const auto mark = [&](int from, int to) {
    return holds ? mark_kept<true>(shared, of, from, to) : mark_kept<false>(shared, of, from, to);
  };
  constexpr int kLine = 32;  // scores: parts begin at lines of 128 bytes
  const int part = (candidates + args.blocks * kLine - 1) / (args.blocks * kLine) * kLine;
  const int begin = min(rank * part, candidates);
  const int end = min(begin + part, candidates);
  // What fits into one chunk is marked once, else counted first.
  const bool one_chunk = end - begin <= kChunk;
  std::int32_t kept = 0;
  for (int chunk = begin; chunk < end; chunk += kChunk) {
    kept += mark(chunk, end);
    __syncthreads();
  }
  if (thread < args.blocks) in_block(shared.kept_by_block, thread)[rank] = kept;
  meet_cluster();
  std::int32_t before = 0;
  for (int i = 0; i < rank; ++i) before += shared.kept_by_block[i];
  if (rank == args.blocks - 1 && threadIdx.x == 0) {
    args.count(s, g) = before + kept;
    args.tail_begin(s, g) = before + kept;
  }
  for (int chunk = begin; chunk < end; chunk += kChunk) {
    const int of_chunk = one_chunk ? kept : mark(chunk, end);
    write_kept(shared, of, chunk, end, &args.index(s, g, 0) + before);
    before += of_chunk;
    __syncthreads();
  }
}

template <int kThreads>
void launch_prune(const Exec& exec, const PruneArgs& args, int kv_heads, int seqs) {
  launch(
      "prune_candidates", prune_candidates<kThreads>,
      {.grid = dim3(static_cast<unsigned>(kv_heads), static_cast<unsigned>(args.blocks), static_cast<unsigned>(seqs)),
       .block = dim3(kThreads),
       .shared_bytes = sizeof(Shared<kThreads>) + kHeld * sizeof(float),
       .overlap = true,
       .cluster = dim3(1, static_cast<unsigned>(args.blocks))},
      exec.stream, args);
}

}  // namespace

void prune_top_p(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                 const Selection& pages, const TopPRule& rule, DenseLimit dense, const Selection& tokens) {
  check_attention_shape(shape);
  if (batch.seqs == 0 || scores.empty()) return;
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
                       .dense_limit = dense.tokens,
                       .group = shape.group(),
                       .page_shift = std::countr_zero(static_cast<unsigned>(shape.page_tokens)),
                       .blocks = blocks};
  const bool alone = std::int64_t{shape.kv_heads} * blocks * batch.seqs <= multiprocessor_count();
  alone ? launch_prune<1024>(exec, args, shape.kv_heads, batch.seqs)
        : launch_prune<512>(exec, args, shape.kv_heads, batch.seqs);
}

}  // namespace vesper::cuda
