// One block chooses the pages of one list from their scores: what select_pages does, and what the last block to score a
// list does at once (attention/score_pages_cuda.cu).
//
// The score of the last chosen page is found by attention/block_threshold.cuh, each page weighing one; its first bins
// cut the range from the largest to the smallest score evenly. Then each warp counts the pages above it and at it among
// its own, and writes them behind those of the warps before: in order, of those at the threshold the lowest.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/block_threshold.cuh"
#include "attention/page_choice.h"
#include "attention/selection.h"

namespace vesper::cuda {

inline constexpr int kSelectThreads = 512;

struct SelectArgs {
  TensorView<const float, 3> scores;  // [seqs, kv_heads, pages]
  PageBudget budget;
  Selection pages;
};

struct SelectShared {
  static constexpr int kHeld = 8192;  // scores; of more, each pass reads those in device memory
  static constexpr int kWarps = kSelectThreads / static_cast<int>(kWarpThreads);
  ThresholdShared<kSelectThreads, unsigned> search;
  float scores[kHeld];
  int2 of_warp[kWarps];  // pages taken, and pages at the threshold
};
static_assert(sizeof(SelectShared) <= 48 * 1024);

// No larger for a better score. A range that is not finite makes few bins of it, which costs rounds only.
struct EvenBins {
  float largest, last_bin, per_score;
  __device__ EvenBins(float best, float worst, int bins = kThresholdBins)
      : largest(best), last_bin(static_cast<float>(bins - 1)), per_score(last_bin / (best - worst)) {}
  __device__ int operator()(float score) const {
    if (isnan(score)) score = -INFINITY;  // of one order, so of one bin
    if (score >= largest) return 0;
    const float bin = rounded_product(rounded_sum(largest, -score), per_score);
    return static_cast<int>(bin < last_bin ? bin : last_bin);
  }
};

// The threshold of the `wanted` best of pages [choice.sink_end, choice.window_begin), more than that many. Leaves the
// scores in shared memory where they are held.
__device__ inline Threshold<unsigned> best_pages(SelectShared& shared, const float* scores, const PageChoice& choice) {
  const bool held = choice.window_begin <= SelectShared::kHeld;
  unsigned best = 0;
  unsigned worst = 0;  // the complement of the order
#pragma unroll 4
  for (int p = choice.sink_end + static_cast<int>(threadIdx.x); p < choice.window_begin; p += kSelectThreads) {
    const float score = __ldcg(scores + p);
    if (held) shared.scores[p] = score;
    best = max(best, order_of(score));
    worst = max(worst, ~order_of(score));
  }
  const uint2 range = block_max(shared.search, best, worst);
  const auto wanted = static_cast<unsigned>(choice.chosen);
  return find_threshold(
      shared.search, ScoreRow{held ? shared.scores : scores, choice.sink_end, choice.window_begin},
      [](float) { return 1U; }, EvenBins(score_of_order(range.x), score_of_order(~range.y)),
      [wanted](unsigned) { return wanted; });
}

// Of sequence s and KV head g, by kSelectThreads threads. The bins must be clear, and a barrier must lie after that.
__device__ inline void select_list(SelectShared& shared, const SelectArgs& args, int s, int g,
                                   const PageChoice& choice) {
  const float* scores = &args.scores(s, g, 0);
  // Everything between, or nothing, needs no search.
  const int between = choice.window_begin - choice.sink_end;
  const bool searches = choice.chosen > 0 && choice.chosen < between;
  Threshold<unsigned> threshold{.order = choice.chosen >= between ? 0U : ~0U, .rest = 0};
  if (searches) threshold = best_pages(shared, scores, choice);
  if (searches && choice.window_begin <= SelectShared::kHeld) scores = shared.scores;
  const auto ties = static_cast<int>(threshold.rest);

  // A warp takes neighbouring pages: it counts its own, then knows where the first of them goes.
  const auto mark = [&](int p, unsigned& taken, unsigned& equal) {
    const bool candidate = p >= choice.sink_end && p < choice.window_begin;
    const unsigned order = candidate ? order_of(scores[p]) : 0U;
    taken = __ballot_sync(kAllLanes, candidate ? order > threshold.order : p < choice.pages);
    equal = __ballot_sync(kAllLanes, candidate && order == threshold.order);
  };
  constexpr int kWarpPages = static_cast<int>(kWarpThreads);
  const int own = (choice.pages + SelectShared::kWarps * kWarpPages - 1) / (SelectShared::kWarps * kWarpPages);
  const int first = this_warp() * own * kWarpPages;
  int taken_here = 0;
  int equal_here = 0;
#pragma unroll 4
  for (int i = 0; i < own; ++i) {
    unsigned taken;
    unsigned equal;
    mark(first + i * kWarpPages + this_lane(), taken, equal);
    taken_here += __popc(taken);
    equal_here += __popc(equal);
  }
  if (this_lane() == 0) shared.of_warp[this_warp()] = {taken_here, equal_here};
  __syncthreads();
  const int2 of_warp = this_lane() < SelectShared::kWarps ? shared.of_warp[this_lane()] : int2{0, 0};
  const bool before = this_lane() < this_warp();
  int taken_below = static_cast<int>(__reduce_add_sync(kAllLanes, before ? static_cast<unsigned>(of_warp.x) : 0U));
  int equal_below = static_cast<int>(__reduce_add_sync(kAllLanes, before ? static_cast<unsigned>(of_warp.y) : 0U));

  std::int32_t* index = &args.pages.index(s, g, 0);
#pragma unroll 2
  for (int i = 0; i < own; ++i) {
    const int p = first + i * kWarpPages + this_lane();
    unsigned taken;
    unsigned equal;
    mark(p, taken, equal);
    const int ties_here = equal_below + __popc(before_this_lane(equal));
    const bool is_taken = (taken >> this_lane()) % 2 != 0;
    const bool is_equal = (equal >> this_lane()) % 2 != 0;
    if (is_taken || (is_equal && ties_here < ties)) {
      index[taken_below + __popc(before_this_lane(taken)) + min(ties_here, ties)] = p;
    }
    taken_below += __popc(taken);
    equal_below += __popc(equal);
  }
  if (threadIdx.x == kSelectThreads - 1) {
    const int count = taken_below + min(equal_below, ties);
    args.pages.count(s, g) = count;
    args.pages.tail_begin(s, g) = count;
  }
}

}  // namespace vesper::cuda
