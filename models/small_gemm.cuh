// The device half of products with 9 to 64 rows of x on compute capability 9.0: sums = x W^T by warpgroup products that
// read both from shared memory, W brought there once and at the rate of the memory. What becomes of the sums is the
// caller's: a plain product (small_gemm_cuda.cu) or one with the step after it (small_projections_cuda.cu).
//
//   x [tokens, columns], W [rows, columns] of one 16-bit type T, columns a multiple of 8, rows on 16 bytes
//   band      16 rows of W and their 16 partners (a gate's up, the other half of a rotary pair; the next 16 rows)
//   tile      kRows / 32 bands; D[64, kRows] of a warpgroup, the tokens down, absent ones being whatever lies in
//             shared memory: a row of D depends on its own row of x alone
//   stage     64 columns of x and of a tile
//   block     walks the tiles blockIdx.x, blockIdx.x + gridDim.x, ...; or, where that fills the device in one round,
//             a cluster of blocks shares one tile, each with its part of the columns, and the sums of a token are added
//             up, in the order of the columns, by one of them
//   warps 0-3 multiply; warp 4 fetches stages into a ring
//
// Every sum runs in an order that depends on the shape of W and the device only, so that a token's product depends
// neither on the other tokens nor on their number.
//
// Bytes: W once, x once for every tile, out of L2, where it is told to stay. A stage of x takes about 1 us to come, so
// x is asked for as far ahead as W: both share the ring. The first stages of W are under way before the kernel in front
// is done (engine/core/overlap.cuh), their x follows. What is reached: docs/kernels.md.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>

#include "attention/mma.cuh"
#include "attention/wgmma.cuh"
#include "engine/core/bulk_copy.cuh"
#include "engine/core/cache_hint.cuh"
#include "engine/core/cluster.cuh"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/tensor.h"
#include "engine/core/tensor_map.cuh"
#include "models/linear.h"
#include "models/multiply_tile.cuh"

namespace vesper::cuda {

inline constexpr int kBandRows = 16;  // and as many partners
inline constexpr int kStageColumns = kColumnElements;
inline constexpr int kParts = 2;  // blocks of a cluster; of larger ones fewer find room, see docs/kernels.md
inline constexpr int kSmallGemmThreads = kGroupThreads + 32;
inline constexpr int kMultiplyWarps = kGroupThreads / 32;
inline constexpr int kMaxStages = 32;
inline constexpr int kSmallGemmBlocks = 2;      // a multiprocessor
inline constexpr int kBlockBytes = 112 * 1024;  // of shared memory
inline constexpr int kPitchPadding = 8;         // floats behind a token's sums: eight tokens on eight groups of banks
inline constexpr int kBandPitch = 2 * kBandRows + kPitchPadding;

// Which rows of W the bands are.
struct BandRows {
  std::int64_t rows = 0;  // first partners: bands lie in rows 0 ... rows - 1 of these
  std::int64_t run = 0;   // neighbours among them: row i is row i / run * stride + i % run of W, its partner
  std::int64_t stride = 0;
  std::int64_t partner = 0;  // so many rows below
};

template <typename Output>
struct SmallGemmArgs {
  CUtensorMap weight;
  CUtensorMap x;
  int tokens = 0;
  int columns = 0;
  int bands = 0;
  int tiles = 0;
  int parts = 1;
  int stages = 0;     // of the ring
  int band_step = 0;  // rows of the weight's map from a band to the next
  int run = 0;
  int stride = 0;
  int rows = 0;  // as in BandRows
  Output output;
};

// Shared memory, from its beginning: the stages, x before W (rows of D beyond the last token are read out of what
// follows x: W, the next stage, the sums), sums on their way, barriers.
struct SmallGemmShared {
  int token_rows = 0;  // of a stage of x: whole groups of 8
  int input_bytes = 0;
  int stage_bytes = 0;
  int sums_bytes = 0;

  VESPER_HD SmallGemmShared(int tokens, int tile_rows, int parts)
      : token_rows((tokens + 7) / 8 * 8),
        input_bytes(token_rows * kColumnBytes),
        stage_bytes(input_bytes + tile_rows * kColumnBytes),
        sums_bytes(4 * (parts > 1 ? token_rows * (tile_rows + kPitchPadding) : kMultiplyWarps * 16 * kBandPitch)) {}

  static constexpr int kBarriers = 2 * kMaxStages + 1;
  [[nodiscard]] VESPER_HD int sums(int stages) const { return stages * stage_bytes; }
  [[nodiscard]] VESPER_HD int barriers(int stages) const { return sums(stages) + sums_bytes; }
  [[nodiscard]] VESPER_HD int bytes(int stages) const { return barriers(stages) + 8 * kBarriers; }
};

// A ring's place and the parity of its barrier's phase.
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1U;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Shared addresses of the barriers. A stage is `full` when its bytes are there and `free` when they are read; `summed`
// is when the sums of all blocks of the cluster have come here.
struct SmallGemmBarriers {
  unsigned full, free, summed;

  __device__ explicit SmallGemmBarriers(unsigned at)
      : full(at), free(at + 8 * kMaxStages), summed(at + 16 * kMaxStages) {}

  // `sum_bytes`: of sums that blocks send here.
  __device__ void make(int stages, unsigned sum_bytes) const {
    for (int i = 0; i < stages; ++i) {
      make_barrier(full + 8 * i, 1);
      make_barrier(free + 8 * i, kMultiplyWarps);
    }
    make_barrier(summed, 1);
    publish_barriers();
    arrive_expecting(summed, sum_bytes);
  }
};

// The tiles of a block, and its share of their columns, in stages.
struct BlockShare {
  int part, first_tile, tile_step, begin, end;

  template <typename Output>
  __device__ explicit BlockShare(const SmallGemmArgs<Output>& args)
      : part(static_cast<int>(blockIdx.x) % args.parts),
        first_tile(static_cast<int>(blockIdx.x) / args.parts),
        tile_step(static_cast<int>(gridDim.x) / args.parts) {
    const int stages = (args.columns + kStageColumns - 1) / kStageColumns;
    begin = stages * part / args.parts;
    end = stages * (part + 1) / args.parts;
  }

  // Tokens whose sums come together in this block: every so many, from `part` on.
  template <typename Output>
  __device__ int own_tokens(const SmallGemmArgs<Output>& args) const {
    return (args.tokens - part + args.parts - 1) / args.parts;
  }
};

// What one thread fetches: the stages of a block in their order.
template <int kRows, typename Output>
class StageStream {
 public:
  __device__ StageStream(const SmallGemmArgs<Output>& args, const BlockShare& share)
      : args_(args), share_(share), tile_(share.first_tile), column_(share.begin) {
    const int tiles = (args.tiles - share.first_tile + share.tile_step - 1) / share.tile_step;
    left_ = tiles * (share.end - share.begin);
  }

  __device__ int left() const { return left_; }
  __device__ void advance() {
    --left_;
    if (++column_ < share_.end) return;
    column_ = share_.begin;
    tile_ += share_.tile_step;
  }
  __device__ void copy_weight(unsigned to, unsigned full) const {
    int row = tile_ * (kRows / (2 * kBandRows)) * args_.band_step;
    for (int b = 0; b < kRows / (2 * kBandRows); ++b, row += args_.band_step) {
      copy_box(to + static_cast<unsigned>(b * 2 * kBandRows * kColumnBytes), args_.weight, column_ * kStageColumns,
               row % args_.run, row / args_.run, 0, full, once_);
    }
  }
  __device__ void copy_input(unsigned to, unsigned full) const {
    copy_box(to, args_.x, column_ * kStageColumns, 0, full, often_);
  }

 private:
  const SmallGemmArgs<Output>& args_;
  const BlockShare& share_;
  int tile_;
  int column_;
  int left_;
  std::uint64_t once_ = evict_first();
  std::uint64_t often_ = evict_last();
};

// The fetching warp's part. `begin` is called when the first stages of W are under way.
template <int kRows, typename Output, typename Begin>
__device__ void fetch_stages(const SmallGemmArgs<Output>& args, const BlockShare& share, const SmallGemmShared& layout,
                             const SmallGemmBarriers& barriers, unsigned ring, const Begin& begin) {
  const bool fetches = this_lane() == 0;
  const auto input_at = [&](int stage) { return ring + static_cast<unsigned>(stage * layout.stage_bytes); };
  const auto weight_at = [&](int stage) { return input_at(stage) + static_cast<unsigned>(layout.input_bytes); };
  const auto expect = [&](int stage) {
    arrive_expecting(barriers.full + 8 * stage, static_cast<unsigned>(layout.stage_bytes));
  };
  StageStream<kRows, Output> weight(args, share);
  if (fetches) {
    barriers.make(args.stages, static_cast<unsigned>(4 * args.parts * share.own_tokens(args) * kRows));
    let_next_start();  // saying it later was measured to make no difference
    for (int i = 0; i < args.stages && weight.left() > 0; ++i, weight.advance()) {
      expect(i);
      weight.copy_weight(weight_at(i), barriers.full + 8 * i);
    }
  }
  begin();
  if (!fetches) return;
  StageStream<kRows, Output> both(args, share);
  for (int i = 0; i < args.stages && both.left() > 0; ++i, both.advance()) {
    both.copy_input(input_at(i), barriers.full + 8 * i);
  }
  for (RingPlace place; both.left() > 0; both.advance(), place.advance(args.stages)) {
    wait_phase(barriers.free + 8 * place.stage, place.parity);
    expect(place.stage);
    both.copy_input(input_at(place.stage), barriers.full + 8 * place.stage);
    both.copy_weight(weight_at(place.stage), barriers.full + 8 * place.stage);
  }
}

// Puts the 16 sums of a band that a lane has (d[4 i + 2 h + e]: token lane / 4 + 8 h of the warp's, row 8 i +
// 2 (lane % 4) + e) where the warp's token 0 has its; only tokens below `tokens`.
__device__ inline void put_band(float* to, int pitch, const float* d, int tokens) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = this_lane() / 4 + 8 * h;
    if (t >= tokens) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<float2*>(to + t * pitch + 8 * i + 2 * (this_lane() % 4)) =
          float2{d[4 * i + 2 * h], d[4 * i + 2 * h + 1]};
    }
  }
}

// Hands out the sums of a tile whose columns a block has all of. A warp has 16 tokens; its bands pass through shared
// memory one by one, so that neighbouring rows are stored by neighbouring lanes and there is one copy of `output`.
template <int kRows, typename Output>
__device__ void put_out(const SmallGemmArgs<Output>& args, int tile, const float (&d)[kRows / 2], float* sums) {
  constexpr int kBands = kRows / (2 * kBandRows);
  float* const own = sums + this_warp() * 16 * kBandPitch;
  const int tokens = min(16, args.tokens - 16 * this_warp());
#pragma unroll 1
  for (int band = 0; band < kBands; ++band) {
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
      if (b == band) put_band(own, kBandPitch, d + 16 * b, tokens);
    }
    __syncwarp();
    const int first = (tile * kBands + band) * args.band_step;
#pragma unroll 1
    for (int i = this_lane(); i < tokens * kBandRows; i += 32) {
      const int t = i / kBandRows;
      const int j = i % kBandRows;
      const int row = first + j;
      if (row < args.rows) {
        args.output(16 * this_warp() + t, row / args.run * args.stride + row % args.run, own[t * kBandPitch + j],
                    own[t * kBandPitch + kBandRows + j]);
      }
    }
    __syncwarp();
  }
}

// The same for a cluster: token t is the affair of block t mod parts, to which all send their sums, [parts, token_rows
// / parts, pitch], and which adds them up.
template <int kRows, typename Output>
__device__ void put_together(const SmallGemmArgs<Output>& args, const BlockShare& share, int tile,
                             const float (&d)[kRows / 2], float* sums, const SmallGemmShared& layout, unsigned summed) {
  constexpr int kBands = kRows / (2 * kBandRows);
  constexpr int kPitch = kRows + kPitchPadding;
  const int parts = args.parts;
  const int of_block = layout.token_rows / parts * kPitch;  // from one block
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = 16 * this_warp() + this_lane() / 4 + 8 * h;
    if (t >= args.tokens) continue;
    const auto block = static_cast<unsigned>(t % parts);
    const unsigned told = in_block(summed, block);
    const unsigned to =
        in_block(shared_address(sums + share.part * of_block + t / parts * kPitch + 2 * (this_lane() % 4)), block);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      send(to + 32 * i, uint2{__float_as_uint(d[4 * i + 2 * h]), __float_as_uint(d[4 * i + 2 * h + 1])}, told);
    }
  }
  wait_phase_of_cluster(summed, 0);
  const int own_tokens = share.own_tokens(args);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < own_tokens * kRows / 2; i += kGroupThreads) {
    const int t = i / (kRows / 2);
    const int band = i % (kRows / 2) / kBandRows;
    const int j = i % kBandRows;
    const int row = (tile * kBands + band) * args.band_step + j;
    if (row >= args.rows) continue;
    const float* from = sums + t * kPitch + band * 2 * kBandRows + j;
    float low = 0.0F;
    float high = 0.0F;
    for (int part = 0; part < parts; ++part, from += of_block) {
      low += from[0];
      high += from[kBandRows];
    }
    args.output(t * parts + share.part, row / args.run * args.stride + row % args.run, low, high);
  }
}

#endif

template <typename T, int kRows, typename Output>
__global__ void __launch_bounds__(kSmallGemmThreads, kSmallGemmBlocks)
    multiply_tiles(const __grid_constant__ SmallGemmArgs<Output> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  const SmallGemmShared layout(args.tokens, kRows, args.parts);
  const BlockShare share(args);
  const unsigned ring = shared_address(memory);
  const SmallGemmBarriers barriers(ring + static_cast<unsigned>(layout.barriers(args.stages)));
  const auto begin_together = [&] {
    __syncthreads();
    if (args.parts > 1) arrive_in_cluster();
    wait_for_previous();
    if (args.parts > 1) wait_for_cluster();
  };
  if (this_warp() == kMultiplyWarps) {
    return fetch_stages<kRows>(args, share, layout, barriers, ring, begin_together);
  }
  begin_together();

  auto* const sums = reinterpret_cast<float*>(memory + layout.sums(args.stages));
  RingPlace place;
  for (int tile = share.first_tile; tile < args.tiles; tile += share.tile_step) {
    float d[kRows / 2] = {};
    int reading = 0;  // the stage whose products are under way
    for (int column = share.begin; column < share.end; ++column) {
      wait_phase(barriers.full + 8 * place.stage, place.parity);
      const std::uint64_t x = matrix_at(ring + static_cast<unsigned>(place.stage * layout.stage_bytes), 0);
      const std::uint64_t weight = matrix_ahead(x, layout.input_bytes);
      open_products();
#pragma unroll
      for (int k = 0; k < kColumnBytes; k += 32) multiply_tile<T>(d, matrix_ahead(x, k), matrix_ahead(weight, k));
      close_products();
      if (column > share.begin) {
        wait_products<1>();
        if (this_lane() == 0) arrive(barriers.free + 8 * reading);
      }
      reading = place.stage;
      place.advance(args.stages);
    }
    wait_sums(d);
    if (share.begin < share.end && this_lane() == 0) arrive(barriers.free + 8 * reading);
    if (args.parts == 1) {
      put_out<kRows>(args, tile, d, sums);
    } else {
      put_together<kRows>(args, share, tile, d, sums, layout, barriers.summed);
    }
  }
#endif
}

// How a product is cut: tiles of `rows` rows, each the work of `parts` blocks. `parts`, which decides the order of
// sums, depends on the shape of W and the device only.
struct TilePlan {
  int rows = 0;
  int parts = 1;
  int grid = 0;
};

TilePlan plan_tiles(std::int64_t rows, std::int64_t columns, int multiprocessors);

template <typename T, int kRows, typename Output>
void launch_tiles(const char* name, const Exec& exec, const TilePlan& plan, SmallGemmArgs<Output>& args) {
  const SmallGemmShared layout(args.tokens, kRows, plan.parts);
  args.stages = std::min(kMaxStages, (kBlockBytes - layout.bytes(0)) / layout.stage_bytes);
  args.tiles = (args.bands + kRows / (2 * kBandRows) - 1) / (kRows / (2 * kBandRows));
  launch(name, multiply_tiles<T, kRows, Output>,
         {.grid = dim3(static_cast<unsigned>(plan.grid)),
          .block = dim3(kSmallGemmThreads),
          .shared_bytes = static_cast<std::size_t>(layout.bytes(args.stages)),
          .overlap = true,
          .cluster = dim3(static_cast<unsigned>(plan.parts))},
         exec.stream, args);
}

// output(token, row, low, high): sums of row `row` of W and of its partner, which may lie behind the last row.
template <typename T, typename Output>
void launch_small_gemm(const char* name, const Exec& exec, int multiprocessors, const TensorRef& x,
                       const TensorRef& weight, const BandRows& bands, const Output& output) {
  const std::int64_t tokens = x.shape[0];
  const std::int64_t rows = weight.shape[0];
  const std::int64_t columns = weight.shape[1];
  const std::int64_t row_bytes = columns * static_cast<std::int64_t>(sizeof(T));
  const TilePlan plan = plan_tiles(rows, columns, multiprocessors);
  SmallGemmArgs<Output> args;
  args.x = tensor_map<2>(x.dtype, x.data, {columns, tokens}, {row_bytes},
                         {kStageColumns, static_cast<int>((tokens + 7) / 8 * 8)}, CU_TENSOR_MAP_SWIZZLE_128B);
  args.tokens = static_cast<int>(tokens);
  args.columns = static_cast<int>(columns);
  args.parts = plan.parts;
  args.rows = static_cast<int>(bands.rows);
  args.run = static_cast<int>(bands.run);
  args.stride = static_cast<int>(bands.stride);
  args.output = output;
  if (bands.partner == kBandRows) {
    args.weight =
        tensor_map<4>(weight.dtype, weight.data, {columns, rows, 1, 1}, {row_bytes, rows * row_bytes, rows * row_bytes},
                      {kStageColumns, 2 * kBandRows, 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
    args.band_step = 2 * kBandRows;
  } else {
    args.weight = tensor_map<4>(weight.dtype, weight.data, {columns, bands.run, bands.rows / bands.run, 2},
                                {row_bytes, bands.stride * row_bytes, bands.partner * row_bytes},
                                {kStageColumns, kBandRows, 1, 2}, CU_TENSOR_MAP_SWIZZLE_128B);
    args.band_step = kBandRows;
  }
  args.bands = static_cast<int>((bands.rows + args.band_step - 1) / args.band_step);
  if (plan.rows == 32) return launch_tiles<T, 32>(name, exec, plan, args);
  assert(plan.rows == 64);
  launch_tiles<T, 64>(name, exec, plan, args);
}

// The bands of a plain product.
inline BandRows bands_in_order(std::int64_t rows) {
  return {.rows = rows, .run = rows, .stride = rows, .partner = kBandRows};
}

}  // namespace vesper::cuda
