// The score at which weights, summed from the best score down, reach what is needed; by one block, without sorting.
//
// Weights are summed in 2048 bins of scores, best first. The bin in which the sum reaches what is needed holds few
// scores where the first bins fit the data; those are compared with each other. Where it holds many (ties, or bins that
// do not fit), the range of orders (attention/mass.h) that they span is cut into 2048 bins by a power of two: twice at
// the most, as 11 bits a round soon leave no range. Weights are integers, so sums do not depend on the order of the
// atomics: the same scores give the same threshold on every device.
// A search takes some thousand cycles, of which the barriers and the instructions' first fetch are most: so loops over
// scores are short ones over shared memory, not unrolled ones over registers, and sums are as narrow as they may be.
// Source: radix selection (Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 2012), with
// weights; first bins that fit the data and the comparison of the few are ours.
#pragma once

#include <bit>
#include <cstdint>

#include "attention/mass.h"
#include "attention/mma.cuh"

namespace vesper::cuda {

// The largest order tau such that the scores >= tau weigh at least what is needed; `rest` is what is needed of those
// equal to tau after all above it. Order 0, which every score reaches, where all together weigh less.
template <typename Sum>
struct Threshold {
  unsigned order = 0;
  Sum rest = 0;
};

inline constexpr int kThresholdBins = 2048;

// Sum: of weights, 32 or 64 bits.
template <int kThreads, typename Sum>
struct ThresholdShared {
  static constexpr int kBinBits = std::countr_zero(unsigned{kThresholdBins});
  static constexpr int kWarps = kThreads / static_cast<int>(kWarpThreads);
  static constexpr int kMaxMembers = 128;
  static constexpr bool kWide = sizeof(Sum) == 8;
  static_assert(1 << kBinBits == kThresholdBins && kThresholdBins % kThreads == 0 && kWarps <= 32);
  static_assert(kMaxMembers <= kThreads);

  // Sums of weights, in halves where they are wide, since shared memory has no 64-bit atomic addition. All zero between
  // searches.
  alignas(16) unsigned low[kThresholdBins];
  alignas(16) unsigned high[kWide ? kThresholdBins : 4];
  Sum of_warp[kWarps];
  Sum needed;  // of the chosen bin
  int bin;
  int members;
  unsigned member_order[kMaxMembers];
  Sum member_weight[kMaxMembers];
  unsigned reduced[2][kWarps];
  Threshold<Sum> found;
};

// A row of scores, of which a thread has kTogether on their way at a time.
template <int kTogether>
struct RowOfScores {
  const float* scores;
  int begin, end;

  // visit(score) for this thread's.
  template <int kThreads, typename Visit>
  __device__ void for_each(const Visit& visit) const {
#pragma unroll 1
    for (int first = begin + static_cast<int>(threadIdx.x); first < end; first += kTogether * kThreads) {
      float some[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) some[i] = scores[min(first + i * kThreads, end - 1)];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i * kThreads < end) visit(some[i]);
      }
    }
  }
};
using ScoreRow = RowOfScores<4>;  // in shared or device memory
using HeldRow = RowOfScores<1>;   // in shared memory, by many warps: the shortest code

// Before the first search, with a barrier after it.
template <int kThreads, typename Sum>
__device__ void clear_bins(ThresholdShared<kThreads, Sum>& shared) {
  for (int i = static_cast<int>(threadIdx.x); i < kThresholdBins; i += kThreads) {
    shared.low[i] = 0;
    if constexpr (sizeof(Sum) == 8) shared.high[i] = 0;
  }
}

template <typename Sum>
__device__ Sum sum_through_lane(Sum value) {
  const int lane = this_lane();
#pragma unroll
  for (int step = 1; step < static_cast<int>(kWarpThreads); step *= 2) {
    const Sum before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += before;
  }
  return value;
}
__device__ inline unsigned sum_of_lanes(unsigned value) {
  return __reduce_add_sync(kAllLanes, value);
}
// In parts whose sums over a warp stay under 2^32.
__device__ inline std::uint64_t sum_of_lanes(std::uint64_t value) {
  constexpr int kPartBits = 27;
  std::uint64_t sum = 0;
#pragma unroll
  for (int shift = 0; shift < 64; shift += kPartBits) {
    const auto part = static_cast<unsigned>(value >> shift) % (1U << kPartBits);
    sum += std::uint64_t{__reduce_add_sync(kAllLanes, part)} << shift;
  }
  return sum;
}

// The largest of all threads' `first` and of their `second`, in every thread. A barrier must lie between two calls.
template <int kThreads, typename Sum>
__device__ uint2 block_max(ThresholdShared<kThreads, Sum>& shared, unsigned first, unsigned second) {
  first = __reduce_max_sync(kAllLanes, first);
  second = __reduce_max_sync(kAllLanes, second);
  if (this_lane() == 0) {
    shared.reduced[0][this_warp()] = first;
    shared.reduced[1][this_warp()] = second;
  }
  __syncthreads();
  const int of = this_lane() % ThresholdShared<kThreads, Sum>::kWarps;
  return {__reduce_max_sync(kAllLanes, shared.reduced[0][of]), __reduce_max_sync(kAllLanes, shared.reduced[1][of])};
}
template <int kThreads, typename Sum>
__device__ unsigned block_sum(ThresholdShared<kThreads, Sum>& shared, unsigned value) {
  value = __reduce_add_sync(kAllLanes, value);
  if (this_lane() == 0) shared.reduced[0][this_warp()] = value;
  __syncthreads();
  const bool has = this_lane() < ThresholdShared<kThreads, Sum>::kWarps;
  return __reduce_add_sync(kAllLanes, has ? shared.reduced[0][this_lane()] : 0U);
}

template <int kThreads, typename Sum>
__device__ void add_weight(ThresholdShared<kThreads, Sum>& shared, int bin, Sum weight) {
  const auto low = static_cast<unsigned>(weight);
  if constexpr (sizeof(Sum) == 4) {
    atomicAdd(&shared.low[bin], low);
  } else {
    auto high = static_cast<unsigned>(weight >> 32);
    if (low != 0) {
      const unsigned before = atomicAdd(&shared.low[bin], low);
      if (before + low < before) ++high;
    }
    if (high != 0) atomicAdd(&shared.high[bin], high);
  }
}

// Leaves in `shared` the bin in which the sum from bin 0 on reaches needed_of(sum of all), and what is needed of that
// bin; false where all together weigh less. Empties the bins.
template <int kThreads, typename Sum, typename Needed>
__device__ bool choose_bin(ThresholdShared<kThreads, Sum>& shared, const Needed& needed_of) {
  // Few warps: with all of them most instructions would be the sums over warps.
  constexpr int kChoosers = 256;
  constexpr int kOwn = kThresholdBins / kChoosers;
  constexpr int kWarps = kChoosers / static_cast<int>(kWarpThreads);
  static_assert(kChoosers <= kThreads);
  const bool chooses = threadIdx.x < kChoosers;
  const int first = static_cast<int>(threadIdx.x) * kOwn;
  Sum of_bin[kOwn] = {};
  Sum through = 0;  // of this thread's bins and all before in its warp
  if (chooses) {
    const auto take = [&](unsigned* bins, int shift) {
#pragma unroll
      for (int i = 0; i < kOwn; i += 4) {
        auto* four = reinterpret_cast<uint4*>(bins + first + i);
        const uint4 sums = *four;
        *four = {};
        of_bin[i] += Sum{sums.x} << shift;
        of_bin[i + 1] += Sum{sums.y} << shift;
        of_bin[i + 2] += Sum{sums.z} << shift;
        of_bin[i + 3] += Sum{sums.w} << shift;
      }
    };
    take(shared.low, 0);
    if constexpr (sizeof(Sum) == 8) take(shared.high, 32);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) through += of_bin[i];
    through = sum_through_lane(through);
    if (this_lane() == kWarpThreads - 1) shared.of_warp[this_warp()] = through;
    if (threadIdx.x == 0) shared.members = 0;
  }
  // Of the whole block: behind a barrier of the choosers alone racecheck no longer sees the block's.
  __syncthreads();
  if (chooses) {
    Sum sum = through;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum -= of_bin[i];
    Sum total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const Sum of_warp = shared.of_warp[warp];
      if (warp < this_warp()) sum += of_warp;
      total += of_warp;
    }
    const Sum needed = needed_of(total);
    if (needed > total) {
      if (threadIdx.x == 0) shared.bin = kThresholdBins;
    } else if (sum < needed) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (sum < needed && needed <= sum + of_bin[i]) {
          shared.bin = first + i;
          shared.needed = needed - sum;
        }
        sum += of_bin[i];
      }
    }
  }
  __syncthreads();
  return shared.bin != kThresholdBins;
}

// Lists the scores that `chosen` names; false where they are too many for that. After choose_bin().
template <int kThreads, typename Sum, typename Row, typename Weight, typename Chosen>
__device__ bool list_members(ThresholdShared<kThreads, Sum>& shared, const Row& row, const Weight& weight,
                             const Chosen& chosen) {
  constexpr int kMaxMembers = ThresholdShared<kThreads, Sum>::kMaxMembers;
  row.for_each<kThreads>([&](float score) {
    if (!chosen(score)) return;
    const Sum weighs = weight(score);
    if (weighs == 0) return;
    const int place = atomicAdd(&shared.members, 1);
    if (place >= kMaxMembers) return;
    shared.member_order[place] = order_of(score);
    shared.member_weight[place] = weighs;
  });
  __syncthreads();
  return shared.members <= kMaxMembers;
}

// The threshold among the listed scores, a thread comparing one with all.
template <int kThreads, typename Sum>
__device__ Threshold<Sum> compare_members(ThresholdShared<kThreads, Sum>& shared) {
  const int members = shared.members;
  if (static_cast<int>(threadIdx.x) < members) {
    const Sum needed = shared.needed;
    const unsigned order = shared.member_order[threadIdx.x];
    Sum above = 0;
    Sum equal = 0;
#pragma unroll 4
    for (int other = 0; other < members; ++other) {
      const Sum weight = shared.member_weight[other];
      if (shared.member_order[other] > order) above += weight;
      if (shared.member_order[other] == order) equal += weight;
    }
    // Members of one order all write the same.
    if (above < needed && needed <= above + equal) shared.found = {order, needed - above};
  }
  __syncthreads();
  return shared.found;
}

// Where the chosen bin, of scores that `in_bin` names, holds more than are compared: the range of their orders is cut
// into bins in turn. Seldom needed, and therefore code of its own: what always runs lies close together
// (docs/kernels.md, "Code").
template <int kThreads, typename Sum, typename Row, typename Weight, typename InBin>
__noinline__ __device__ Threshold<Sum> search_in_bin(ThresholdShared<kThreads, Sum>& shared, Row row, Weight weight,
                                                     InBin in_bin) {
  unsigned largest = 0;
  unsigned least = 0;  // the complement of the order
  row.for_each<kThreads>([&](float score) {
    if (!in_bin(score) || weight(score) == 0) return;
    largest = max(largest, order_of(score));
    least = max(least, ~order_of(score));
  });
  const uint2 range = block_max(shared, largest, least);
  largest = range.x;
  least = ~range.y;
  while (least < largest) {
    // (largest - least) >> shift is under kThresholdBins.
    const int bits = 32 - __clz(static_cast<int>(largest - least));
    const int shift = max(0, bits - ThresholdShared<kThreads, Sum>::kBinBits);
    const auto in_range = [&](float score) { return order_of(score) >= least && order_of(score) <= largest; };
    row.for_each<kThreads>([&](float score) {
      if (!in_range(score)) return;
      add_weight(shared, static_cast<int>((largest - order_of(score)) >> shift), static_cast<Sum>(weight(score)));
    });
    const Sum needed = shared.needed;
    __syncthreads();
    choose_bin(shared, [needed](Sum) { return needed; });
    largest -= static_cast<unsigned>(shared.bin) << shift;
    least = max(least, largest - min(largest, (1U << shift) - 1));
    if (least < largest && list_members(shared, row, weight, in_range)) return compare_members(shared);
  }
  return {least, shared.needed};
}

//   weight(score)           also summed over all scores in Sum
//   first_bin(score)        in [0, kThresholdBins), no larger for a better score
//   needed_of(sum of all)   at least 1
// `weight` and `first_bin` hold what they know by value. The bins must be clear and a barrier must lie after that; they
// are left clear, and a barrier must lie before the next search. All threads call it and get the same.
template <int kThreads, typename Sum, typename Row, typename Weight, typename FirstBin, typename Needed>
__device__ Threshold<Sum> find_threshold(ThresholdShared<kThreads, Sum>& shared, const Row& row, const Weight& weight,
                                         const FirstBin& first_bin, const Needed& needed_of) {
  row.for_each<kThreads>([&](float score) {
    const Sum weighs = weight(score);
    if (weighs != 0) add_weight(shared, first_bin(score), weighs);
  });
  __syncthreads();
  if (!choose_bin(shared, needed_of)) return {};
  const auto in_bin = [first_bin, bin = shared.bin](float score) { return first_bin(score) == bin; };
  if (list_members(shared, row, weight, in_bin)) return compare_members(shared);
  return search_in_bin(shared, row, weight, in_bin);
}

}  // namespace vesper::cuda
