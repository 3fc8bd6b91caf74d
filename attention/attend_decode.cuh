// The device half that dense decode attention and attention to a selection share: a block attends with one group's
// heads to one split of the keys. Its four warps deal out the split's pieces of 16 keys. Each has its own ring of three
// pieces of K and V in shared memory and its own maximum, sum and output, and waits for no other until they merge at
// the end. The group's heads, filled up to 16 with zeros, are the rows of the tensor-core products; up to 8 heads the
// lower half of the rows is left out of everything but the products.
// In flight: 4 warps x 2 pieces x 8 KiB at head_dim 128, two blocks a multiprocessor on Hopper: 128 KiB. Rows that are
//   no keys are filled with zeros: what a page holds there may be NaN, and 0 * NaN is not 0.
// Source: Dao et al., arXiv 2205.14135; "Flash-Decoding for long-context inference", 2023 (split and merge).
#pragma once

#include <bit>
#include <cassert>

#include "attention/attend_decode.h"
#include "attention/mma.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr unsigned kDecodeThreads = kDecodeWarps * kWarpThreads;
inline constexpr int kPiece = 16;  // keys; divides a page
inline constexpr int kSlots = 3;   // of a warp's ring
inline constexpr int kHeads = 16;  // rows of the products
template <int kHeadDim>
inline constexpr int kTileBytes = kPiece * 2 * kHeadDim;
template <int kHeadDim>
inline constexpr int kSlotBytes = 2 * kTileBytes<kHeadDim>;  // K, then V
template <int kHeadDim>
inline constexpr int kRingBytes = kSlots* kSlotBytes<kHeadDim>;  // of a warp
// A warp's output as it is merged through its ring: eight floats of padding spread a column of rows over the banks.
template <int kHeadDim>
inline constexpr int kMergeStride = kHeadDim + 8;

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
  args.page_shift = std::countr_zero(static_cast<unsigned>(shape.page_tokens));
  args.page_elements = shape.kv_heads * shape.page_tokens * shape.head_dim;
  args.scale_log2 = shape.scale * kLog2E;
  return args;
}

// Says that split blockIdx.y of sequence blockIdx.z is empty for the group's heads.
template <typename T>
__device__ void leave_empty(const DecodeArgs<T>& args) {
  if (static_cast<int>(threadIdx.x) < args.group) {
    const auto h = blockIdx.x * static_cast<unsigned>(args.group) + threadIdx.x;
    args.partials.lse(blockIdx.z, h, blockIdx.y) = -INFINITY;
  }
}

// Queues the first `keys` rows of a piece that lies in one page, as they lie. `offset`: of its first element, in K and
// in V.
template <typename T, int kHeadDim>
__device__ void copy_piece(unsigned slot, const T* k, const T* v, std::int64_t offset, int keys) {
  constexpr unsigned kChunks = kHeadDim / kChunkElements;
#pragma unroll
  for (unsigned i = 0; i < kPiece * kChunks / kWarpThreads; ++i) {
    const unsigned chunk = threadIdx.x % kWarpThreads + i * kWarpThreads;
    const bool valid = static_cast<int>(chunk / kChunks) < keys;
    const std::int64_t at = offset + chunk * kChunkElements;
    copy_chunk_async(slot + chunk * kChunkBytes, k + at, valid);
    copy_chunk_async(slot + kTileBytes<kHeadDim> + chunk * kChunkBytes, v + at, valid);
  }
}

// The queries of the group's heads as the products' left side; rows are heads.
template <typename T, int kHeadDim, int kHalves>
__device__ void load_queries(const DecodeArgs<T>& args, unsigned (&q)[kHeadDim / 16][4]) {
  const int lane = this_lane();
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int row = lane / 4 + 8 * half;
    if (row >= args.group) continue;
    const T* from = &args.q(blockIdx.z, static_cast<int>(blockIdx.x) * args.group + row, 2 * (lane % 4));
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      q[d / 16][half] = *reinterpret_cast<const unsigned*>(from + d);
      q[d / 16][half + 2] = *reinterpret_cast<const unsigned*>(from + d + 8);
    }
  }
}

// What a warp carries over its pieces. kHalves: 1 where the group has at most 8 heads, which are rows r of the
// fragments; 2 adds rows r + 8. `sum` is over this lane's own columns until the end.
template <int kHeadDim, int kHalves>
struct Running {
  float max[kHalves];  // in exponents of 2
  float sum[kHalves];
  float out[kHeadDim / 8][4];
};

template <int kHeadDim, int kHalves>
__device__ Running<kHeadDim, kHalves> nothing_yet() {
  Running<kHeadDim, kHalves> running = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) running.max[half] = -INFINITY;
  return running;
}

// Products of the queries with a piece's keys: scores [16 heads, 16 keys] in two fragments of 8 keys each.
template <typename T, int kHeadDim>
__device__ void score_piece(float (&scores)[2][4], const unsigned (&q)[kHeadDim / 16][4], unsigned slot) {
  const unsigned keys = corner_block<kHeadDim, Quarters::kAcrossFirst>(slot, this_lane());
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned k[4];
    load_block(k, block_at<kHeadDim>(keys, 0, d));
    multiply_add<T>(scores[0], q[d / 16], k[0], k[1]);
    multiply_add<T>(scores[1], q[d / 16], k[2], k[3]);
  }
}

// The key of a piece that this lane's element i, 0 ... 7, of score_piece's fragments belongs to.
__device__ inline int key_of_score(int i) {
  return i / 4 * 8 + this_lane() % 4 * 2 + i % 2;
}

// Takes the keys from `keys` on out of the softmax.
__device__ inline void hide_keys_from(int keys, float (&scores)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (key_of_score(i) >= keys) scores[i / 4][i % 4] = -INFINITY;
  }
}

// Turns scores into weights and takes the piece's values with them. At least one score of a row is finite.
template <typename T, int kHeadDim, int kHalves>
__device__ void take_piece(Running<kHeadDim, kHalves>& running, float (&scores)[2][4], unsigned slot,
                           float scale_log2) {
  unsigned p[4] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    float* left = scores[0] + 2 * half;
    float* right = scores[1] + 2 * half;
    const float largest = row_max(fmaxf(fmaxf(left[0], left[1]), fmaxf(right[0], right[1])));
    const float max = fmaxf(running.max[half], largest * scale_log2);
    const float shrink = exp2_approx(running.max[half] - max);
    running.max[half] = max;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      left[e] = exp2_approx(fmaf(left[e], scale_log2, -max));
      right[e] = exp2_approx(fmaf(right[e], scale_log2, -max));
    }
    running.sum[half] = fmaf(running.sum[half], shrink, (left[0] + left[1]) + (right[0] + right[1]));
    p[half] = narrow_pair<T>(left[0], left[1]);
    p[half + 2] = narrow_pair<T>(right[0], right[1]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      running.out[n][2 * half] *= shrink;
      running.out[n][2 * half + 1] *= shrink;
    }
  }

  const unsigned values = corner_block<kHeadDim, Quarters::kDownFirst>(slot + kTileBytes<kHeadDim>, this_lane());
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned v[4];
    load_block_transposed(v, block_at<kHeadDim>(values, 0, d));
    multiply_add<T>(running.out[d / 8], p, v[0], v[1]);
    multiply_add<T>(running.out[d / 8 + 1], p, v[2], v[3]);
  }
}

// Merges the warps' results, weighted by their sums relative to the common maximum, and writes the block's heads: the
// output where there is one split, else this split's part.
template <typename T, int kHeadDim, int kHalves>
__device__ void merge_warps(const DecodeArgs<T>& args, const Running<kHeadDim, kHalves>& running, float* rings) {
  constexpr int kRingFloats = kRingBytes<kHeadDim> / 4;
  static_assert(kHeads * kMergeStride<kHeadDim> <= kRingFloats);
  __shared__ float maxima[kDecodeWarps][kHeads];
  __shared__ float sums[kDecodeWarps][kHeads];
  const int lane = this_lane();
  const int warp = this_warp();
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int row = lane / 4 + 8 * half;
    float* to = rings + warp * kRingFloats + row * kMergeStride<kHeadDim> + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(to + 8 * n) = {running.out[n][2 * half], running.out[n][2 * half + 1]};
    }
    const float sum = row_sum(running.sum[half]);
    if (lane % 4 == 0) {
      maxima[warp][row] = running.max[half];
      sums[warp][row] = sum;
    }
  }
  __syncthreads();

  const int first_head = static_cast<int>(blockIdx.x) * args.group;
  const auto split = blockIdx.y;
  const auto s = blockIdx.z;
  for (int i = static_cast<int>(threadIdx.x); i < args.group * kHeadDim; i += static_cast<int>(kDecodeThreads)) {
    const int row = i / kHeadDim;
    const int d = i % kHeadDim;
    float max = maxima[0][row];
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) max = fmaxf(max, maxima[w][row]);
    const float shift = max == -INFINITY ? 0.0F : max;  // -inf only where there is no key
    float sum = 0.0F;
    float out = 0.0F;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = exp2_approx(maxima[w][row] - shift);
      sum = fmaf(weight, sums[w][row], sum);
      out = fmaf(weight, rings[w * kRingFloats + row * kMergeStride<kHeadDim> + d], out);
    }
    out = sum > 0.0F ? out / sum : 0.0F;
    const float lse = fmaf(shift, kLn2, logf(sum));
    const int h = first_head + row;
    if (args.splits == 1) {
      args.out(s, h, d) = narrow<T>(out);
      if (d == 0 && args.lse.data() != nullptr) args.lse(s, h) = lse;
    } else {
      args.partials.out(s, h, split, d) = out;
      if (d == 0) args.partials.lse(s, h, split) = lse;
    }
  }
}

}  // namespace vesper::cuda
