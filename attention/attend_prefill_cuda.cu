// Causal attention of many query tokens over paged keys, on tensor cores, with a running maximum and sum. On compute
// capability 9.0 attend_prefill_wgmma_cuda.cu takes its place.
//
//   out[t, h] = sum_i e^{s_i} v_i / sum_i e^{s_i},  s_i = scale * q[t, h] . k_i,  i = 0 ... positions(t)
//
// Shapes: q, out [tokens, heads, head_dim]; K and V [pages, kv_heads, page_tokens, head_dim] in tile order
//   (kvcache/layout.h); positions ascend within a sequence.
// Mapping: rows of query heads and tokens, and the grid, as in attention/attend_prefill.cuh; blocks beyond a sequence's
//   rows leave. Four warps take 32 rows each: two row tiles share every fragment of K and V, since with one the reads
//   of shared memory (128 bytes a cycle) would bind before the tensor cores do.
// Shared memory: Q, and a ring of three slots through which tiles of 64 keys pass as K(0) V(0) K(1) V(1) ...; at any
//   time one is computed on and two are on their way. 80 KiB at head_dim 128: two blocks a multiprocessor, on 8.0 too.
//   Rows from the block's last key on are filled with zeros: what a page holds there may be NaN, and 0 * NaN is not 0.
// Cost: 4 head_dim flops a (query head, visible key), see attend_prefill_cost(); K and V come from L2 once a tile of
//   rows, 128 flops a byte, so the matrix rate binds.
// Source: Dao et al., arXiv 2205.14135; Dao, "FlashAttention-2", arXiv 2307.08691 (loop order, rows over warps); the
//   ring and the packing of heads are ours.
#include <cassert>
#include <string>

#include "attention/attend_prefill.cuh"
#include "engine/core/error.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {
namespace {

constexpr int kWarps = 4;
constexpr unsigned kThreads = kWarps * kWarpThreads;
constexpr int kRows = kPrefillRows;
constexpr int kRowTiles = 2;  // of 16 rows, for each warp
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kKeys = 64;  // of one slot
constexpr int kSlots = 3;

template <typename T, int kHeadDim>
__device__ void copy_queries(unsigned to, const PrefillArgs<T>& args, const QueryRows& rows) {
  constexpr unsigned kChunks = kHeadDim / kChunkElements;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = static_cast<int>(i / kChunks);
    const int d = static_cast<int>(i % kChunks) * kChunkElements;
    const T* from = &args.q(rows.token(rows.first + row), rows.head(rows.first + row), d);
    copy_chunk_async(to + 2U * static_cast<unsigned>(tile_offset(row, d, kHeadDim)), from, true);
  }
}

// Copies 64 keys' rows of K or V as they lie. `pages`: lane i holds the physical number of the slot's i-th page.
// `from`: the KV head's tile in page 0, moved on to this thread's first chunk.
template <typename T, int kHeadDim>
__device__ void copy_keys(unsigned to, const T* from, int pages, int page_shift, int page_elements, int first_key,
                          int kv_end) {
  constexpr int kChunks = kHeadDim / kChunkElements;
  constexpr int kRowsAtOnce = static_cast<int>(kThreads) / kChunks;  // 8 or 16, so one page at a time
  const int row = static_cast<int>(threadIdx.x / kChunks);
#pragma unroll
  for (int i = 0; i < kKeys / kRowsAtOnce; ++i) {
    const int first = i * kRowsAtOnce;
    const int page = __shfl_sync(kAllLanes, pages, first >> page_shift);
    const int line = first & ((1 << page_shift) - 1);
    const T* chunk = from + std::int64_t{page} * page_elements + line * kHeadDim;
    copy_chunk_async(to + (threadIdx.x + i * kThreads) * kChunkBytes, chunk, first_key + first + row < kv_end);
  }
}

// scores[32 rows, 64 keys] of this warp = Q K^T. `queries`, `keys`: this lane's corner blocks.
template <typename T, int kHeadDim>
__device__ void score_keys(float (&scores)[kRowTiles][kKeys / 8][4], unsigned queries, unsigned keys) {
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned q[kRowTiles][4];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) load_block(q[tile], block_at<kHeadDim>(queries, 16 * tile, d));
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      unsigned k[4];
      load_block(k, block_at<kHeadDim>(keys, key, d));
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        multiply_add<T>(scores[tile][key / 8], q[tile], k[0], k[1]);
        multiply_add<T>(scores[tile][key / 8 + 1], q[tile], k[2], k[3]);
      }
    }
  }
}

// Hides the keys behind each row's own position.
template <typename T>
__device__ void mask_future(float (&scores)[kRowTiles][kKeys / 8][4], const PrefillArgs<T>& args, int first_key) {
  const QueryRows rows = query_rows(args);
  const int first_row = rows.first + this_warp() * kWarpRows + this_lane() / 4;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int position = args.positions(rows.token(first_row + 8 * i));
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = first_key + 8 * n + 2 * (this_lane() % 4) + e;
        if (key > position) scores[i / 2][n][2 * (i % 2) + e] = -INFINITY;
      }
    }
  }
}

// The running state of this lane's rows r, r + 8, r + 16, r + 24; `sum` over its own columns only, until the end.
struct Running {
  float max[2 * kRowTiles];  // in exponents of 2
  float sum[2 * kRowTiles];
};

// Turns scores into weights relative to the new maximum, which is finite: every row sees key 0, and that comes first.
template <int kHeadDim>
__device__ void weigh(float (&scores)[kRowTiles][kKeys / 8][4], Running& running,
                      float (&out)[kRowTiles][kHeadDim / 8][4], float scale_log2) {
  float shrink[2 * kRowTiles];
  bool moved = false;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float* pair = &scores[i / 2][n][2 * (i % 2)];
      largest = fmaxf(largest, fmaxf(pair[0], pair[1]));
    }
    const float max = fmaxf(running.max[i], row_max(largest) * scale_log2);
    shrink[i] = exp2_approx(running.max[i] - max);
    moved = moved || max != running.max[i];
    running.max[i] = max;
    float sum = 0.0F;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      float* pair = &scores[i / 2][n][2 * (i % 2)];
      pair[0] = exp2_approx(fmaf(pair[0], scale_log2, -max));
      pair[1] = exp2_approx(fmaf(pair[1], scale_log2, -max));
      sum += pair[0] + pair[1];
    }
    running.sum[i] = fmaf(running.sum[i], shrink[i], sum);
  }
  // Where no maximum moved every factor is exactly 1. That is nearly always so after the first few tiles.
  if (__any_sync(kAllLanes, moved)) {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[i / 2][n][2 * (i % 2)] *= shrink[i];
        out[i / 2][n][2 * (i % 2) + 1] *= shrink[i];
      }
    }
  }
}

// out[32 rows, head_dim] += weights V. `values`: this lane's corner block. The weights' fragment D, rounded and packed
// in pairs, is a fragment A.
template <typename T, int kHeadDim>
__device__ void add_values(float (&out)[kRowTiles][kHeadDim / 8][4], const float (&weights)[kRowTiles][kKeys / 8][4],
                           unsigned values) {
#pragma unroll
  for (int key = 0; key < kKeys; key += 16) {
    unsigned p[kRowTiles][4];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const float* left = weights[tile][key / 8];
      const float* right = weights[tile][key / 8 + 1];
      p[tile][0] = narrow_pair<T>(left[0], left[1]);
      p[tile][1] = narrow_pair<T>(left[2], left[3]);
      p[tile][2] = narrow_pair<T>(right[0], right[1]);
      p[tile][3] = narrow_pair<T>(right[2], right[3]);
    }
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      unsigned v[4];
      load_block_transposed(v, block_at<kHeadDim>(values, key, d));
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        multiply_add<T>(out[tile][d / 8], p[tile], v[0], v[1]);
        multiply_add<T>(out[tile][d / 8 + 1], p[tile], v[2], v[3]);
      }
    }
  }
}

// Divides by the sums and writes whole 16-byte chunks, passing through this warp's own rows of Q in shared memory.
template <typename T, int kHeadDim>
__device__ void store_rows(const float (&out)[kRowTiles][kHeadDim / 8][4], const Running& running, T* queries,
                           const PrefillArgs<T>& args) {
  const int lane = this_lane();
  const int warp_row = this_warp() * kWarpRows;
  T* staging = queries + warp_row * kHeadDim;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const float inverse = 1.0F / row_sum(running.sum[i]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const float* pair = &out[i / 2][n][2 * (i % 2)];
      const int at = tile_offset(8 * i + lane / 4, 8 * n + 2 * (lane % 4), kHeadDim);
      *reinterpret_cast<unsigned*>(staging + at) = narrow_pair<T>(pair[0] * inverse, pair[1] * inverse);
    }
  }
  __syncwarp();
  constexpr int kChunks = kHeadDim / kChunkElements;
  const QueryRows rows = query_rows(args);
  const int first_row = rows.first + warp_row;
  for (int i = lane; i < kWarpRows * kChunks; i += static_cast<int>(kWarpThreads)) {
    const int row = i / kChunks;
    const int d = i % kChunks * kChunkElements;
    if (first_row + row > rows.last) break;
    const uint4 chunk = *reinterpret_cast<const uint4*>(staging + tile_offset(row, d, kHeadDim));
    *reinterpret_cast<uint4*>(&args.out(rows.token(first_row + row), rows.head(first_row + row), d)) = chunk;
  }
}

template <int kHeadDim>
constexpr int kSlotBytes = kKeys * 2 * kHeadDim;
template <int kHeadDim>
constexpr int kQueryBytes = kRows * 2 * kHeadDim;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) attend_prefill_flash(const __grid_constant__ PrefillArgs<T> args) {
  extern __shared__ __align__(256) unsigned char shared[];  // Q, then the slots
  const QueryRows rows = query_rows(args);
  if (rows.first > rows.last) return;

  const int kv_end = args.positions(rows.token(rows.first + kRows - 1)) + 1;
  const int tiles = (kv_end + kKeys - 1) / kKeys;
  const int first_masked = (args.positions(rows.token(rows.first)) + 1) / kKeys;  // tile that some row sees in part

  const int lane = this_lane();
  const int warp_row = this_warp() * kWarpRows;
  // This thread's first chunk of the KV head's tile in page 0.
  const int own = (rows.kv_head * kHeadDim << args.page_shift) + static_cast<int>(threadIdx.x * kChunkElements);
  const int slot_pages = kKeys >> args.page_shift;  // 1, 2 or 4
  const int last_page = (kv_end - 1) >> args.page_shift;
  const auto pages_of = [&](int tile) {
    return args.page_table(blockIdx.y, min(tile * slot_pages + (lane & (slot_pages - 1)), last_page));
  };
  const auto copy = [&](unsigned to, const T* from, int tile, int pages) {
    if (tile < tiles) {
      copy_keys<T, kHeadDim>(to, from + own, pages, args.page_shift, args.page_elements, tile * kKeys, kv_end);
    }
    commit_copies();
  };

  const unsigned queries = shared_address(shared);
  unsigned k_slot = queries + kQueryBytes<kHeadDim>;
  unsigned v_slot = k_slot + kSlotBytes<kHeadDim>;
  unsigned next_slot = v_slot + kSlotBytes<kHeadDim>;
  const unsigned query_block =
      corner_block<kHeadDim, Quarters::kDownFirst>(queries + static_cast<unsigned>(2 * warp_row * kHeadDim), lane);

  int pages = pages_of(0);
  copy_queries<T, kHeadDim>(queries, args, rows);
  copy(k_slot, args.k, 0, pages);
  copy(v_slot, args.v, 0, pages);
  pages = pages_of(1);

  float out[kRowTiles][kHeadDim / 8][4] = {};
  Running running;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    running.max[i] = -INFINITY;
    running.sum[i] = 0.0F;
  }
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<1>();
    __syncthreads();  // this tile's K is there, and all are done with the slot that is filled next
    copy(next_slot, args.k, tile + 1, pages);
    float scores[kRowTiles][kKeys / 8][4] = {};
    score_keys<T, kHeadDim>(scores, query_block, corner_block<kHeadDim, Quarters::kAcrossFirst>(k_slot, lane));
    if (tile >= first_masked) {
      mask_future(scores, args, tile * kKeys);
    }
    weigh<kHeadDim>(scores, running, out, args.scale_log2);

    wait_copies<1>();
    __syncthreads();  // likewise for V
    copy(k_slot, args.v, tile + 1, pages);
    pages = pages_of(tile + 2);
    add_values<T, kHeadDim>(out, scores, corner_block<kHeadDim, Quarters::kDownFirst>(v_slot, lane));

    const unsigned done = v_slot;
    v_slot = k_slot;
    k_slot = next_slot;
    next_slot = done;
  }
  store_rows<T, kHeadDim>(out, running, reinterpret_cast<T*>(shared), args);
}

template <typename T, int kHeadDim>
void launch_prefill(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const TensorRef& out) {
  launch("attend_prefill_flash", attend_prefill_flash<T, kHeadDim>,
         {.grid = prefill_grid(shape, batch),
          .block = dim3(kThreads),
          .shared_bytes = kQueryBytes<kHeadDim> + kSlots * kSlotBytes<kHeadDim>},
         exec.stream, prefill_args<T>(shape, q, kv, batch, out));
}

}  // namespace

void attend_prefill(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const TensorRef& out) {
  check_attention_shape(shape);
  assert(q.dtype == kv.k.dtype && out.dtype == kv.k.dtype);
  assert(q.shape[1] == shape.heads * shape.head_dim && kv.k.shape[2] == shape.page_tokens);
  assert(shape.scale > 0.0F);
  if (batch.tokens == 0) return;
  if (has_wgmma()) return attend_prefill_wgmma(exec, shape, q, kv, batch, out);
  const bool wide = shape.head_dim == 128;
  switch (kv.k.dtype) {
    case DType::kBf16:
      return wide ? launch_prefill<bf16, 128>(exec, shape, q, kv, batch, out)
                  : launch_prefill<bf16, 64>(exec, shape, q, kv, batch, out);
    case DType::kF16:
      return wide ? launch_prefill<f16, 128>(exec, shape, q, kv, batch, out)
                  : launch_prefill<f16, 64>(exec, shape, q, kv, batch, out);
    default:
      refuse({"attending on CUDA", std::string(dtype_name(kv.k.dtype)), "bf16 or f16", ""});
  }
}

}  // namespace vesper::cuda
