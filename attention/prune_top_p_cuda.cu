// Top-p pruning on CUDA; semantics in attention/prune_top_p.h.
//
//   scores [seqs, heads, capacity] f32; tokens.index [seqs, kv_heads, capacity]
//
// Block (g, s) = 1024 threads, one KV head of one sequence. For each query head of the group it finds the order
// (attention/mass.h) of the least score that is kept, then goes over the candidates once more and writes those that any
// head keeps, or that are forced, in their order.
//
// The threshold is found without sorting: weights are summed in 256 bins, the bin in which the sum from the best down
// reaches what is needed is cut into bins again, until it holds one score. The first bins are distances below the
// largest score, an eighth each, where attention scores spread well; the next ones cut the range of orders that the
// chosen bin's scores span, by a power of two: three or four rounds in all, six at most. Weights are integers, so that
// sums do not depend on the order of the atomics and equal those of the CPU: the same scores give the same list.
// Method: radix selection (Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 2012), with
// weights; the first bins are ours.
//
// Bytes: each head's row twice, where it fits into shared memory (kRowInShared), else once for each round too (from
// L2); 4 for a kept token. One block a KV head is bound by what one multiprocessor does, not by memory.
#include <bit>
#include <cassert>
#include <cstdint>
#include <string>

#include "attention/mass.h"
#include "attention/prune_top_p.h"
#include "engine/core/error.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {
namespace {

constexpr unsigned kThreads = 1024;
constexpr unsigned kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr int kMaxGroup = 16;
// Floats: with the static part less than the 99 KiB that a block may have on compute capability 8.6 and 8.9.
constexpr std::int64_t kRowInShared = 20480;
constexpr int kBins = kDistanceBins;
constexpr int kBinBits = std::countr_zero(unsigned{kBins});
static_assert(1 << kBinBits == kBins);
// Copies of the bins, by warps, so that fewer atomics meet.
constexpr unsigned kCopies = 4;
// Shared memory has no 64-bit atomic addition: a weight, under 2^42, is added as three parts of 14 bits. A part's sum
// stays under 2^32 over 2^18 candidates, what one copy sees of kMaxCandidates.
constexpr int kParts = 3;
constexpr int kPartBits = 14;
static_assert(kMassBits < kParts * kPartBits - 1 && kMaxCandidates / kCopies <= 1 << (32 - kPartBits));

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
};

struct Shared {
  unsigned part[kCopies][kParts][kBins];
  std::uint64_t weight[kBins];
  std::uint64_t needed;  // of the chosen bin
  int bin;               // kBins: all together weigh less than is needed
  unsigned low, high;    // orders that the chosen bin's scores span
  int reached;
  unsigned of_warp[kWarps];
  unsigned kept_by_warp[2][kWarps];
  unsigned threshold[kMaxGroup];
};
static_assert(sizeof(Shared) <= 16 * 1024);

// visit(score) for this thread's scores of a row.
template <typename Visit>
__device__ void for_each_score(const float* row, int candidates, const Visit& visit) {
  constexpr int kInFlight = 4;
  for (int first = static_cast<int>(threadIdx.x); first < candidates; first += static_cast<int>(kThreads) * kInFlight) {
    float some[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int j = first + i * static_cast<int>(kThreads);
      some[i] = j < candidates ? row[j] : 0.0F;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * static_cast<int>(kThreads) < candidates) visit(some[i]);
    }
  }
}

__device__ void add_weight(Shared& shared, int bin, std::uint64_t weight) {
  auto& parts = shared.part[threadIdx.x / 32 % kCopies];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const unsigned part = static_cast<unsigned>(weight >> (i * kPartBits)) % (1U << kPartBits);
    if (part != 0) atomicAdd(&parts[i][bin], part);
  }
}

// In warp 0: the bin in which the weights, summed from bin 0 on, reach needed_of(weight of all), and what is needed of
// that bin. Lane i holds eight bins.
template <typename Needed>
__device__ void choose_bin(Shared& shared, const Needed& needed_of) {
  constexpr int kPerLane = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x);
  std::uint64_t mine = 0;
  for (int i = 0; i < kPerLane; ++i) mine += shared.weight[kPerLane * lane + i];
  std::uint64_t through = mine;  // of all bins up to this lane's last
  for (int step = 1; step < 32; step *= 2) {
    const std::uint64_t before = __shfl_up_sync(kAllLanes, through, step);
    if (lane >= step) through += before;
  }
  const std::uint64_t total = __shfl_sync(kAllLanes, through, 31);
  const std::uint64_t needed = needed_of(total);
  if (needed > total && lane == 0) shared.bin = kBins;
  std::uint64_t sum = through - mine;
  if (sum >= needed || through < needed) return;
  int bin = kPerLane * lane;
  while (sum + shared.weight[bin] < needed) sum += shared.weight[bin++];
  shared.bin = bin;
  shared.needed = needed - sum;
}

// One round: fill() adds the weights of this thread's scores to bins, best first; `shared` then names the chosen bin.
template <typename Fill, typename Needed>
__device__ void sum_and_choose(Shared& shared, const Fill& fill, const Needed& needed_of) {
  auto* parts = &shared.part[0][0][0];
  for (unsigned i = threadIdx.x; i < kCopies * kParts * kBins; i += kThreads) parts[i] = 0;
  __syncthreads();
  fill();
  __syncthreads();
  if (threadIdx.x < kBins) {
    std::uint64_t sum = 0;
    for (unsigned copy = 0; copy < kCopies; ++copy) {
      for (int i = 0; i < kParts; ++i) sum += std::uint64_t{shared.part[copy][i][threadIdx.x]} << (i * kPartBits);
    }
    shared.weight[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 32) choose_bin(shared, needed_of);
  __syncthreads();
}

// The order of the largest score tau for which the scores >= tau weigh at least needed_of(weight of all), which is at
// least 1; 0, which every score reaches, where all together weigh less. weight(score) < 2^42.
template <typename Weight, typename Needed>
__device__ unsigned find_threshold(Shared& shared, const float* row, int candidates, float largest,
                                   const Weight& weight, const Needed& needed_of) {
  const auto by_distance = [&] {
    for_each_score(row, candidates,
                   [&](float score) { add_weight(shared, distance_bin(score, largest), weight(score)); });
  };
  sum_and_choose(shared, by_distance, needed_of);
  const int bin = shared.bin;
  if (bin == kBins) return 0;

  unsigned low = ~0U;
  unsigned high = 0;
  for_each_score(row, candidates, [&](float score) {
    if (distance_bin(score, largest) != bin || weight(score) == 0) return;
    low = min(low, order_of(score));
    high = max(high, order_of(score));
  });
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (threadIdx.x == 0) {
    shared.low = ~0U;
    shared.high = 0;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    atomicMin(&shared.low, low);
    atomicMax(&shared.high, high);
  }
  __syncthreads();
  low = shared.low;
  high = shared.high;

  while (low < high) {
    // (high - low) >> shift is under kBins.
    const int shift = max(0, 32 - __clz(static_cast<int>(high - low)) - kBinBits);
    const auto by_order = [&] {
      for_each_score(row, candidates, [&](float score) {
        const unsigned order = order_of(score);
        if (order < low || order > high) return;
        add_weight(shared, static_cast<int>((high - order) >> shift), weight(score));
      });
    };
    const std::uint64_t needed = shared.needed;
    sum_and_choose(shared, by_order, [needed](std::uint64_t) { return needed; });
    high -= static_cast<unsigned>(shared.bin) << shift;
    low = max(low, high - min(high, (1U << shift) - 1));
  }
  return low;
}

// In every thread.
__device__ float largest_score(Shared& shared, const float* row, int candidates) {
  unsigned largest = kOrderOfMinusInfinity;
  for_each_score(row, candidates, [&](float score) { largest = max(largest, order_of(score)); });
  largest = __reduce_max_sync(kAllLanes, largest);
  if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = __reduce_max_sync(kAllLanes, shared.of_warp[threadIdx.x % kWarps]);
  return float_of((largest >> 31) != 0 ? largest & 0x7FFFFFFFU : ~largest);
}

__device__ int count_reaching(Shared& shared, const float* row, int candidates, unsigned threshold) {
  int reached = 0;
  for_each_score(row, candidates, [&](float score) { reached += order_of(score) >= threshold ? 1 : 0; });
  reached = __reduce_add_sync(kAllLanes, reached);
  if (threadIdx.x == 0) shared.reached = 0;
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicAdd(&shared.reached, reached);
  __syncthreads();
  return shared.reached;
}

// The order of the least score that one query head keeps.
__device__ unsigned threshold_of_head(Shared& shared, const float* row, int candidates, const TopPRule& rule) {
  const float largest = largest_score(shared, row, candidates);
  const unsigned by_mass = find_threshold(
      shared, row, candidates, largest, [largest](float score) { return mass_of(score, largest); },
      [&](std::uint64_t total) { return mass_to_keep(rule.top_p, total, candidates); });
  if (count_reaching(shared, row, candidates, by_mass) >= rule.min_tokens) return by_mass;
  return find_threshold(
      shared, row, candidates, largest,
      [](float score) { return std::uint64_t{order_of(score) > kOrderOfMinusInfinity ? 1U : 0U}; },
      [&](std::uint64_t) { return static_cast<std::uint64_t>(rule.min_tokens); });
}

// Writes the candidates that any head keeps, or that are forced, in their order.
__device__ void write_union(Shared& shared, const PruneArgs& args, int s, int g, int candidates, std::int32_t kv_len) {
  const bool listed = args.page_index.data() != nullptr;
  const std::int32_t sink_end = tokens_of(args.rule.sink_tokens, kv_len);
  const std::int32_t window_begin = kv_len - max(1, tokens_of(args.rule.window_tokens, kv_len));
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  const auto keeps = [&](int j, std::int32_t token) {
    if (token >= kv_len) return false;
    if (token < sink_end || token >= window_begin) return true;
    for (int h = 0; h < args.group; ++h) {
      if (order_of(args.scores(s, g * args.group + h, j)) >= shared.threshold[h]) return true;
    }
    return false;
  };
  std::int32_t written = 0;
  int buffer = 0;  // two, so that one barrier a round is enough
  for (int first = 0; first < candidates; first += static_cast<int>(kThreads), buffer ^= 1) {
    const int j = first + static_cast<int>(threadIdx.x);
    std::int32_t token = 0;
    bool kept = false;
    if (j < candidates) {
      const int slot = j >> args.page_shift;
      token = listed ? (args.page_index(s, g, slot) << args.page_shift) + (j - (slot << args.page_shift)) : j;
      kept = keeps(j, token);
    }
    const unsigned of_warp = __ballot_sync(kAllLanes, kept);
    if (lane == 0) shared.kept_by_warp[buffer][warp] = static_cast<unsigned>(__popc(of_warp));
    __syncthreads();
    const unsigned by_warp = shared.kept_by_warp[buffer][lane];
    const unsigned before = __reduce_add_sync(kAllLanes, lane < warp ? by_warp : 0U);
    if (kept) {
      const int before_in_warp = __popc(of_warp & ((1U << lane) - 1));
      args.index(s, g, written + static_cast<std::int32_t>(before) + before_in_warp) = token;
    }
    written += static_cast<std::int32_t>(__reduce_add_sync(kAllLanes, by_warp));
  }
  if (threadIdx.x == 0) {
    args.count(s, g) = written;
    args.tail_begin(s, g) = written;
  }
}

__global__ void __launch_bounds__(kThreads) prune_candidates(const __grid_constant__ PruneArgs args) {
  static_assert(kWarps == 32, "a warp reads one number of every warp");
  __shared__ Shared shared;
  extern __shared__ float row_in_shared[];
  const auto g = static_cast<int>(blockIdx.x);
  const auto s = static_cast<int>(blockIdx.y);
  const std::int32_t kv_len = args.kv_len(s);
  if (kv_len <= args.dense_limit) return;
  const int candidates = args.page_index.data() != nullptr ? args.page_count(s, g) << args.page_shift : kv_len;

  for (int h = 0; h < args.group; ++h) {
    unsigned threshold = 0;
    if (args.rule.top_p < 1.0F) {
      const float* row = &args.scores(s, g * args.group + h, 0);
      if (candidates <= kRowInShared) {
        __syncthreads();  // the last head's row has been read
        for (int j = static_cast<int>(threadIdx.x); j < candidates; j += static_cast<int>(kThreads)) {
          row_in_shared[j] = row[j];
        }
        row = row_in_shared;
        __syncthreads();
      }
      threshold = threshold_of_head(shared, row, candidates, args.rule);
    }
    if (threadIdx.x == 0) shared.threshold[h] = threshold;
  }
  __syncthreads();
  write_union(shared, args, s, g, candidates, kv_len);
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
                       .page_shift = std::countr_zero(static_cast<unsigned>(shape.page_tokens))};
  const std::int64_t row = scores.shape(2) < kRowInShared ? scores.shape(2) : kRowInShared;
  launch("prune_candidates", prune_candidates,
         {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs)),
          .block = dim3(kThreads),
          .shared_bytes = static_cast<std::size_t>(row) * sizeof(float)},
         exec.stream, args);
}

}  // namespace vesper::cuda
