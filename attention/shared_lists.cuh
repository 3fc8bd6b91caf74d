// How the blocks of one launch share out lists of very different lengths: list l gets max(1, round(count_l / e)) parts
// of equal length, e = max(min_entries, all entries / spare blocks), and block i attends for part i, counted through
// the lists in order. Counts lie on the device and the grid is fixed when a step is captured: one block looks at all
// counts (plan_parts) and notes the part of each. A part is at most 1.5 e long; parts are no more than lists and spare
// blocks together.
//
// The last block to finish a part of a list merges the list's parts, in their order: which block that is does not show.
// Source: ours; parts of work by prefix sums as in Osama et al., "Stream-K", arXiv 2301.03598.
#pragma once

#include "attention/attend_decode.cuh"
#include "attention/attend_selected.h"
#include "attention/last_block.cuh"

namespace vesper::cuda {

struct SharedLists {
  TensorView<const std::int32_t, 2> count;  // [seqs, kv_heads]
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<std::int32_t, 2> tickets;  // [seqs, kv_heads]
  int4* parts = nullptr;                // of each block: sequence, KV head, split, splits; 0 splits: none
  LengthRange lengths;                  // lists of other sequences are not there
  int blocks = 0;
  int spare = 0;  // blocks beyond one a list, at most
  int min_entries = 0;
};

inline constexpr int kPlanThreads = 1024;

// The sum of the threads' `own`, and of those of the threads before this one. All threads of a block call it.
struct BlockSum {
  unsigned before, total;
};
__device__ inline BlockSum sum_over_block(unsigned own) {
  constexpr int kWarps = kPlanThreads / static_cast<int>(kWarpThreads);
  __shared__ unsigned of_warp[kWarps];
  unsigned through = own;
#pragma unroll
  for (int step = 1; step < static_cast<int>(kWarpThreads); step *= 2) {
    const unsigned below = __shfl_up_sync(kAllLanes, through, step);
    if (this_lane() >= step) through += below;
  }
  __syncthreads();  // the last sum's readers are done
  if (this_lane() == static_cast<int>(kWarpThreads) - 1) of_warp[this_warp()] = through;
  __syncthreads();
  const unsigned other = of_warp[this_lane() % kWarps];
  const unsigned before = __reduce_add_sync(kAllLanes, this_lane() < this_warp() ? other : 0U);
  return {.before = before + through - own, .total = __reduce_add_sync(kAllLanes, other)};
}

// One block.
static __global__ void __launch_bounds__(kPlanThreads) plan_parts(const __grid_constant__ SharedLists shared) {
  __shared__ int first_part[kMostSharedLists + 1];  // of each list; before that its count, -1 where it is not there
  let_next_start();
  wait_for_previous();
  const auto kv_heads = static_cast<int>(shared.count.shape(1));
  const auto lists = static_cast<int>(shared.count.size());
  unsigned entries = 0;
  for (int l = static_cast<int>(threadIdx.x); l < lists; l += kPlanThreads) {
    const int count = shared.lengths.contains(shared.kv_len(l / kv_heads)) ? shared.count.data()[l] : -1;
    first_part[l] = count;
    entries += static_cast<unsigned>(max(count, 0));
  }
  const unsigned total = sum_over_block(entries).total;
  const auto spare = static_cast<unsigned>(shared.spare);
  const unsigned even = max(static_cast<unsigned>(shared.min_entries), total / spare + (total % spare != 0 ? 1U : 0U));
  const auto parts_of = [&](int count) {
    return count < 0 ? 0U : max(1U, (static_cast<unsigned>(count) + even / 2) / even);
  };

  const int own_lists = (lists + kPlanThreads - 1) / kPlanThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * own_lists, lists);
  const int end = min(begin + own_lists, lists);
  unsigned own = 0;
  for (int l = begin; l < end; ++l) own += parts_of(first_part[l]);
  const BlockSum parts = sum_over_block(own);
  unsigned part = parts.before;
  for (int l = begin; l < end; ++l) {
    const unsigned of_list = parts_of(first_part[l]);
    first_part[l] = static_cast<int>(part);
    part += of_list;
  }
  if (threadIdx.x == 0) first_part[lists] = static_cast<int>(parts.total);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < shared.blocks; i += kPlanThreads) {
    if (i >= static_cast<int>(parts.total)) {
      shared.parts[i] = {};
      continue;
    }
    int low = 0;  // the last list that begins at i or before; lists that are not there begin where the next does
    for (int high = lists; high - low > 1;) {
      const int middle = (low + high) / 2;
      (first_part[middle] <= i ? low : high) = middle;
    }
    shared.parts[i] = {low / kv_heads, low % kv_heads, i - first_part[low], first_part[low + 1] - first_part[low]};
  }
}

// The part of block blockIdx.x, of `group` rows; its `splits` are 0 where there are fewer parts.
__device__ inline BlockPart planned_part(const SharedLists& shared, int group) {
  const int4 part = shared.parts[blockIdx.x];
  return {.s = part.x,
          .kv_head = part.y,
          .split = part.z,
          .splits = part.w,
          .row = std::int64_t{blockIdx.x} * group,
          .row_stride = 1};
}

// Merges the parts of this block's list where it is the last of them. `memory`: shared.
template <typename T, int kHeadDim>
__device__ void merge_if_last(const DecodeArgs<T>& args, const SharedLists& shared, const BlockPart& own,
                              unsigned char* memory) {
  if (!is_last_block(&shared.tickets(own.s, own.kv_head), own.splits)) return;
  constexpr int kRowThreads = kHeadDim / 4;
  constexpr int kTeams = static_cast<int>(kDecodeThreads) / (kMergeLanes * kRowThreads);  // a head each
  using Team = MergeLane[kMergeLanes][kRowThreads];
  auto* merged = reinterpret_cast<Team*>(memory);
  const int team = static_cast<int>(threadIdx.x) / (kMergeLanes * kRowThreads);
  const int lane_row = static_cast<int>(threadIdx.x) / kRowThreads % kMergeLanes;
  const int column = static_cast<int>(threadIdx.x) % kRowThreads;
  const std::int64_t first_row = own.row - std::int64_t{own.split} * args.group;
  for (int first_head = 0; first_head < args.group; first_head += kTeams) {
    const int head = first_head + team;
    float shift = 0.0F;
    if (head < args.group) {
      const float* lse = args.partials.lse.data() + first_row + head;
      float largest = -INFINITY;
      for (int i = this_lane(); i < own.splits; i += static_cast<int>(kWarpThreads)) {
        largest = fmaxf(largest, __ldcg(lse + std::int64_t{i} * args.group));
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
      shift = merge_shift(largest);
      MergeLane lane;
#pragma unroll 4
      for (int i = lane_row; i < own.splits; i += kMergeLanes) {
        const std::int64_t row = first_row + std::int64_t{i} * args.group + head;
        const float weight = expf(__ldcg(args.partials.lse.data() + row) - shift);
        lane.add(weight, __ldcg(reinterpret_cast<const float4*>(args.partials.out.data() + row * kHeadDim) + column));
      }
      merged[team][lane_row][column] = lane;
    }
    __syncthreads();
    if (head < args.group && lane_row == 0) {
      MergeLane lane = merged[team][0][column];
#pragma unroll
      for (int r = 1; r < kMergeLanes; ++r) lane.join(merged[team][r][column]);
      store_merged(args.out, args.lse, own.s, own.kv_head * args.group + head, 4 * column, lane, shift);
    }
    __syncthreads();
  }
}

}  // namespace vesper::cuda
