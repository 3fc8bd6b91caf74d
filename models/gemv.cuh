// The device half of products with few rows of x: sums = x W^T for 1 to 8 rows of x, every weight from memory to the
// tensor cores once. What x is and what becomes of the sums is the caller's: a plain product (gemv_cuda.cu), or one
// with the norm before it and the step after it (projections_cuda.cu).
//
//   W [rows, columns], x [tokens, columns] of a 16-bit type T
//   tile   16 rows of W = one mma.m16n8k16 tall, the 8 columns of the mma being the tokens (absent ones are zero). The
//          upper eight rows and the lower eight need not be neighbours (TileRows): a gate and its up, a rotary pair
//   block  8 warps; walks the tiles blockIdx.x, blockIdx.x + gridDim.x, ...
//   warp w of a tile takes the chunks of 32 columns w, w + 8, ...; the eight partial sums meet in shared memory
//   lane   (g, q) = (lane / 4, lane % 4) takes columns 8q ... 8q + 7 of a chunk from rows g and g + 8 of the tile and
//          from row g of x: 16 bytes each. A dot product does not mind in which order its terms come, so these eight
//          columns serve as the k indices {2q, 2q + 1, 2q + 8, 2q + 9} of two mma, on both sides alike: no shuffle.
//          Fragments: attention/mma.cuh.
//
// Bytes: W once. It bypasses L1 and registers (cp.async): a lane keeps kDepth chunks in flight in a ring of its own in
// shared memory, across the end of a tile too, and reads back only what it copied itself, so the loop has no barrier.
// In flight: 32 KiB a block, 96 KiB a multiprocessor, where latency times bandwidth asks for some 20 KiB (3 TB/s, 0.9
// us, 132 multiprocessors). The first kDepth chunks are on their way before the kernel in front has ended
// (engine/core/overlap.cuh): what hides the latency of the steps between two products.
#pragma once

#include <cstdint>

#include "attention/mma.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/vector.cuh"
#include "models/linear.h"

namespace vesper::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kGemvTokens = 8;
inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvThreads = 32 * kGemvWarps;
inline constexpr int kGemvChunk = 32;
inline constexpr int kGemvStride = kGemvWarps * kGemvChunk;  // columns from one chunk of a warp to its next
inline constexpr int kGemvDepth = 4;
inline constexpr int kGemvBlocks = 3;  // a multiprocessor
static_assert(kGemvTokens == kMaxGemvRows);

// Which rows of W a tile's sixteen are: eight from low(tile) on, and the eight that lie high_offset below them.
struct TileRows {
  int tiles = 0;
  int run_tiles = 1;    // tiles whose low rows follow each other
  int run_stride = 16;  // rows from the beginning of one run to the next
  int high_offset = 8;

  __device__ int low(int tile) const { return tile / run_tiles * run_stride + tile % run_tiles * 8; }
};

template <typename T>
struct StreamedWeight {
  const T* data = nullptr;  // [rows, columns]
  int rows = 0;
  int columns = 0;
  TileRows tile_rows;
};

// load_eight to shared memory; where kAligned it is under way until wait_copies.
template <bool kAligned, typename T>
__device__ void copy_eight(uint4* to, const T* from, int inside) {
  if constexpr (kAligned) {
    copy_chunk_async(shared_address(to), from, inside > 0);
  } else {
    *to = load_eight<false>(from, inside);
  }
}

// A lane's place in a warp, and the column of a tile's first chunk that it starts at.
struct Place {
  int warp = static_cast<int>(threadIdx.x) / 32;
  int group = static_cast<int>(threadIdx.x) % 32 / 4;
  int quad = static_cast<int>(threadIdx.x) % 4;
  int column = warp * kGemvChunk + quad * kVectorWidth;
};

// What a lane has under way of one chunk: its part of rows g and g + 8 of the tile.
struct Slot {
  uint4 low[kGemvThreads];
  uint4 high[kGemvThreads];
};

struct GemvShared {
  Slot ring[kGemvDepth];
  // Two by turns, so that one barrier a tile is enough: whoever writes for tile i + 2 has passed the barrier of tile
  // i + 1, which the readers of tile i came to after reading.
  float partial[2][kGemvWarps][kGemvTokens][kTileRows];
};

// Where a lane copies from: kDepth chunks ahead of the sums, over the end of one tile into the block's next.
template <typename T, bool kAligned>
class WeightStream {
 public:
  __device__ WeightStream(const StreamedWeight<T>& weight, int steps)
      : weight_(weight), steps_(steps), tile_(static_cast<int>(blockIdx.x)) {
    begin_tile();
  }

  // Queues the warp's next chunk as one group.
  __device__ void copy(Slot& slot) {
    copy_eight<kAligned>(&slot.low[threadIdx.x], low_, inside_);
    copy_eight<kAligned>(&slot.high[threadIdx.x], high_, inside_);
    commit_copies();
    low_ += kGemvStride;
    high_ += kGemvStride;
    inside_ -= kGemvStride;
    if (++step_ == steps_) {
      tile_ += static_cast<int>(gridDim.x);
      begin_tile();
    }
  }

 private:
  // Rows beyond the last are read as the last and their sums dropped; beyond the last tile nothing is read, and the
  // next kernel may have the memory.
  __device__ void begin_tile() {
    const Place place;
    const std::int64_t columns = weight_.columns;
    const bool any = tile_ < weight_.tile_rows.tiles;
    const int row = any ? weight_.tile_rows.low(tile_) + place.group : 0;
    step_ = 0;
    low_ = weight_.data + min(row, weight_.rows - 1) * columns + place.column;
    high_ = weight_.data + min(row + weight_.tile_rows.high_offset, weight_.rows - 1) * columns + place.column;
    inside_ = any ? weight_.columns - place.column : 0;
    if (!any) let_next_start();
  }

  const StreamedWeight<T>& weight_;
  int steps_;
  int tile_;
  int step_ = 0;
  int inside_ = 0;
  const T* low_ = nullptr;
  const T* high_ = nullptr;
};

// Runs a block of kGemvThreads threads over its tiles.
//   input.row(token) -> the row of x [columns], after wait_for_previous; for tokens below `tokens` only
//   output(token, row, low, high): sums of rows `row` and `row` + high_offset; rows may lie behind the last
template <typename T, bool kAligned, typename Input, typename Output>
__device__ void stream_products(const StreamedWeight<T>& weight, int tokens, GemvShared& shared, Input&& input,
                                Output&& output) {
  const int steps = (weight.columns + kGemvStride - 1) / kGemvStride;
  const Place place;
  WeightStream<T, kAligned> stream(weight, steps);
#pragma unroll
  for (int i = 0; i < kGemvDepth; ++i) stream.copy(shared.ring[i]);

  const T* x = input.row(min(place.group, tokens - 1)) + place.column;
  const int x_inside = place.group < tokens ? weight.columns - place.column : 0;
  int next = 0;
  int turn = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < weight.tile_rows.tiles;
       tile += static_cast<int>(gridDim.x), turn ^= 1) {
    float sum[2][4] = {};  // of a chunk's two mma: half as long a chain of dependent ones
    for (int step = 0; step < steps; ++step) {
      const uint4 b = load_eight<kAligned>(x + step * kGemvStride, x_inside - step * kGemvStride);
      wait_copies<kGemvDepth - 1>();
      const uint4 low = shared.ring[next].low[threadIdx.x];
      const uint4 high = shared.ring[next].high[threadIdx.x];
      multiply_add<T>(sum[0], {low.x, high.x, low.y, high.y}, b.x, b.y);
      multiply_add<T>(sum[1], {low.z, high.z, low.w, high.w}, b.z, b.w);
      stream.copy(shared.ring[next]);
      next = next + 1 == kGemvDepth ? 0 : next + 1;
    }
    auto& partial = shared.partial[turn];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * place.quad + i;
      if (t < tokens) {
        partial[place.warp][t][place.group] = sum[0][i] + sum[1][i];
        partial[place.warp][t][place.group + 8] = sum[0][i + 2] + sum[1][i + 2];
      }
    }
    __syncthreads();
    const int t = static_cast<int>(threadIdx.x) / 8;
    const int row = static_cast<int>(threadIdx.x) % 8;
    if (t < tokens) {
      float low = 0.0F;
      float high = 0.0F;
#pragma unroll
      for (int w = 0; w < kGemvWarps; ++w) {
        low += partial[w][t][row];
        high += partial[w][t][row + 8];
      }
      output(t, weight.tile_rows.low(tile) + row, low, high);
    }
  }
  wait_copies<0>();  // what was queued beyond the last tile
}

// Blocks of a grid over `tiles` tiles on a device that runs `resident` side by side.
inline unsigned gemv_blocks(int tiles, int resident) {
  return static_cast<unsigned>(tiles < resident ? tiles : resident);
}

}  // namespace vesper::cuda
