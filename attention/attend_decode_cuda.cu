// Attention of one query token a sequence over its paged keys, split over keys, K and V read once for a group's heads.
//
//   out[s, h] = sum_i e^{s_i} v_i / sum_i e^{s_i},  s_i = scale * q[s, h] . k_i,  i = 0 ... kv_len(s) - 1
//
// Shapes: q, out [seqs, heads, head_dim]; K and V [pages, kv_heads, page_tokens, head_dim] in tile order
//   (kvcache/layout.h); partials [seqs, heads, splits, head_dim] fp32 with their log-sum-exp.
// Mapping: grid (kv_heads, splits, seqs). A block's four warps deal out the split's pieces of 16 tokens. Each has its
//   own ring of three pieces of K and V in shared memory and its own maximum, sum and output, and waits for no other
//   until they merge at the end. The group's heads, filled up to 16 with zeros, are the rows of the tensor-core
//   products; up to 8 heads the lower half of the rows is left out of everything but the products.
//   Where the plan has several splits a second kernel, grid (heads, seqs), weighs them by e^{lse}. A split behind a
//   sequence's end leaves at once with lse = -inf, and its partial output is neither written nor read.
// In flight: 4 warps x 2 pieces x 8 KiB at head_dim 128, two blocks a multiprocessor on Hopper: 128 KiB. Rows from the
//   last token on are filled with zeros: what a page holds there may be NaN, and 0 * NaN is not 0.
// Byte bound: K and V of all tokens once, see attend_decode_cost(). The products, filled up to 16 rows, are 16 flops a
//   byte, far from binding.
// Source: Dao et al., arXiv 2205.14135; "Flash-Decoding for long-context inference", 2023 (split and merge).
#include <bit>
#include <string>

#include "attention/attend.h"
#include "attention/mma.cuh"
#include "engine/core/error.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {
namespace {

constexpr int kWarps = 4;
constexpr unsigned kThreads = kWarps * kWarpThreads;
constexpr int kPiece = 16;  // tokens; divides a page, so a piece lies in one
constexpr int kSlots = 3;   // of a warp's ring
constexpr int kHeads = 16;  // rows of the products
template <int kHeadDim>
constexpr int kTileBytes = kPiece * 2 * kHeadDim;
template <int kHeadDim>
constexpr int kRingBytes = kSlots * 2 * kTileBytes<kHeadDim>;  // of a warp; a slot holds K, then V
// A warp's output as it is merged through its ring: eight floats of padding spread a column of rows over the banks.
template <int kHeadDim>
constexpr int kMergeStride = kHeadDim + 8;

template <typename T>
struct DecodeArgs {
  TensorView<const T, 3> q;  // [seqs, heads, head_dim]
  TensorView<T, 3> out;
  const T* k = nullptr;  // [pages, kv_heads, page_tokens, head_dim] tiles
  const T* v = nullptr;
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 2> page_table;
  SplitPlan plan;
  SplitPartials partials;
  TensorView<float, 2> lse;
  int group = 0;
  int page_shift = 0;       // page_tokens = 1 << page_shift
  int page_elements = 0;    // of one page, over its KV heads
  float scale_log2 = 0.0F;  // scale * log2(e): scores become exponents of 2
};

// Queues one piece's rows of K and V as they lie. `offset`: of its first element, in K and in V.
template <typename T, int kHeadDim>
__device__ void copy_piece(unsigned slot, const T* k, const T* v, std::int64_t offset, int tokens) {
  constexpr unsigned kChunks = kHeadDim / kChunkElements;
#pragma unroll
  for (unsigned i = 0; i < kPiece * kChunks / kWarpThreads; ++i) {
    const unsigned chunk = threadIdx.x % kWarpThreads + i * kWarpThreads;
    const bool valid = static_cast<int>(chunk / kChunks) < tokens;
    const std::int64_t at = offset + chunk * kChunkElements;
    copy_chunk_async(slot + chunk * kChunkBytes, k + at, valid);
    copy_chunk_async(slot + kTileBytes<kHeadDim> + chunk * kChunkBytes, v + at, valid);
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

template <typename T, int kHeadDim, int kHalves>
__device__ void attend_piece(Running<kHeadDim, kHalves>& running, const unsigned (&q)[kHeadDim / 16][4], unsigned slot,
                             int tokens, float scale_log2) {
  const int lane = this_lane();
  float scores[2][4] = {};  // [16 heads, 16 tokens]
  const unsigned keys = corner_block<kHeadDim, Quarters::kAcrossFirst>(slot, lane);
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned k[4];
    load_block(k, block_at<kHeadDim>(keys, 0, d));
    multiply_add<T>(scores[0], q[d / 16], k[0], k[1]);
    multiply_add<T>(scores[1], q[d / 16], k[2], k[3]);
  }
  if (tokens < kPiece) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= tokens) scores[i / 4][i % 4] = -INFINITY;
    }
  }

  unsigned p[4] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    float* left = scores[0] + 2 * half;
    float* right = scores[1] + 2 * half;
    const float largest = row_max(fmaxf(fmaxf(left[0], left[1]), fmaxf(right[0], right[1])));
    const float max = fmaxf(running.max[half], largest * scale_log2);  // finite: a piece has a token
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

  const unsigned values = corner_block<kHeadDim, Quarters::kDownFirst>(slot + kTileBytes<kHeadDim>, lane);
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned v[4];
    load_block_transposed(v, block_at<kHeadDim>(values, 0, d));
    multiply_add<T>(running.out[d / 8], p, v[0], v[1]);
    multiply_add<T>(running.out[d / 8 + 1], p, v[2], v[3]);
  }
}

// Merges the warps' results, weighted by their sums relative to the common maximum, and writes the block's heads.
template <typename T, int kHeadDim, int kHalves>
__device__ void merge_warps(const DecodeArgs<T>& args, const Running<kHeadDim, kHalves>& running, float* rings) {
  constexpr int kRingFloats = kRingBytes<kHeadDim> / 4;
  static_assert(kHeads * kMergeStride<kHeadDim> <= kRingFloats);
  __shared__ float maxima[kWarps][kHeads];
  __shared__ float sums[kWarps][kHeads];
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
  for (int i = static_cast<int>(threadIdx.x); i < args.group * kHeadDim; i += static_cast<int>(kThreads)) {
    const int row = i / kHeadDim;
    const int d = i % kHeadDim;
    float max = maxima[0][row];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) max = fmaxf(max, maxima[w][row]);
    const float shift = max == -INFINITY ? 0.0F : max;  // -inf only where the sequence has no token
    float sum = 0.0F;
    float out = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2_approx(maxima[w][row] - shift);
      sum = fmaf(weight, sums[w][row], sum);
      out = fmaf(weight, rings[w * kRingFloats + row * kMergeStride<kHeadDim> + d], out);
    }
    out = sum > 0.0F ? out / sum : 0.0F;
    const float lse = fmaf(shift, kLn2, logf(sum));
    const int h = first_head + row;
    if (args.plan.splits == 1) {
      args.out(s, h, d) = narrow<T>(out);
      if (d == 0 && args.lse.data() != nullptr) args.lse(s, h) = lse;
    } else {
      args.partials.out(s, h, split, d) = out;
      if (d == 0) args.partials.lse(s, h, split) = lse;
    }
  }
}

template <typename T, int kHeadDim, int kHalves>
__global__ void __launch_bounds__(kThreads, 2) attend_decode_split_kv(const __grid_constant__ DecodeArgs<T> args) {
  extern __shared__ __align__(256) unsigned char shared[];  // one ring a warp
  const int kv_head = static_cast<int>(blockIdx.x);
  const auto s = blockIdx.z;
  const int begin = static_cast<int>(blockIdx.y) * args.plan.split_tokens;
  const int end = min(begin + args.plan.split_tokens, args.kv_len(s));
  if (begin >= end && args.plan.splits > 1) {
    if (static_cast<int>(threadIdx.x) < args.group) {
      args.partials.lse(s, kv_head * args.group + static_cast<int>(threadIdx.x), blockIdx.y) = -INFINITY;
    }
    return;
  }

  // Piece i of the split is tokens begin + 16 i ...; its page is read one piece ahead of its copy.
  const int lane = this_lane();
  const unsigned ring = shared_address(shared) + this_warp() * kRingBytes<kHeadDim>;
  const auto page_of = [&](int token) { return token < end ? args.page_table(s, token >> args.page_shift) : 0; };
  int next_token = begin + this_warp() * kPiece;
  int next_page = page_of(next_token);
  int next_slot = 0;
  const auto copy_next = [&] {
    if (next_token < end) {
      const int line = next_token & ((1 << args.page_shift) - 1);
      const int row = (kv_head << args.page_shift) + line;
      copy_piece<T, kHeadDim>(ring + next_slot * 2 * kTileBytes<kHeadDim>, args.k, args.v,
                              std::int64_t{next_page} * args.page_elements + row * kHeadDim, end - next_token);
    }
    commit_copies();
    next_token += kWarps * kPiece;
    next_page = page_of(next_token);
    next_slot = next_slot == kSlots - 1 ? 0 : next_slot + 1;
  };
#pragma unroll
  for (int i = 0; i < kSlots - 1; ++i) copy_next();

  unsigned q[kHeadDim / 16][4] = {};  // rows are heads
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int row = lane / 4 + 8 * half;
    if (row >= args.group) continue;
    const T* from = &args.q(s, kv_head * args.group + row, 2 * (lane % 4));
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      q[d / 16][half] = *reinterpret_cast<const unsigned*>(from + d);
      q[d / 16][half + 2] = *reinterpret_cast<const unsigned*>(from + d + 8);
    }
  }

  Running<kHeadDim, kHalves> running = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) running.max[half] = -INFINITY;
  int slot = 0;
  for (int token = begin + this_warp() * kPiece; token < end; token += kWarps * kPiece) {
    wait_copies<kSlots - 2>();
    __syncwarp();  // the piece is there for all lanes, and all are done with the one whose slot is filled next
    copy_next();
    attend_piece<T, kHeadDim, kHalves>(running, q, ring + slot * 2 * kTileBytes<kHeadDim>, end - token,
                                       args.scale_log2);
    slot = slot == kSlots - 1 ? 0 : slot + 1;
  }
  wait_copies<0>();
  __syncwarp();
  merge_warps<T, kHeadDim, kHalves>(args, running, reinterpret_cast<float*>(shared));
}

template <typename T>
struct MergeArgs {
  SplitPartials partials;
  TensorView<T, 3> out;  // [seqs, heads, head_dim]
  TensorView<float, 2> lse;
};

__device__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
__device__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// out = sum_i e^{lse_i} out_i / sum_i e^{lse_i} over the splits i of one (sequence, head). A thread takes four channels
// of every kRowsAtOnce-th split.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) merge_splits(const __grid_constant__ MergeArgs<T> args) {
  constexpr int kRowThreads = kHeadDim / 4;
  constexpr int kRowsAtOnce = static_cast<int>(kThreads) / kRowThreads;
  __shared__ float4 rows[kRowsAtOnce][kRowThreads];
  const auto h = blockIdx.x;
  const auto s = blockIdx.y;
  const int splits = static_cast<int>(args.partials.lse.shape(2));
  const float* lse = &args.partials.lse(s, h, 0);
  float max = -INFINITY;
  for (int i = this_lane(); i < splits; i += static_cast<int>(kWarpThreads)) max = fmaxf(max, lse[i]);
  max = warp_max(max);
  const float shift = max == -INFINITY ? 0.0F : max;  // -inf only where the sequence has no token
  float sum = 0.0F;
  for (int i = this_lane(); i < splits; i += static_cast<int>(kWarpThreads)) sum += expf(lse[i] - shift);
  sum = warp_sum(sum);

  const int row = static_cast<int>(threadIdx.x / kRowThreads);
  const int column = static_cast<int>(threadIdx.x % kRowThreads);
  float4 out = {};
#pragma unroll 4
  for (int i = row; i < splits; i += kRowsAtOnce) {
    const float weight = expf(lse[i] - shift);
    if (weight == 0.0F) continue;  // an empty split's partial output was never written
    const float4 part = *reinterpret_cast<const float4*>(&args.partials.out(s, h, i, 4 * column));
    out = {fmaf(weight, part.x, out.x), fmaf(weight, part.y, out.y), fmaf(weight, part.z, out.z),
           fmaf(weight, part.w, out.w)};
  }
  rows[row][column] = out;
  __syncthreads();
  if (row != 0) return;
#pragma unroll
  for (int r = 1; r < kRowsAtOnce; ++r) {
    const float4 part = rows[r][column];
    out = {out.x + part.x, out.y + part.y, out.z + part.z, out.w + part.w};
  }
  const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
  *reinterpret_cast<uint2*>(&args.out(s, h, 4 * column)) = {narrow_pair<T>(out.x * inverse, out.y * inverse),
                                                            narrow_pair<T>(out.z * inverse, out.w * inverse)};
  if (column == 0 && args.lse.data() != nullptr) args.lse(s, h) = shift + logf(sum);
}

template <typename T, int kHeadDim>
void launch_decode(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                   const Batch& batch, const SplitPlan& plan, const SplitPartials& partials, const TensorRef& out,
                   TensorView<float, 2> lse) {
  DecodeArgs<T> args;
  args.q = TensorView<const T, 3>(static_cast<const T*>(q.data), q.shape[0], shape.heads, kHeadDim);
  args.out = TensorView<T, 3>(static_cast<T*>(out.data), out.shape[0], shape.heads, kHeadDim);
  args.k = static_cast<const T*>(kv.k.data);
  args.v = static_cast<const T*>(kv.v.data);
  args.kv_len = batch.kv_len;
  args.page_table = batch.page_table;
  args.plan = plan;
  args.partials = partials;
  args.lse = lse;
  args.group = shape.group();
  args.page_shift = std::countr_zero(static_cast<unsigned>(shape.page_tokens));
  args.page_elements = shape.kv_heads * shape.page_tokens * kHeadDim;
  args.scale_log2 = shape.scale * kLog2E;
  const auto seqs = static_cast<unsigned>(batch.seqs);
  launch("attend_decode_split_kv",
         shape.group() <= 8 ? attend_decode_split_kv<T, kHeadDim, 1> : attend_decode_split_kv<T, kHeadDim, 2>,
         {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(plan.splits), seqs),
          .block = dim3(kThreads),
          .shared_bytes = kWarps * kRingBytes<kHeadDim>},
         exec.stream, args);
  if (plan.splits == 1) return;
  launch("merge_splits", merge_splits<T, kHeadDim>,
         {.grid = dim3(static_cast<unsigned>(shape.heads), seqs), .block = dim3(kThreads)}, exec.stream,
         MergeArgs<T>{partials, args.out, lse});
}

}  // namespace

void attend_decode(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                   const Batch& batch, const SplitPlan& plan, const SplitPartials& partials, const TensorRef& out,
                   TensorView<float, 2> lse) {
  check_attention_shape(shape);
  assert(q.dtype == kv.k.dtype && out.dtype == kv.k.dtype);
  assert(q.shape[1] == shape.heads * shape.head_dim && kv.k.shape[2] == shape.page_tokens);
  assert(shape.scale > 0.0F);
  assert(plan.split_tokens % shape.page_tokens == 0);
  if (batch.seqs == 0) return;
  const bool wide = shape.head_dim == 128;
  switch (kv.k.dtype) {
    case DType::kBf16:
      return wide ? launch_decode<bf16, 128>(exec, shape, q, kv, batch, plan, partials, out, lse)
                  : launch_decode<bf16, 64>(exec, shape, q, kv, batch, plan, partials, out, lse);
    case DType::kF16:
      return wide ? launch_decode<f16, 128>(exec, shape, q, kv, batch, plan, partials, out, lse)
                  : launch_decode<f16, 64>(exec, shape, q, kv, batch, plan, partials, out, lse);
    default:
      refuse({"attending on CUDA", std::string(dtype_name(kv.k.dtype)), "bf16 or f16", ""});
  }
}

}  // namespace vesper::cuda
