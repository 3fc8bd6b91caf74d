// The static part of sampled lists on CUDA; semantics in attention/sample_tail.h.
//
// Mapping: grid (kv_heads, seqs), 1024 threads a list. What is chosen are units, which are tokens, or pages where
// scores
//   are of pages: tokens of a page are equal, and a unit weighs as many as lie between sink and window. Scores become
//   unsigned numbers of their order. Those of tokens are kept in the list's own row at the token's place: a list is
//   never longer than its context, and the entries are written from the left, never past a number that is still to be
//   read. Those of pages are made anew whenever they are asked for, from the first-level cache.
// Of pages the k-th largest is found as quest finds its own (attention/block_threshold.cuh): even bins over the range
// of
//   scores, and the few of one bin compared. Where they are many, and of tokens, it is found a byte at a time from the
//   top, by histograms of the numbers that share the bytes found so far (radix selection; Alabi et al., "Fast
//   k-selection algorithms for graphics processing units", JEA 2012); in the first of them lanes of a warp that meet in
//   a bin add to it at once. Then one pass in order of the tokens writes those above it and the first of those equal to
//   it, each at the place that a block-wide prefix sum gives it. Only integers are counted, so the list does not depend
//   on the order of atomics.
// Bytes of a list: the pages' scores once, or the group's; then what is read again comes from the caches.
#include <cstdint>

#include "attention/block_threshold.cuh"
#include "attention/mma.cuh"
#include "attention/sample_tail.h"
#include "attention/select_list.cuh"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 2;  // consecutive units of a thread in the last pass
constexpr int kBins = 256;

struct StaticArgs {
  TensorView<const std::int32_t, 1> kv_len;
  TopKScores scores;
  StaticRule rule;
  Selection list;
  std::int32_t dense_tokens = 0;
  int group = 0;
  int page_tokens = 0;
};

using Search = ThresholdShared<kThreads, unsigned>;

struct Shared {
  Search search;
  unsigned count[2][kBins];  // tokens in a bin, by turns: one is emptied while the other is read
  unsigned bin;
  unsigned wanted;                  // how many tokens that share the bytes found so far
  std::uint64_t totals[2][kWarps];  // of the warps, by turns, so that one barrier a chunk is enough
};

// The group's score of token t. A mean orders a row as its sum does, and is summed.
__device__ float token_score(const StaticArgs& args, int s, int g, int t) {
  const float* scores = &args.scores.of_tokens(s, g * args.group, t);
  const std::int64_t stride = args.scores.of_tokens.shape(2);
  float score = scores[0];
  for (int h = 1; h < args.group; ++h) {
    const float next = scores[h * stride];
    score = args.rule.group_score == GroupScore::kMax ? fmaxf(score, next) : score + next;
  }
  return score;
}

// The units between sink and window, in order.
struct Units {
  const float* page_scores;    // of these units; null where they are tokens
  const std::int32_t* tokens;  // likewise keys of tokens, at their places
  int begin, end;              // tokens
  int unit_tokens;
  int count;
  int first_weight, last_weight;  // of pages that sink or window have a part of

  __device__ Units(const StaticArgs& args, int s, int g, const std::int32_t* row, int begin_token, int end_token)
      : begin(begin_token), end(end_token) {
    const bool of_pages = args.scores.of_tokens.empty();
    unit_tokens = of_pages ? args.page_tokens : 1;
    const int first = begin / unit_tokens;
    const int last = (end - 1) / unit_tokens;
    count = last - first + 1;
    first_weight = min(end, (first + 1) * unit_tokens) - begin;
    last_weight = end - max(begin, last * unit_tokens);
    page_scores = of_pages ? &args.scores.of_pages(s, g, first) : nullptr;
    tokens = row + begin;
  }
  __device__ int weight(int unit) const {
    return unit == 0 ? first_weight : unit == count - 1 ? last_weight : unit_tokens;
  }
  __device__ int first_token(int unit) const {
    return unit == 0 ? begin : begin + first_weight + (unit - 1) * unit_tokens;
  }
  __device__ unsigned key(int unit) const {
    return page_scores != nullptr ? order_of(page_scores[unit]) : static_cast<unsigned>(tokens[unit]);
  }
};

// In warp 0: the bin at which counts, summed from the highest bin down, reach what is wanted, and what is then still
// wanted of that bin. Lane i holds the eight bins from 255 - 8i down. The counts sum to at least what is wanted.
__device__ void choose_bin(Shared& shared, const unsigned* count) {
  constexpr int kPerLane = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x);
  const int top = kBins - 1 - kPerLane * lane;
  const unsigned wanted = shared.wanted;
  unsigned mine = 0;
  for (int j = 0; j < kPerLane; ++j) mine += count[top - j];
  unsigned through = mine;  // of all bins down to this lane's last
  for (int step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_up_sync(~0U, through, step);
    if (lane >= step) through += before;
  }
  unsigned above = through - mine;
  __syncwarp();
  if (above >= wanted || through < wanted) return;
  int bin = top;
  while (above + count[bin] < wanted) above += count[bin--];
  shared.bin = static_cast<unsigned>(bin);
  shared.wanted = wanted - above;
}

// The key of the shared.wanted-th largest token; leaves in shared.wanted how many of those equal to it are among them.
// All threads must have seen the keys.
__noinline__ __device__ unsigned find_threshold(Shared& shared, Units units) {
  const int lane = this_lane();
  const int count = units.count;
  unsigned found = 0;  // the upper bytes
  for (unsigned b = threadIdx.x; b < 2 * kBins; b += kThreads) shared.count[b / kBins][b % kBins] = 0;
  __syncthreads();
  for (int shift = 24; shift >= 0; shift -= 8) {
    unsigned* bins = shared.count[shift / 8 % 2];
    for (int first = 0; first < count; first += kThreads) {
      const int unit = first + static_cast<int>(threadIdx.x);
      bool counts = unit < count;
      unsigned bin = 0;
      int weight = 0;
      if (counts) {
        const unsigned key = units.key(unit);
        counts = shift == 24 || key >> (shift + 8) == found;
        bin = (key >> shift) % kBins;
        weight = units.weight(unit);
      }
      // Scores share their first byte or have one of a few: units of full weight that meet in a bin add to it at once.
      const bool full = counts && weight == units.unit_tokens;
      if (shift == 24) {
        const unsigned together = __match_any_sync(kAllLanes, full ? bin : unsigned{kBins});
        if (full && lane == __ffs(static_cast<int>(together)) - 1) {
          atomicAdd(&bins[bin], static_cast<unsigned>(__popc(together) * weight));
        }
      }
      if (counts && (shift < 24 || !full)) atomicAdd(&bins[bin], static_cast<unsigned>(weight));
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      choose_bin(shared, bins);
    } else {
      unsigned* next = shared.count[1 - shift / 8 % 2];
      for (unsigned b = threadIdx.x - 32; b < kBins; b += kThreads - 32) next[b] = 0;
    }
    __syncthreads();
    found = found << 8 | shared.bin;
  }
  return found;
}

// The same of pages. The bins must be clear.
__device__ unsigned find_page_threshold(Shared& shared, const Units& units) {
  Search& search = shared.search;
  const auto for_each = [&](const auto& visit) {
    for (int unit = static_cast<int>(threadIdx.x); unit < units.count; unit += kThreads) {
      visit(units.page_scores[unit], static_cast<unsigned>(units.weight(unit)));
    }
  };
  unsigned best = 0;
  unsigned worst = 0;  // the complement of the order
  for_each([&](float score, unsigned /*weight*/) {
    best = max(best, order_of(score));
    worst = max(worst, ~order_of(score));
  });
  const uint2 range = block_max(search, best, worst);
  const EvenBins bin_of(score_of_order(range.x), score_of_order(~range.y));
  for_each([&](float score, unsigned weight) { add_weight(search, bin_of(score), weight); });
  const unsigned wanted = shared.wanted;
  __syncthreads();
  (void)choose_bin(search, [wanted](unsigned) { return wanted; });  // there is one: not all are wanted
  const int bin = search.bin;
  for_each([&](float score, unsigned weight) {
    if (bin_of(score) != bin) return;
    const int place = atomicAdd(&search.members, 1);
    if (place >= Search::kMaxMembers) return;
    search.member_order[place] = order_of(score);
    search.member_weight[place] = weight;
  });
  __syncthreads();
  if (search.members > Search::kMaxMembers) return find_threshold(shared, units);
  const Threshold<unsigned> found = compare_members(search);
  if (threadIdx.x == 0) shared.wanted = found.rest;
  __syncthreads();
  return found.order;
}

// Sum of `value` over the lanes up to this one.
__device__ std::uint64_t sum_through(std::uint64_t value) {
  const int lane = this_lane();
  for (int step = 1; step < 32; step *= 2) {
    const std::uint64_t before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// Writes the tokens whose key is above tau and the first `ties` of those at tau, in order, from row[units.begin] on.
// Counts of tokens: those above in the lower half of a number, those at tau in the upper.
__device__ void write_best(Shared& shared, std::int32_t* row, const Units& units, unsigned tau, std::uint32_t ties) {
  const int lane = this_lane();
  const int warp = this_warp();
  const int count = units.count;
  std::uint64_t before_chunk = 0;
  int turn = 0;
  for (int chunk = 0; chunk < count; chunk += kThreads * kItems, turn ^= 1) {
    const int mine = chunk + static_cast<int>(threadIdx.x) * kItems;
    unsigned key[kItems];
    std::uint64_t tokens = 0;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      key[j] = mine + j < count ? units.key(mine + j) : 0U;  // below every key of a score
      if (key[j] < tau) continue;
      tokens += static_cast<std::uint64_t>(units.weight(mine + j)) << (key[j] == tau ? 32 : 0);
    }
    const std::uint64_t through = sum_through(tokens);
    if (lane == 31) shared.totals[turn][warp] = through;
    __syncthreads();  // also: the chunk's keys are in registers
    const std::uint64_t warps_through = sum_through(shared.totals[turn][lane]);
    const std::uint64_t all = __shfl_sync(kAllLanes, warps_through, 31);
    const std::uint64_t warps_before = __shfl_sync(kAllLanes, warps_through, (warp + 31) % 32);
    const std::uint64_t before = before_chunk + (warp == 0 ? 0 : warps_before) + through - tokens;
    auto above = static_cast<std::uint32_t>(before);
    auto equal = static_cast<std::uint32_t>(before >> 32);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (key[j] < tau) continue;
      std::int32_t* to = row + units.begin + above + min(equal, ties);
      const int token = units.first_token(mine + j);
      const auto weight = static_cast<std::uint32_t>(units.weight(mine + j));
      const std::uint32_t taken = key[j] > tau ? weight : min(weight, ties - min(equal, ties));
      for (std::uint32_t i = 0; i < taken; ++i) to[i] = token + static_cast<int>(i);
      (key[j] > tau ? above : equal) += weight;
    }
    before_chunk += all;
  }
}

__global__ void __launch_bounds__(kThreads, 1) write_static(const __grid_constant__ StaticArgs args) {
  __shared__ Shared shared;
  const auto g = static_cast<int>(blockIdx.x);
  const auto s = static_cast<int>(blockIdx.y);
  const auto thread = static_cast<int>(threadIdx.x);
  clear_bins(shared.search);
  wait_for_previous();
  let_next_start();  // its blocks find room beside these
  const std::int32_t visible = args.kv_len(s);
  if (visible <= args.dense_tokens) return;
  const std::int32_t window = max(1, tokens_of(args.rule.window_tokens, visible));
  const std::int32_t sink = min(tokens_of(args.rule.sink_tokens, visible), visible - window);
  const std::int32_t between = visible - window - sink;
  const bool scored = !args.scores.of_tokens.empty() || !args.scores.of_pages.empty();
  const std::int32_t top_k = scored ? min(tokens_of(args.rule.top_k, visible), between) : 0;
  const std::int32_t end = sink + between;
  std::int32_t* row = &args.list.index(s, g, 0);

  if (top_k == between) {
    for (std::int32_t t = sink + thread; t < end; t += kThreads) row[t] = t;
  } else if (top_k > 0) {
    if (!args.scores.of_tokens.empty()) {
      for (std::int32_t t = sink + thread; t < end; t += kThreads) {
        row[t] = static_cast<std::int32_t>(order_of(token_score(args, s, g, t)));
      }
    }
    if (thread == 0) shared.wanted = static_cast<unsigned>(top_k);
    __syncthreads();
    const Units units(args, s, g, row, sink, end);
    const unsigned tau =
        units.page_scores != nullptr ? find_page_threshold(shared, units) : find_threshold(shared, units);
    write_best(shared, row, units, tau, shared.wanted);
  }
  // Keys are read by now: the last chunk's barrier lies behind.
  for (std::int32_t t = thread; t < sink; t += kThreads) row[t] = t;
  for (std::int32_t t = thread; t < window; t += kThreads) row[sink + top_k + t] = end + t;
  if (thread == 0) {
    args.list.count(s, g) = sink + top_k + window;
    args.list.tail_begin(s, g) = sink + top_k + window;
    args.list.tail_log_weight(s, g) = 0.0F;
  }
}

}  // namespace

void select_static(const Exec& exec, const AttentionShape& shape, const Batch& batch, const TopKScores& scores,
                   const StaticRule& rule, DenseLimit dense, const Selection& list) {
  if (batch.seqs == 0) return;
  launch("select_static", write_static,
         {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs)),
          .block = dim3(kThreads),
          .overlap = true},
         exec.stream,
         StaticArgs{.kv_len = batch.kv_len,
                    .scores = scores,
                    .rule = rule,
                    .list = list,
                    .dense_tokens = dense.tokens,
                    .group = shape.group(),
                    .page_tokens = shape.page_tokens});
}

}  // namespace vesper::cuda
