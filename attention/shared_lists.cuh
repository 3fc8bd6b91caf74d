// How the blocks of one launch share out lists of very different lengths: list l gets max(1, round(count_l / e)) parts
// of equal length, e = max(min_entries, all entries / spare blocks), and block i attends for part i, counted through
// the lists in order. Counts lie on the device and the grid is fixed when a step is captured, so every block finds its
// part itself: two looks at the counts, through shared memory, some 1000 cycles. A part is at most 1.5 e long; parts
// are no more than lists and spare blocks together.
//
// The last block to finish a part of a list merges the list's parts, in their order: which block that is does not show.
// Source: ours; parts of work by prefix sums as in Osama et al., "Stream-K", arXiv 2301.03598.
#pragma once

#include "attention/attend_decode.cuh"
#include "attention/last_block.cuh"

namespace vesper::cuda {

struct SharedLists {
  TensorView<const std::int32_t, 2> count;  // [seqs, kv_heads]
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<std::int32_t, 2> tickets;  // [seqs, kv_heads]
  LengthRange lengths;                  // lists of other sequences are not there
  int spare = 0;                        // blocks beyond one a list
  int min_entries = 0;
};

// The sum of a block's `own`, and of those of the threads before this one. All threads of the block call it.
struct BlockSum {
  unsigned before, total;
};
__device__ inline BlockSum block_sum(unsigned own) {
  __shared__ unsigned of_warp[kDecodeWarps];
  unsigned through = own;
#pragma unroll
  for (int step = 1; step < static_cast<int>(kWarpThreads); step *= 2) {
    const unsigned below = __shfl_up_sync(kAllLanes, through, step);
    if (this_lane() >= step) through += below;
  }
  __syncthreads();  // the last sum's readers are done
  if (this_lane() == static_cast<int>(kWarpThreads) - 1) of_warp[this_warp()] = through;
  __syncthreads();
  BlockSum sum{.before = through - own, .total = 0};
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) {
    if (w < this_warp()) sum.before += of_warp[w];
    sum.total += of_warp[w];
  }
  return sum;
}

// The part of block blockIdx.x, or false where there are fewer. `memory`: shared, kMostSharedLists numbers, free again
// afterwards. `group`: rows of a part.
__device__ inline bool find_part(const SharedLists& shared, int group, std::int32_t* memory, BlockPart& part) {
  __shared__ int found[3];
  const auto kv_heads = static_cast<int>(shared.count.shape(1));
  const auto lists = static_cast<int>(shared.count.size());
  unsigned entries = 0;
  for (int l = static_cast<int>(threadIdx.x); l < lists; l += static_cast<int>(kDecodeThreads)) {
    const int count = shared.lengths.contains(shared.kv_len(l / kv_heads)) ? shared.count.data()[l] : -1;
    memory[l] = count;
    entries += static_cast<unsigned>(max(count, 0));
  }
  const unsigned total = block_sum(entries).total;
  const auto spare = static_cast<unsigned>(shared.spare);
  const unsigned even = max(static_cast<unsigned>(shared.min_entries), total / spare + (total % spare != 0 ? 1U : 0U));
  const auto parts_of = [&](int l) {
    const int count = memory[l];
    return count < 0 ? 0U : max(1U, (static_cast<unsigned>(count) + even / 2) / even);
  };

  const int own_lists = (lists + static_cast<int>(kDecodeThreads) - 1) / static_cast<int>(kDecodeThreads);
  const int begin = static_cast<int>(threadIdx.x) * own_lists;
  const int end = min(begin + own_lists, lists);
  unsigned own = 0;
  for (int l = begin; l < end; ++l) own += parts_of(l);
  const unsigned before = block_sum(own).before;
  const bool mine = blockIdx.x >= before && blockIdx.x < before + own;
  if (mine) {
    int l = begin;
    unsigned first = before;
    for (; first + parts_of(l) <= blockIdx.x; ++l) first += parts_of(l);
    found[0] = l;
    found[1] = static_cast<int>(blockIdx.x - first);
    found[2] = static_cast<int>(parts_of(l));
  }
  if (__syncthreads_or(static_cast<int>(mine)) == 0) return false;
  part = {.s = found[0] / kv_heads,
          .kv_head = found[0] % kv_heads,
          .split = found[1],
          .splits = found[2],
          .row = std::int64_t{blockIdx.x} * group,
          .row_stride = 1};
  return true;
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
