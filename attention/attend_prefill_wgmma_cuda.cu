// Causal attention of many query tokens over paged keys, by Hopper's warpgroup products.
//
//   out[t, h] = sum_i e^{s_i} v_i / sum_i e^{s_i},  s_i = scale * q[t, h] . k_i,  i = 0 ... positions(t)
//
// Shapes, grid and rows as in attend_prefill_cuda.cu, whose products of single warps reach 46 % of the matrix rate.
// Mapping: a block is three warpgroups. The first fetches: one warp queues boxes of 16 keys, which lie in one page,
// into
//   two stages of 128 keys each for K and for V. The other two take 64 query rows each. Queued ahead of the softmax of
//   tile i are the products of Q with K(i), of the weights of tile i - 1 with V(i - 1): these run while it is computed.
//   The two groups queue by turns, so that one computes its softmax while the other has the tensor cores.
// Shared memory: Q 32 KiB and 2 x 2 x 32 KiB at head_dim 128: one block a multiprocessor. Rows of V behind the block's
//   last key are zeroed: what a page holds there may be NaN, and 0 * NaN is not 0. What K holds there is masked.
// Cost: 4 head_dim flops a (query head, visible key), see attend_prefill_cost(); K and V come from L2 once a tile of
//   rows, 128 flops a byte, so the matrix rate binds.
// Source: Dao et al., arXiv 2205.14135; Shah et al., "FlashAttention-3", arXiv 2407.08608 (fetching warps, the order of
//   products and softmax, groups by turns); the packing of heads and the layout of columns are ours.
#include "attention/attend_prefill.cuh"
#include "attention/wgmma.cuh"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/tensor_map.cuh"

namespace vesper::cuda {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "Hopper's products need CMAKE_CUDA_ARCHITECTURES=90a, not 90"
#endif

constexpr int kGroups = 2;  // that compute
constexpr int kThreads = (1 + kGroups) * kGroupThreads;
constexpr int kRows = kPrefillRows;
constexpr int kGroupRows = 64;
constexpr int kKeys = 128;    // of a stage
constexpr int kStages = 2;    // each for K and V
constexpr int kBoxKeys = 16;  // divides a page
static_assert(kRows == kGroups * kGroupRows);

template <int kHeadDim>
constexpr int kQueryBytes = kRows * 2 * kHeadDim;
template <int kHeadDim>
constexpr int kStageBytes = kKeys * 2 * kHeadDim;
template <int kHeadDim>
constexpr int kSharedBytes = kQueryBytes<kHeadDim> + 2 * kStages* kStageBytes<kHeadDim>;

// Shared addresses. A stage of K or V is `full` when its bytes are there and `free` when both groups are done with it.
struct Ring {
  unsigned k, v;
  unsigned k_full, v_full, k_free, v_free;
};
struct Turn {
  int stage;
  unsigned parity;
  __device__ explicit Turn(int tile) : stage(tile % kStages), parity(static_cast<unsigned>(tile / kStages % 2)) {}
};

// One warp fetches all tiles. Lane i looks after box i of a stage: 16 keys, one column.
template <typename T, int kHeadDim>
__device__ void fetch_tiles(const PrefillArgs<T>& args, const CUtensorMap& k, const CUtensorMap& v, const Ring& ring,
                            int kv_end, int tiles) {
  constexpr int kColumns = kHeadDim / kColumnElements;
  constexpr int kBoxes = kKeys / kBoxKeys * kColumns;
  static_assert(kBoxes <= static_cast<int>(kWarpThreads));
  const int lane = this_lane();
  const int box = lane / kColumns;
  const int column = lane % kColumns;
  const int offset = (column * kKeys + box * kBoxKeys) * kColumnBytes;
  const int last_page = (kv_end - 1) >> args.page_shift;
  const auto row_of = [&](int tile) {
    const int token = min(tile, tiles - 1) * kKeys + box * kBoxKeys;
    const int page = lane < kBoxes ? args.page_table(blockIdx.y, min(token >> args.page_shift, last_page)) : 0;
    const int line = token & ((1 << args.page_shift) - 1);
    return ((page * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) << args.page_shift) + line;
  };
  const auto copy = [&](unsigned to, const CUtensorMap& tensor, int row, unsigned full) {
    if (lane == 0) arrive_expecting(full, kStageBytes<kHeadDim>);
    __syncwarp();
    if (lane < kBoxes) copy_box(to + offset, tensor, 0, row, column, full);
  };
  int row = row_of(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int next_row = row_of(tile + 1);
    const auto [stage, parity] = Turn(tile);
    if (tile >= kStages) wait_phase(ring.k_free + 8 * stage, parity ^ 1);
    copy(ring.k + stage * kStageBytes<kHeadDim>, k, row, ring.k_full + 8 * stage);
    if (tile >= kStages) wait_phase(ring.v_free + 8 * stage, parity ^ 1);
    copy(ring.v + stage * kStageBytes<kHeadDim>, v, row, ring.v_full + 8 * stage);
    row = next_row;
  }
}

// Copies the 64 rows of Q from `first` on to `to`, the place of row `row` in the block's columns.
template <typename T, int kHeadDim>
__device__ void copy_queries(unsigned char* to, int row, const PrefillArgs<T>& args, const QueryRows& rows, int first) {
  constexpr int kChunks = kHeadDim / kChunkElements;
  for (int i = static_cast<int>(threadIdx.x) % kGroupThreads; i < kGroupRows * kChunks; i += kGroupThreads) {
    const int t = i / kChunks;
    const int c = i % kChunks;
    *reinterpret_cast<uint4*>(to + column_offset(row + t, c, kRows)) =
        *reinterpret_cast<const uint4*>(&args.q(rows.token(first + t), rows.head(first + t), c * kChunkElements));
  }
}

// What a thread carries for its rows r and r + 8 of its warp's 16. `sum` is over this lane's own columns until the end.
template <int kHeadDim>
struct Running {
  float out[kHeadDim / 2];
  float max[2];  // in exponents of 2
  float sum[2];
  float shrink[2];  // what `out` is still to be multiplied with
};

// Queues scores[64, 128] = Q K^T.
template <typename T, int kHeadDim>
__device__ void score_keys(float (&scores)[kKeys / 2], std::uint64_t queries, unsigned key_stage) {
  const std::uint64_t keys = matrix_at(key_stage, 0);
  open_products();
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    const int column = d / kColumnElements;
    const int within = 2 * (d % kColumnElements);
    multiply_rows<T>(scores, matrix_ahead(queries, column * kRows * kColumnBytes + within),
                     matrix_ahead(keys, column * kKeys * kColumnBytes + within), d != 0);
  }
  close_products();
}

// Queues out[64, head_dim] += weights V.
template <typename T, int kHeadDim>
__device__ void add_values(float (&out)[kHeadDim / 2], const unsigned (&weights)[kKeys / 4], unsigned value_stage) {
  const std::uint64_t values = matrix_at(value_stage, kKeys * kColumnBytes);
  open_products();
#pragma unroll
  for (int key = 0; key < kKeys; key += 16) {
    multiply_columns<T>(out, weights + key / 4, matrix_ahead(values, key * kColumnBytes));
  }
  close_products();
}

// Turns scores into weights relative to the new maximum, which is finite: every row sees key 0, and that comes first.
template <int kHeadDim>
__device__ void weigh(float (&scores)[kKeys / 2], Running<kHeadDim>& running, float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = -INFINITY;
#pragma unroll
    for (int i = 2 * half; i < kKeys / 2; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
    const float max = fmaxf(running.max[half], row_max(largest) * scale_log2);
    running.shrink[half] = exp2_approx(running.max[half] - max);
    running.max[half] = max;
    float sum = 0.0F;
#pragma unroll
    for (int i = 2 * half; i < kKeys / 2; i += 4) {
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -max));
      scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -max));
      sum += scores[i] + scores[i + 1];
    }
    running.sum[half] = fmaf(running.sum[half], running.shrink[half], sum);
  }
}

// The weights' fragment D, rounded and packed in pairs, is a fragment A.
template <typename T>
__device__ void pack(unsigned (&weights)[kKeys / 4], const float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) weights[i] = narrow_pair<T>(scores[2 * i], scores[2 * i + 1]);
}

// Divides by the sums and writes whole 16-byte chunks, passing through this warp's own rows of Q in shared memory.
template <typename T, int kHeadDim>
__device__ void store_rows(const Running<kHeadDim>& running, unsigned char* queries, int row,
                           const PrefillArgs<T>& args) {
  const int lane = this_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = 1.0F / row_sum(running.sum[half]);
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c) {
      const float* pair = &running.out[4 * c + 2 * half];
      unsigned char* to = queries + column_offset(row + lane / 4 + 8 * half, c, kRows) + 4 * (lane % 4);
      *reinterpret_cast<unsigned*>(to) = narrow_pair<T>(pair[0] * inverse, pair[1] * inverse);
    }
  }
  __syncwarp();
  constexpr int kChunks = kHeadDim / kChunkElements;
  const QueryRows rows = query_rows(args);
  for (int i = lane; i < 16 * kChunks; i += static_cast<int>(kWarpThreads)) {
    const int own = rows.first + row + i / kChunks;
    const int c = i % kChunks;
    if (own > rows.last) break;
    *reinterpret_cast<uint4*>(&args.out(rows.token(own), rows.head(own), c * kChunkElements)) =
        *reinterpret_cast<const uint4*>(queries + column_offset(row + i / kChunks, c, kRows));
  }
}

// A group that computes: `group` 0 or 1.
template <typename T, int kHeadDim>
__device__ void attend_rows(const PrefillArgs<T>& args, unsigned char* shared, const Ring& ring, int group, int kv_end,
                            int tiles) {
  constexpr int kBlockThreads = kGroups * kGroupThreads;
  const int lane = this_lane();
  const int row = group * kGroupRows;  // the group's first, of the block
  const int warp_row = row + this_warp() % 4 * 16;
  const QueryRows rows = query_rows(args);
  copy_queries<T, kHeadDim>(shared, row, args, rows, rows.first + row);
  publish_shared();
  // Barriers 1 and 2 are of one group each; a group queues its products when the other has let it pass 3 or 4.
  const int own_barrier = 1 + group;
  const int own_turn = 3 + group;
  const int other_turn = 4 - group;
  meet(own_barrier, kGroupThreads);
  if (group == 1) pass(other_turn, kBlockThreads);

  const std::uint64_t queries = matrix_at(shared_address(shared) + static_cast<unsigned>(row * kColumnBytes), 0);
  const int first_masked = (args.positions(rows.token(rows.first + row)) + 1) / kKeys;  // that some row sees in part
  const int positions[2] = {args.positions(rows.token(rows.first + warp_row + lane / 4)),
                            args.positions(rows.token(rows.first + warp_row + lane / 4 + 8))};
  const auto weigh_tile = [&](float(&scores)[kKeys / 2], Running<kHeadDim>& running, int tile) {
    if (tile >= first_masked) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        const int key = tile * kKeys + i / 4 * 8 + 2 * (lane % 4) + i % 2;
        if (key > positions[i % 4 / 2]) scores[i] = -INFINITY;
      }
    }
    weigh<kHeadDim>(scores, running, args.scale_log2);
  };
  const auto give_back = [&](unsigned free) {
    __syncwarp();
    if (lane == 0) arrive(free);
  };

  Running<kHeadDim> running = {.max = {-INFINITY, -INFINITY}};
  unsigned weights[kKeys / 4];
  {
    float scores[kKeys / 2];
    wait_phase(ring.k_full, 0);
    meet(own_turn, kBlockThreads);
    score_keys<T, kHeadDim>(scores, queries, ring.k);
    pass(other_turn, kBlockThreads);
    wait_products<0>();
    give_back(ring.k_free);
    weigh_tile(scores, running, 0);
    pack<T>(weights, scores);
  }
  for (int tile = 1; tile < tiles; ++tile) {
    const auto [stage, parity] = Turn(tile);
    const auto [before, parity_before] = Turn(tile - 1);
    float scores[kKeys / 2];
    wait_phase(ring.k_full + 8 * stage, parity);
    meet(own_turn, kBlockThreads);
    score_keys<T, kHeadDim>(scores, queries, ring.k + stage * kStageBytes<kHeadDim>);
    wait_phase(ring.v_full + 8 * before, parity_before);
    add_values<T, kHeadDim>(running.out, weights, ring.v + before * kStageBytes<kHeadDim>);
    pass(other_turn, kBlockThreads);
    wait_products<1>();
    give_back(ring.k_free + 8 * stage);
    weigh_tile(scores, running, tile);
    wait_products<0>();
    give_back(ring.v_free + 8 * before);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) running.out[i] *= running.shrink[i % 4 / 2];
    pack<T>(weights, scores);
  }
  const auto [stage, parity] = Turn(tiles - 1);
  const unsigned values = ring.v + stage * kStageBytes<kHeadDim>;
  wait_phase(ring.v_full + 8 * stage, parity);
  // Either group zeroes what it is going to read: the other may write the same zeros once more, no matter when.
  unsigned char* const last_values = shared + (values - shared_address(shared));
  constexpr int kChunks = kHeadDim / kChunkElements;
  for (int i = (kv_end - (tiles - 1) * kKeys) * kChunks + static_cast<int>(threadIdx.x) % kGroupThreads;
       i < kKeys * kChunks; i += kGroupThreads) {
    *reinterpret_cast<uint4*>(last_values + column_offset(i / kChunks, i % kChunks, kKeys)) = {};
  }
  publish_shared();
  meet(own_barrier, kGroupThreads);
  if (group == 0) meet(own_turn, kBlockThreads);  // the turn that the other gave last
  add_values<T, kHeadDim>(running.out, weights, values);
  wait_products<0>();
  store_rows<T, kHeadDim>(running, shared, warp_row, args);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    attend_prefill_warpgroups(const __grid_constant__ PrefillArgs<T> args, const __grid_constant__ CUtensorMap k,
                              const __grid_constant__ CUtensorMap v) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];  // Q, then the stages of K, then those of V
  __shared__ __align__(8) std::uint64_t barriers[4 * kStages];
  const QueryRows rows = query_rows(args);
  if (rows.first > rows.last) return;
  const int kv_end = args.positions(rows.token(rows.first + kRows - 1)) + 1;
  const int tiles = (kv_end + kKeys - 1) / kKeys;

  Ring ring;
  ring.k = shared_address(shared) + kQueryBytes<kHeadDim>;
  ring.v = ring.k + kStages * kStageBytes<kHeadDim>;
  ring.k_full = shared_address(barriers);
  ring.v_full = ring.k_full + 8 * kStages;
  ring.k_free = ring.v_full + 8 * kStages;
  ring.v_free = ring.k_free + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * kStages; ++i) {
      make_barrier(ring.k_full + 8 * i, 1);
      make_barrier(ring.k_free + 8 * i, kGroups * kGroupThreads / kWarpThreads);
    }
    publish_barriers();
  }
  __syncthreads();

  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  if (group < 0) {
    keep_registers<24>();
    if (this_warp() == 0) fetch_tiles<T, kHeadDim>(args, k, v, ring, kv_end, tiles);
  } else {
    take_registers<240>();
    attend_rows<T, kHeadDim>(args, shared, ring, group, kv_end, tiles);
  }
#endif
}

// K or V as columns [head_dim / 64] of rows [pages * kv_heads * page_tokens] of 64 channels; a box is 16 rows of one
// column.
template <typename T>
CUtensorMap columns_of(const TensorRef& tiles) {
  const std::int64_t head_dim = tiles.shape[3];
  return tensor_map<3>(DTypeOf<T>::value, tiles.data,
                       {kColumnElements, tiles.shape[0] * tiles.shape[1] * tiles.shape[2], head_dim / kColumnElements},
                       {2 * head_dim, kColumnBytes}, {kColumnElements, kBoxKeys, 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

template <typename T, int kHeadDim>
void launch_prefill(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const TensorRef& out) {
  launch("attend_prefill_warpgroups", attend_prefill_warpgroups<T, kHeadDim>,
         {.grid = prefill_grid(shape, batch), .block = dim3(kThreads), .shared_bytes = kSharedBytes<kHeadDim>},
         exec.stream, prefill_args<T>(shape, q, kv, batch, out), columns_of<T>(kv.k), columns_of<T>(kv.v));
}

}  // namespace

bool has_wgmma() {
  static const bool has = code_version(attend_prefill_warpgroups<bf16, 128>) == 90;
  return has;
}

void attend_prefill_wgmma(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                          const Batch& batch, const TensorRef& out) {
  dispatch_16bit(kv.k.dtype, "attending on CUDA", [&](auto element) {
    using T = decltype(element);
    shape.head_dim == 128 ? launch_prefill<T, 128>(exec, shape, q, kv, batch, out)
                          : launch_prefill<T, 64>(exec, shape, q, kv, batch, out);
  });
}

}  // namespace vesper::cuda
