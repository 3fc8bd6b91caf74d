// The device half that dense decode attention and attention to a selection share: a block attends with one group's
// heads to one split of the keys. Its four warps deal out the split's pieces of 16 keys (attention/decode_pieces.cuh).
// Each has its own ring of pieces and its own maximum, sum and output, and waits for no other until they merge at the
// end.
// Where the splits of a (sequence, KV head) fit one thread-block cluster, its blocks merge through distributed shared
// memory: each sends the others their channels of its part, and waits for what it is sent, not for a barrier. Else the
// parts go to device memory and a second kernel merges them, in the same order and with the same roundings. In flight:
// 4 warps x 2 of 3 pieces of 8 KiB at head_dim 128: 64 KiB a block. Source: Dao et al., arXiv 2205.14135;
// "Flash-Decoding for long-context inference", 2023 (split and merge).
#pragma once

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstddef>

#include "attention/attend_decode.h"
#include "attention/decode_pieces.cuh"
#include "engine/core/bulk_copy.cuh"
#include "engine/core/cluster.cuh"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {

// A warp's output as it is merged through its ring: four floats of padding spread the heads over the banks.
template <int kHeadDim>
inline constexpr int kMergeStride = kHeadDim + 4;
// What the blocks of a cluster send to one behind its rings: output [split][its channels], log-sum-exp [split][head].
template <int kHeadDim>
inline constexpr int kReceivedBytes = 4 * (kMaxGroup * kHeadDim + 4 * kMaxCluster + kMaxCluster * kMaxGroup);
// As much of it as a group needs.
inline int received_bytes(int head_dim, int group, int cluster) {
  const int run = (group * head_dim / 4 + cluster - 1) / cluster;
  return 16 * ((run * cluster + (group * cluster + 3) / 4));
}

// Whether the device, and this build's code for it, knows clusters.
bool has_clusters();

// The blocks of a cluster where every (sequence, KV head) has so many splits: all of them, or 1 where they do not fit,
// or where the device is so full that clusters would share multiprocessors while others idle.
inline int cluster_of(const AttentionShape& shape, int splits, int seqs) {
  const bool room = 4LL * shape.kv_heads * splits * seqs <= 3LL * multiprocessor_count();
  return splits <= kMaxCluster && room && has_clusters() ? splits : 1;
}

// One block a split.
template <int kHeadDim>
Dims decode_dims(const AttentionShape& shape, int splits, int seqs) {
  const int cluster = cluster_of(shape, splits, seqs);
  const int received_bytes = cluster > 1 ? kReceivedBytes<kHeadDim> : 0;
  return {
      .grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(splits), static_cast<unsigned>(seqs)),
      .block = dim3(kDecodeThreads),
      .shared_bytes = static_cast<std::size_t>(kDecodeWarps * kRingBytes<kHeadDim> + received_bytes),
      .overlap = true,
      .cluster = dim3(1, static_cast<unsigned>(cluster))};
}

// What is cut among the blocks of a cluster when they merge: the group's outputs in vectors of four channels, a run of
// neighbouring ones to a block. Known before the launch, since a division takes as long as half a merge.
struct MergeRuns {
  static constexpr int kInverseBits = 20;
  int vectors = 0, run = 0;
  unsigned inverse = 0;  // of run, rounded up, in that many bits

  MergeRuns() = default;
  MergeRuns(int head_dim, int group, int blocks) : vectors(group * head_dim / 4), run((vectors + blocks - 1) / blocks) {
    assert(vectors <= 512);  // vector * (error of inverse, under run) stays under 2^20
    inverse = ((1U << kInverseBits) + static_cast<unsigned>(run) - 1) / static_cast<unsigned>(run);
  }
  // The block that has a vector.
  [[nodiscard]] __device__ int block_of(int vector) const {
    return static_cast<int>(static_cast<unsigned>(vector) * inverse >> kInverseBits);
  }
};

template <typename T>
struct DecodeArgs {
  TensorView<const T, 3> q;  // [seqs, heads, head_dim]
  TensorView<T, 3> out;
  const T* k = nullptr;  // [pages, kv_heads, page_tokens, head_dim] tiles
  const T* v = nullptr;
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 2> page_table;
  LengthRange lengths;
  int splits = 1;
  SplitPartials partials;
  TensorView<float, 2> lse;
  int group = 0;
  int page_shift = 0;       // page_tokens = 1 << page_shift
  int page_elements = 0;    // of one page, over its KV heads
  float scale_log2 = 0.0F;  // scale * log2(e): scores become exponents of 2
  MergeRuns merge;          // of a cluster with a block for each split
};

template <typename T>
DecodeArgs<T> decode_args(const AttentionShape& shape, const TensorRef& q, const LayerKv& kv, const Batch& batch,
                          LengthRange lengths, int splits, const SplitPartials& partials, const TensorRef& out,
                          TensorView<float, 2> lse) {
  assert(q.dtype == kv.k.dtype && out.dtype == kv.k.dtype);
  assert(q.shape[1] == shape.heads * shape.head_dim && kv.k.shape[2] == shape.page_tokens);
  assert(shape.scale > 0.0F);
  DecodeArgs<T> args;
  args.q = TensorView<const T, 3>(static_cast<const T*>(q.data), q.shape[0], shape.heads, shape.head_dim);
  args.out = TensorView<T, 3>(static_cast<T*>(out.data), out.shape[0], shape.heads, shape.head_dim);
  args.k = static_cast<const T*>(kv.k.data);
  args.v = static_cast<const T*>(kv.v.data);
  args.kv_len = batch.kv_len;
  args.page_table = batch.page_table;
  args.lengths = lengths;
  args.splits = splits;
  args.partials = partials;
  args.lse = lse;
  args.group = shape.group();
  args.merge = MergeRuns(shape.head_dim, shape.group(), splits);
  args.page_shift = std::countr_zero(static_cast<unsigned>(shape.page_tokens));
  args.page_elements = shape.kv_heads * shape.page_tokens * shape.head_dim;
  args.scale_log2 = shape.scale * kLog2E;
  return args;
}

// What a block attends for, and where its part goes: partial results are rows of head_dim channels, and beside them
// log-sum-exps, one for each head of the group.
struct BlockPart {
  int s;
  int kv_head;
  int split;         // of the list or sequence
  int splits;        // 1: the result is the output
  std::int64_t row;  // of the group's first head
  int row_stride;    // to the next head's
};
// Of a grid (kv_heads, splits, seqs).
template <typename T>
__device__ BlockPart part_of_grid(const DecodeArgs<T>& args) {
  const auto s = static_cast<int>(blockIdx.z);
  const auto kv_head = static_cast<int>(blockIdx.x);
  const auto split = static_cast<int>(blockIdx.y);
  const std::int64_t heads = args.q.shape(1);
  return {.s = s,
          .kv_head = kv_head,
          .split = split,
          .splits = args.splits,
          .row = (s * heads + std::int64_t{kv_head} * args.group) * args.splits + split,
          .row_stride = args.splits};
}

// Says that split blockIdx.y of sequence blockIdx.z is empty for the group's heads.
template <typename T>
__device__ void leave_empty(const DecodeArgs<T>& args) {
  if (static_cast<int>(threadIdx.x) < args.group) {
    const auto h = blockIdx.x * static_cast<unsigned>(args.group) + threadIdx.x;
    args.partials.lse(blockIdx.z, h, blockIdx.y) = -INFINITY;
  }
}

template <typename T, int kHeadDim, int kTiles>
__device__ Queries<kHeadDim, kTiles> load_queries(const DecodeArgs<T>& args, const BlockPart& part) {
  Queries<kHeadDim, kTiles> q = {};
  const int lane = this_lane();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int head = lane / 4 + kTileHeads * tile;
    if (head >= args.group) continue;
    const T* from = &args.q(part.s, part.kv_head * args.group + head, 2 * (lane % 4));
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      q.b[tile][d / 16][0] = *reinterpret_cast<const unsigned*>(from + d);
      q.b[tile][d / 16][1] = *reinterpret_cast<const unsigned*>(from + d + 8);
    }
  }
  return q;
}

// out = sum_i e^{lse_i} out_i / sum_i e^{lse_i} over parts, in an order that does not depend on who merges them: lane r
// of kMergeLanes takes the parts r, r + kMergeLanes, ..., then the lanes are joined in turn.
inline constexpr int kMergeLanes = 4;
struct MergeLane {
  float4 out = {};
  float sum = 0.0F;
  __device__ void add(float weight, float4 part) {
    out = {fmaf(weight, part.x, out.x), fmaf(weight, part.y, out.y), fmaf(weight, part.z, out.z),
           fmaf(weight, part.w, out.w)};
    sum += weight;
  }
  __device__ void join(const MergeLane& next) {
    out = {out.x + next.out.x, out.y + next.out.y, out.z + next.out.z, out.w + next.out.w};
    sum += next.sum;
  }
  // What the lane of the warp `step` further on has.
  [[nodiscard]] __device__ MergeLane of_lane_behind(int step) const {
    const auto there = [step](float x) { return __shfl_down_sync(kAllLanes, x, static_cast<unsigned>(step)); };
    return {{there(out.x), there(out.y), there(out.z), there(out.w)}, there(sum)};
  }
  __device__ float4 mean() const {
    const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
    return {out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse};
  }
};
// What log-sum-exps are taken relative to: their largest, and 0 where there is no key.
__device__ inline float merge_shift(float largest) {
  return largest == -INFINITY ? 0.0F : largest;
}
template <typename T>
__device__ void store_merged(TensorView<T, 3> out, TensorView<float, 2> lse, std::int64_t s, std::int64_t h, int d,
                             const MergeLane& merged, float shift) {
  const float4 mean = merged.mean();
  *reinterpret_cast<uint2*>(&out(s, h, d)) = {narrow_pair<T>(mean.x, mean.y), narrow_pair<T>(mean.z, mean.w)};
  if (d == 0 && lse.data() != nullptr) lse(s, h) = shift + logf(merged.sum);
}

// Writes the warps' results into their rings, and the maxima and sums.
template <int kHeadDim, int kTiles>
__device__ void lay_out_warps(const Running<kHeadDim, kTiles>& running, float* rings,
                              float (&maxima)[kDecodeWarps][kMaxGroup], float (&sums)[kDecodeWarps][kMaxGroup]) {
  constexpr int kRingFloats = kRingBytes<kHeadDim> / 4;
  static_assert(kMaxGroup * kMergeStride<kHeadDim> <= kRingFloats);
  const int lane = this_lane();
  const int warp = this_warp();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = kTileHeads * tile + 2 * (lane % 4) + i;
      float* to = rings + warp * kRingFloats + head * kMergeStride<kHeadDim> + lane / 4;
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        to[16 * d] = running.out[tile][d][i];
        to[16 * d + 8] = running.out[tile][d][i + 2];
      }
      const float sum = keys_sum(running.sum[tile][i]);
      if (lane / 4 == 0) {
        maxima[warp][head] = running.max[tile][i];
        sums[warp][head] = sum;
      }
    }
  }
}

// Readies `told`, a barrier in shared memory that says when this block has all that the cluster sends it. Before the
// block first says to the cluster that it has begun.
template <typename T>
__device__ void expect_parts(const DecodeArgs<T>& args, std::uint64_t& told) {
  if (threadIdx.x != 0) return;
  const MergeRuns& cut = args.merge;
  const int own = max(0, min(cut.run, cut.vectors - static_cast<int>(blockIdx.y) * cut.run));
  make_barrier(shared_address(&told), 1);
  publish_barriers();
  arrive_expecting(shared_address(&told), static_cast<unsigned>(cluster_blocks() * (16 * own + 4 * args.group)));
}

// Merges the warps' results, weighted by their sums relative to the common maximum, then those of the cluster, and
// writes the block's heads: the output, or where other clusters or blocks have other splits, this split's part.
// `told`: of expect_parts; all blocks of the cluster have begun, and what lies behind their rings may be written.
template <typename T, int kHeadDim, int kTiles>
__device__ void finish_split(const DecodeArgs<T>& args, const BlockPart& own, const Running<kHeadDim, kTiles>& running,
                             float* rings, std::uint64_t& told) {
  constexpr int kRingFloats = kRingBytes<kHeadDim> / 4;
  constexpr int kRowVectors = kHeadDim / 4;
  __shared__ float maxima[kDecodeWarps][kMaxGroup];
  __shared__ float sums[kDecodeWarps][kMaxGroup];
  lay_out_warps<kHeadDim, kTiles>(running, rings, maxima, sums);
  __syncthreads();

  const int first_head = own.kv_head * args.group;
  const int split = own.split;
  const int vectors = args.group * kRowVectors;
  // Of a cluster, the block with split i gives out the i-th run.
  const int cluster = cluster_blocks();
  const int run = args.merge.run;
  float4* received = reinterpret_cast<float4*>(rings + kDecodeWarps * kRingFloats);
  float* received_lse = reinterpret_cast<float*>(received + run * cluster);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += static_cast<int>(kDecodeThreads)) {
    const int row = i / kRowVectors;
    const int d = i % kRowVectors * 4;
    float max = maxima[0][row];
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) max = fmaxf(max, maxima[w][row]);
    const float shift = merge_shift(max);
    float4 out = {};
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = exp2_approx(maxima[w][row] - shift);
      const auto* part = reinterpret_cast<const float4*>(rings + w * kRingFloats + row * kMergeStride<kHeadDim> + d);
      out = {fmaf(weight, part->x, out.x), fmaf(weight, part->y, out.y), fmaf(weight, part->z, out.z),
             fmaf(weight, part->w, out.w)};
      sum = fmaf(weight, sums[w][row], sum);
    }
    const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
    out = {out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse};
    const float lse = fmaf(shift, kLn2, logf(sum));
    const int h = first_head + row;
    if (cluster > 1) {
      const int block = args.merge.block_of(i);
      const auto to = static_cast<unsigned>(block);
      send(in_block(shared_address(received + split * run + i - block * run), to),
           uint4{__float_as_uint(out.x), __float_as_uint(out.y), __float_as_uint(out.z), __float_as_uint(out.w)},
           in_block(shared_address(&told), to));
      if (d / 4 < cluster) {
        const auto all = static_cast<unsigned>(d / 4);
        send(in_block(shared_address(received_lse + split * args.group + row), all), __float_as_uint(lse),
             in_block(shared_address(&told), all));
      }
    } else if (own.splits > 1) {
      const std::int64_t to = own.row + std::int64_t{row} * own.row_stride;
      *reinterpret_cast<float4*>(args.partials.out.data() + to * kHeadDim + d) = out;
      if (d == 0) args.partials.lse.data()[to] = lse;
    } else {
      *reinterpret_cast<uint2*>(&args.out(own.s, h, d)) = {narrow_pair<T>(out.x, out.y), narrow_pair<T>(out.z, out.w)};
      if (d == 0 && args.lse.data() != nullptr) args.lse(own.s, h) = lse;
    }
  }
  if (cluster == 1) return;
  wait_phase(shared_address(&told), 0);
  // kMergeLanes threads merge a vector, a MergeLane each.
  const int lane = this_lane() % kMergeLanes;
#pragma unroll 1
  for (int first = 0; first < run; first += static_cast<int>(kDecodeThreads) / kMergeLanes) {
    const int wanted = first + static_cast<int>(threadIdx.x) / kMergeLanes;
    const int i = min(wanted, run - 1);  // who has none repeats the last
    const int vector = min(split * run + i, vectors - 1);
    const int row = vector / kRowVectors;
    float max = -INFINITY;
#pragma unroll 1
    for (int from = lane; from < cluster; from += kMergeLanes) {
      max = fmaxf(max, received_lse[from * args.group + row]);
    }
#pragma unroll
    for (int step = 1; step < kMergeLanes; step *= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, step));
    const float shift = merge_shift(max);
    MergeLane mine;
#pragma unroll 1
    for (int from = lane; from < cluster; from += kMergeLanes) {
      const float weight = expf(received_lse[from * args.group + row] - shift);
      if (weight != 0.0F) mine.add(weight, received[from * run + i]);
    }
    MergeLane merged = mine;
#pragma unroll
    for (int r = 1; r < kMergeLanes; ++r) merged.join(mine.of_lane_behind(r));
    if (lane == 0 && wanted < run && split * run + wanted < vectors) {
      store_merged(args.out, args.lse, own.s, first_head + row, vector % kRowVectors * 4, merged, shift);
    }
  }
}

}  // namespace vesper::cuda
