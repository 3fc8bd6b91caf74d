// Attention of one query token a sequence over its paged keys, split over keys, K and V read once for a group's heads.
//
//   out[s, h] = sum_i e^{s_i} v_i / sum_i e^{s_i},  s_i = scale * q[s, h] . k_i,  i = 0 ... kv_len(s) - 1
//
// Shapes: q, out [seqs, heads, head_dim]; K and V [pages, kv_heads, page_tokens, head_dim] in tile order
//   (kvcache/layout.h); partials [seqs, heads, splits, head_dim] fp32 with their log-sum-exp.
// Mapping: grid (kv_heads, splits, seqs); within a block as in attention/attend_decode.cuh, a piece being 16 tokens.
//   Where the plan has several splits a second kernel, grid (heads, seqs), weighs them by e^{lse}. A split behind a
//   sequence's end leaves at once with lse = -inf, and its partial output is neither written nor read.
// Byte bound: K and V of all tokens once, see attend_decode_cost(). The products, filled up to 16 rows, are 16 flops a
//   byte, far from binding.
// Source: Dao et al., arXiv 2205.14135; "Flash-Decoding for long-context inference", 2023 (split and merge).
#include "attention/attend.h"
#include "attention/attend_decode.cuh"
#include "attention/attend_decode.h"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {
namespace {

template <typename T, int kHeadDim, int kHalves>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attend_decode_split_kv(const __grid_constant__ DecodeArgs<T> args, int min_tokens) {
  extern __shared__ __align__(256) unsigned char shared[];  // one ring a warp
  const int kv_head = static_cast<int>(blockIdx.x);
  const auto s = blockIdx.z;
  // At once: what comes next has weights to fetch, and few blocks of attention fill neither the chip nor its memory.
  let_next_start();
  if (!args.lengths.contains(args.kv_len(s))) return wait_for_previous();
  const int split_tokens = split_length(args.kv_len(s), args.splits, min_tokens, 1 << args.page_shift);
  const int begin = static_cast<int>(blockIdx.y) * split_tokens;
  const int end = min(begin + split_tokens, args.kv_len(s));
  if (begin >= end && args.splits > 1) {
    wait_for_previous();
    return leave_empty(args);
  }

  // Piece i of the split is tokens begin + 16 i ...; its page is read one piece ahead of its copy.
  const unsigned ring = shared_address(shared) + this_warp() * kRingBytes<kHeadDim>;
  const auto page_of = [&](int token) { return token < end ? args.page_table(s, token >> args.page_shift) : 0; };
  int next_token = begin + this_warp() * kPiece;
  int next_page = page_of(next_token);
  int next_slot = 0;
  const auto copy_next = [&] {
    if (next_token < end) {
      const int line = next_token & ((1 << args.page_shift) - 1);
      const int row = (kv_head << args.page_shift) + line;
      copy_piece<T, kHeadDim>(ring + next_slot * kSlotBytes<kHeadDim>, args.k, args.v,
                              std::int64_t{next_page} * args.page_elements + row * kHeadDim, end - next_token);
    }
    commit_copies();
    next_token += kDecodeWarps * kPiece;
    next_page = page_of(next_token);
    next_slot = next_slot == kSlots - 1 ? 0 : next_slot + 1;
  };
  // All keys but the newest are older than the kernel before this one, and so are the lengths and tables.
  if (begin + (this_warp() + 1 + (kSlots - 2) * kDecodeWarps) * kPiece >= args.kv_len(s)) wait_for_previous();
#pragma unroll
  for (int i = 0; i < kSlots - 1; ++i) copy_next();
  wait_for_previous();

  unsigned q[kHeadDim / 16][4] = {};
  load_queries<T, kHeadDim, kHalves>(args, q);
  auto running = nothing_yet<kHeadDim, kHalves>();
  int slot = 0;
  for (int token = begin + this_warp() * kPiece; token < end; token += kDecodeWarps * kPiece) {
    wait_copies<kSlots - 2>();
    __syncwarp();  // the piece is there for all lanes, and all are done with the one whose slot is filled next
    copy_next();
    const unsigned piece = ring + slot * kSlotBytes<kHeadDim>;
    float scores[2][4] = {};
    score_piece<T, kHeadDim>(scores, q, piece);
    if (end - token < kPiece) hide_keys_from(end - token, scores);
    take_piece<T, kHeadDim, kHalves>(running, scores, piece, args.scale_log2);
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
  TensorView<const std::int32_t, 1> kv_len;
  LengthRange lengths;
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
__global__ void __launch_bounds__(kDecodeThreads) merge_splits(const __grid_constant__ MergeArgs<T> args) {
  constexpr int kRowThreads = kHeadDim / 4;
  constexpr int kRowsAtOnce = static_cast<int>(kDecodeThreads) / kRowThreads;
  __shared__ float4 rows[kRowsAtOnce][kRowThreads];
  const auto h = blockIdx.x;
  const auto s = blockIdx.y;
  let_next_start();
  wait_for_previous();
  if (!args.lengths.contains(args.kv_len(s))) return;
  const int splits = static_cast<int>(args.partials.lse.shape(2));
  const float* lse = &args.partials.lse(s, h, 0);
  float max = -INFINITY;
  for (int i = this_lane(); i < splits; i += static_cast<int>(kWarpThreads)) max = fmaxf(max, lse[i]);
  max = warp_max(max);
  const float shift = max == -INFINITY ? 0.0F : max;  // -inf only where there is no key
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
void launch_decode(const Exec& exec, const AttentionShape& shape, const DecodeArgs<T>& args, int seqs, int min_tokens) {
  launch("attend_decode_split_kv",
         shape.group() <= 8 ? attend_decode_split_kv<T, kHeadDim, 1> : attend_decode_split_kv<T, kHeadDim, 2>,
         {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(args.splits),
                       static_cast<unsigned>(seqs)),
          .block = dim3(kDecodeThreads),
          .shared_bytes = kDecodeWarps * kRingBytes<kHeadDim>,
          .overlap = true},
         exec.stream, args, min_tokens);
}

template <typename T, int kHeadDim>
void launch_merge(const Exec& exec, const MergeArgs<T>& args, int seqs) {
  launch("merge_splits", merge_splits<T, kHeadDim>,
         {.grid = dim3(static_cast<unsigned>(args.out.shape(1)), static_cast<unsigned>(seqs)),
          .block = dim3(kDecodeThreads),
          .overlap = true},
         exec.stream, args);
}

}  // namespace

void merge_splits(const Exec& exec, const AttentionShape& shape, const Batch& batch, LengthRange lengths,
                  const SplitPartials& partials, const TensorRef& out, TensorView<float, 2> lse) {
  dispatch_16bit(out.dtype, "merging splits of attention on CUDA", [&](auto element) {
    using T = decltype(element);
    const TensorView<T, 3> heads(static_cast<T*>(out.data), out.shape[0], shape.heads, shape.head_dim);
    const MergeArgs<T> args{partials, heads, lse, batch.kv_len, lengths};
    shape.head_dim == 128 ? launch_merge<T, 128>(exec, args, batch.seqs) : launch_merge<T, 64>(exec, args, batch.seqs);
  });
}

void attend_decode(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                   const Batch& batch, const SplitPlan& plan, const SplitPartials& partials, const TensorRef& out,
                   TensorView<float, 2> lse, std::int32_t longest) {
  check_attention_shape(shape);
  assert(plan.min_tokens % shape.page_tokens == 0);
  if (batch.seqs == 0) return;
  const LengthRange lengths{.longest = longest};
  dispatch_16bit(kv.k.dtype, "attending on CUDA", [&](auto element) {
    using T = decltype(element);
    const auto args = decode_args<T>(shape, q, kv, batch, lengths, plan.splits, partials, out, lse);
    shape.head_dim == 128 ? launch_decode<T, 128>(exec, shape, args, batch.seqs, plan.min_tokens)
                          : launch_decode<T, 64>(exec, shape, args, batch.seqs, plan.min_tokens);
  });
  if (plan.splits > 1) merge_splits(exec, shape, batch, lengths, partials, out, lse);
}

}  // namespace vesper::cuda
