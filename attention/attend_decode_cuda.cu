// Attention of one query token a sequence over its paged keys, split over keys, K and V read once for a group's heads.
//
//   out[s, h] = sum_i e^{s_i} v_i / sum_i e^{s_i},  s_i = scale * q[s, h] . k_i,  i = 0 ... kv_len(s) - 1
//
// Shapes: q, out [seqs, heads, head_dim]; K and V [pages, kv_heads, page_tokens, head_dim] in tile order
//   (kvcache/layout.h); partials [seqs, heads, splits, head_dim] fp32 with their log-sum-exp.
// Mapping: grid (kv_heads, splits, seqs); within a block as in attention/attend_decode.cuh, a piece being 16 tokens.
//   Where the splits do not fit a cluster a second kernel, grid (heads, seqs), weighs them by e^{lse}. Then a split
//   behind a sequence's end leaves at once with lse = -inf, and its partial output is neither written nor read.
// Byte bound: K and V of all tokens once, see attend_decode_cost(). The products, filled up to 8 columns, are 8 flops a
//   byte, far from binding. What is reached, and what was tried: docs/kernels.md.
// Source: Dao et al., arXiv 2205.14135; "Flash-Decoding for long-context inference", 2023 (split and merge).
#include "attention/attend.h"
#include "attention/attend_decode.cuh"
#include "attention/attend_decode.h"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {
namespace {

template <typename T, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attend_decode_split_kv(const __grid_constant__ DecodeArgs<T> args, int min_tokens) {
  extern __shared__ __align__(256) unsigned char shared[];  // one ring a warp
  __shared__ std::uint64_t told;
  const int kv_head = static_cast<int>(blockIdx.x);
  const auto s = blockIdx.z;
  // At once: what comes next has weights to fetch, and few blocks of attention fill neither the chip nor its memory.
  let_next_start();
  const int kv_len = args.kv_len(s);
  if (!args.lengths.contains(kv_len)) return wait_for_previous();
  const bool alone = cluster_blocks() == 1;
  if (!alone) {
    expect_parts(args, told);
    arrive_in_cluster();
  }
  const int split_tokens = split_length(kv_len, args.splits, min_tokens, 1 << args.page_shift);
  const int begin = static_cast<int>(blockIdx.y) * split_tokens;
  const int end = min(begin + split_tokens, kv_len);
  if (begin >= end && args.splits > 1 && alone) {
    wait_for_previous();
    return leave_empty(args);
  }

  // The warp's piece i is tokens first + kStride i ...; lane j holds the page of piece j of the next 32 to be copied.
  constexpr int kStride = kDecodeWarps * kPiece;
  const unsigned ring = shared_address(shared) + this_warp() * kRingBytes<kHeadDim>;
  const int first = begin + this_warp() * kPiece;
  const auto pages_from = [&](int token) {
    const int own = token + this_lane() * kStride;
    return own < end ? args.page_table(s, own >> args.page_shift) : 0;
  };
  constexpr int kPagesTokens = static_cast<int>(kWarpThreads) * kStride;
  int pages = pages_from(first);
  int pages_after = pages_from(first + kPagesTokens);
  int next_token = first;
  int next_lane = 0;
  int next_slot = 0;
  const auto copy_next = [&] {
    const int page = __shfl_sync(kAllLanes, pages, next_lane);
    if (next_token < end) {
      const int line = next_token & ((1 << args.page_shift) - 1);
      const int row = (kv_head << args.page_shift) + line;
      copy_piece<T, kHeadDim>(ring + next_slot * kSlotBytes<kHeadDim>, args.k, args.v,
                              std::int64_t{page} * args.page_elements + row * kHeadDim, end - next_token);
    }
    commit_copies();
    next_token += kStride;
    next_slot = next_slot == kSlots<kHeadDim> - 1 ? 0 : next_slot + 1;
    if (++next_lane == static_cast<int>(kWarpThreads)) {
      next_lane = 0;
      pages = pages_after;
      pages_after = pages_from(next_token + kPagesTokens);
    }
  };
  // All keys but the newest are older than the kernel before this one, and so are the lengths and tables.
#pragma unroll
  for (int i = 0; i < kSlots<kHeadDim> - 1; ++i) {
    if (next_token + kPiece >= kv_len) wait_for_previous();
    copy_next();
  }
  wait_for_previous();

  const auto q = load_queries<T, kHeadDim, kTiles>(args, part_of_grid(args));
  if (!alone) wait_for_cluster();  // all have begun
  auto running = nothing_yet<kHeadDim, kTiles>();
  int slot = 0;
  for (int token = first; token < end; token += kStride) {
    wait_copies<kSlots<kHeadDim> - 2>();
    __syncwarp();  // the piece is there for all lanes, and all are done with the one whose slot is filled next
    copy_next();
    const unsigned piece = ring + slot * kSlotBytes<kHeadDim>;
    auto scores = score_piece<T, kHeadDim, kTiles>(q, piece);
    if (end - token < kPiece) hide_keys_from(end - token, scores);
    take_piece<T, kHeadDim, kTiles>(running, scores, piece, args.scale_log2);
    slot = slot == kSlots<kHeadDim> - 1 ? 0 : slot + 1;
  }
  wait_copies<0>();
  __syncwarp();
  finish_split<T, kHeadDim, kTiles>(args, part_of_grid(args), running, reinterpret_cast<float*>(shared), told);
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

// Merges the splits of one (sequence, head) as MergeLane says. A thread takes four channels.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMergeLanes* kHeadDim / 4) merge_splits(const __grid_constant__ MergeArgs<T> args) {
  constexpr int kRowThreads = kHeadDim / 4;
  __shared__ MergeLane merged[kMergeLanes][kRowThreads];
  const auto h = blockIdx.x;
  const auto s = blockIdx.y;
  let_next_start();
  wait_for_previous();
  if (!args.lengths.contains(args.kv_len(s))) return;
  const int splits = static_cast<int>(args.partials.lse.shape(2));
  const float* lse = &args.partials.lse(s, h, 0);
  float max = -INFINITY;
  for (int i = this_lane(); i < splits; i += static_cast<int>(kWarpThreads)) max = fmaxf(max, lse[i]);
  const float shift = merge_shift(warp_max(max));

  const int row = static_cast<int>(threadIdx.x / kRowThreads);
  const int column = static_cast<int>(threadIdx.x % kRowThreads);
  MergeLane lane;
#pragma unroll 4
  for (int i = row; i < splits; i += kMergeLanes) {
    const float weight = expf(lse[i] - shift);
    // An empty split's partial output was never written.
    if (weight != 0.0F) lane.add(weight, *reinterpret_cast<const float4*>(&args.partials.out(s, h, i, 4 * column)));
  }
  merged[row][column] = lane;
  __syncthreads();
  if (row != 0) return;
#pragma unroll
  for (int r = 1; r < kMergeLanes; ++r) lane.join(merged[r][column]);
  store_merged(args.out, args.lse, s, h, 4 * column, lane, shift);
}

template <typename T, int kHeadDim>
void launch_decode(const Exec& exec, const AttentionShape& shape, const DecodeArgs<T>& args, int seqs, int min_tokens) {
  launch("attend_decode_split_kv",
         shape.group() <= kTileHeads ? attend_decode_split_kv<T, kHeadDim, 1> : attend_decode_split_kv<T, kHeadDim, 2>,
         decode_dims<kHeadDim>(shape, args.splits, seqs), exec.stream, args, min_tokens);
}

template <typename T, int kHeadDim>
void launch_merge(const Exec& exec, const MergeArgs<T>& args, int seqs) {
  launch("merge_splits", merge_splits<T, kHeadDim>,
         {.grid = dim3(static_cast<unsigned>(args.out.shape(1)), static_cast<unsigned>(seqs)),
          .block = dim3(kMergeLanes * kHeadDim / 4),
          .overlap = true},
         exec.stream, args);
}

}  // namespace

bool has_clusters() {
  static const bool has = code_version(attend_decode_split_kv<bf16, 128, 1>) >= 90;
  return has;
}

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
  if (plan.splits > cluster_of(shape, plan.splits, batch.seqs))
    merge_splits(exec, shape, batch, lengths, partials, out, lse);
}

}  // namespace vesper::cuda
