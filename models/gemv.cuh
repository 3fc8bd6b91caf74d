// The device half of products with few rows of x: sums = x W^T for 1 to 8 rows of x, every weight from memory to the
// tensor cores once. What x is and what becomes of the sums is the caller's: a plain product (gemv_cuda.cu), or one
// with the step after it (projections_cuda.cu).
//
//   W [rows, columns], x [tokens, columns] of a 16-bit type T
//   tile   16 rows of W = one mma.m16n8k16 tall, the 8 columns of the mma being the tokens (absent ones are zero). The
//          upper eight rows and the lower eight need not be neighbours (TileRows): a gate and its up, a rotary pair
//   block  8 warps; walks the tiles blockIdx.x, blockIdx.x + gridDim.x, ...
//   warp w of a tile takes the chunks of 128 columns w, w + 8, ...; the eight partial sums meet in shared memory
//   lane   (g, q) = (lane / 4, lane % 4) takes of every 32 columns 8q ... 8q + 7 from rows g and g + 8 of the tile and
//          from row g of x: 16 bytes each. A dot product does not mind in which order its terms come, so these eight
//          columns serve as the k indices {2q, 2q + 1, 2q + 8, 2q + 9} of two mma, on both sides alike: no shuffle.
//          Fragments: attention/mma.cuh.
//
// Bytes: W once. A warp keeps `depth` chunks in flight in a ring of its own in shared memory, across the end of a tile
// too; nobody else reads it, so the loop has no barrier. On compute capability 9.0 a chunk is 16 bulk copies of 256
// bytes that report to a barrier of the warp's; before that, cp.async by all lanes. In flight on an H100: two blocks of
// 3 * 32 KiB a multiprocessor. Latency times bandwidth asks for a quarter of that (3.1 TB/s, 1 us, 132
// multiprocessors); the rest is what goes on arriving while warps add up a tile or wait for the kernel in front, whose
// end the first chunks do not wait for (engine/core/overlap.cuh).
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/mma.cuh"
#include "engine/core/bulk_copy.cuh"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/vector.cuh"
#include "models/linear.h"

namespace vesper::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kGemvTokens = 8;
inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvThreads = 32 * kGemvWarps;
inline constexpr int kGemvChunk = 128;
inline constexpr int kChunkParts = kGemvChunk / 32;
inline constexpr int kGemvStride = kGemvWarps * kGemvChunk;  // columns from one chunk of a warp to its next
inline constexpr int kGemvMaxDepth = 4;
inline constexpr int kGemvBlocks = 2;  // a multiprocessor
inline constexpr int kPartials = 2;
inline constexpr int kChunkRowBytes = 2 * kGemvChunk;
inline constexpr int kGemvStageBytes = kTileRows * kChunkRowBytes;           // of one warp
inline constexpr std::size_t kRingStepBytes = kGemvWarps * kGemvStageBytes;  // of a block, for each step of depth
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

// From L2 the first time a multiprocessor meets it, and from L1 after that.
template <typename T>
struct StreamedInput {
  const T* x = nullptr;  // [tokens, columns]
  int tokens = 0;
};

template <typename T>
StreamedInput<T> streamed_input(const TensorRef& x) {
  return {static_cast<const T*>(x.data), static_cast<int>(x.shape[0])};
}

// A block's shared memory: this, then the rings of the warps.
struct GemvShared {
  float partial[kPartials][kGemvWarps][kGemvTokens][kTileRows];  // of tiles by turns
  std::uint64_t landed[kGemvWarps][kGemvMaxDepth];
  std::uint64_t summed[kPartials];  // all warps have put their part there
  std::uint64_t taken[kPartials];   // the parts have been added up: the place is free
  std::uint64_t unused[16 - 2 * kPartials];
};
static_assert(sizeof(GemvShared) % 128 == 0);

// The chunks of one warp on their way: depth ahead of the sums, over the end of one tile into the block's next.
template <typename T, bool kAligned>
class WeightStream {
 public:
  __device__ WeightStream(const StreamedWeight<T>& weight, int steps, int depth, GemvShared& shared,
                          unsigned char* rings)
      : weight_(weight),
        steps_(steps),
        depth_(depth),
        tile_(static_cast<int>(blockIdx.x)),
        landed_(shared.landed[this_warp()]),
        ring_(rings + this_warp() * depth * kGemvStageBytes) {
    if constexpr (kBulk) {
      if (this_lane() == 0) {
        for (int i = 0; i < depth_; ++i) init_barrier(&landed_[i], 1);
        publish_barriers();
      }
      __syncwarp();
    }
    begin_tile();
    for (int i = 0; i < depth_; ++i) copy(i);
  }

  // The oldest chunk, [kTileRows, kGemvChunk], once it has landed.
  __device__ const unsigned char* front() {
    if constexpr (kBulk) {
      wait_barrier(&landed_[slot_], phase_);
    } else {
      wait_all_but(depth_ - 1);
      __syncwarp();
    }
    return ring_ + slot_ * kGemvStageBytes;
  }

  // Gives its place to the next one. All lanes have read what they need.
  __device__ void pop() {
    __syncwarp();
    copy(slot_);
    if (++slot_ == depth_) {
      slot_ = 0;
      phase_ ^= 1U;
    }
  }

 private:
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr bool kBulk = kAligned;
#else
  static constexpr bool kBulk = false;
#endif

  __device__ void copy(int slot) {
    unsigned char* stage = ring_ + slot * kGemvStageBytes;
    const int lane = this_lane();
    if constexpr (kBulk) {
      const unsigned bytes = static_cast<unsigned>(max(0, min(inside_, kGemvChunk))) * 2U;
      if (lane == 0) expect_bytes(&landed_[slot], kTileRows * bytes);
      __syncwarp();
      if (lane < kTileRows && bytes > 0) copy_bulk(stage + lane * kChunkRowBytes, row_, bytes, &landed_[slot]);
    } else {
      // A lane takes every other 16 bytes of its row.
      const int odd = lane / kTileRows;
      for (int c = odd; c < kGemvChunk / kVectorWidth; c += 2) {
        uint4* to = reinterpret_cast<uint4*>(stage + lane % kTileRows * kChunkRowBytes) + c;
        const int inside = inside_ - c * kVectorWidth;
        if constexpr (kAligned) {
          copy_chunk_async(shared_address(to), row_ + c * kVectorWidth, inside > 0);
        } else {
          *to = load_eight<false>(row_ + c * kVectorWidth, inside);
        }
      }
      commit_copies();
    }
    row_ += kGemvStride;
    inside_ -= kGemvStride;
    if (++step_ == steps_) {
      tile_ += static_cast<int>(gridDim.x);
      begin_tile();
    }
  }

  // Rows beyond the last are read as the last and their sums dropped; beyond the last tile nothing is read, and the
  // next kernel may have the memory.
  __device__ void begin_tile() {
    const bool any = tile_ < weight_.tile_rows.tiles;
    const int column = this_warp() * kGemvChunk;
    const int line = this_lane() % kTileRows;
    const int row = any ? weight_.tile_rows.low(tile_) + line % 8 + line / 8 * weight_.tile_rows.high_offset : 0;
    step_ = 0;
    row_ = weight_.data + static_cast<std::int64_t>(min(row, weight_.rows - 1)) * weight_.columns + column;
    inside_ = any ? weight_.columns - column : 0;
    if (!any) let_next_start();
  }

  static __device__ void wait_all_but(int pending) {
    switch (pending) {
      case 0:
        return wait_copies<0>();
      case 1:
        return wait_copies<1>();
      case 2:
        return wait_copies<2>();
      case 3:
        return wait_copies<3>();
      default:
        return wait_copies<4>();
    }
  }

  const StreamedWeight<T>& weight_;
  int steps_;
  int depth_;
  int tile_;
  int step_ = 0;
  int inside_ = 0;
  const T* row_ = nullptr;  // where this lane's row of the next chunk begins
  int slot_ = 0;
  unsigned phase_ = 0;
  std::uint64_t* landed_;
  unsigned char* ring_;
};

// This lane's parts of a row of a chunk: columns 32 c + 8 q for c = 0, 1, ... Eight lanes read at a time, of two
// neighbouring rows, which lie on the same banks: odd rows therefore read each pair of parts the other way round.
__device__ inline void load_row(const unsigned char* stage, int line, uint4 (&parts)[kChunkParts]) {
  const bool odd = line % 2 != 0;
  const auto* row = reinterpret_cast<const uint4*>(stage + line * kChunkRowBytes) + this_lane() % 4;
#pragma unroll
  for (int c = 0; c < kChunkParts; c += 2) {
    const uint4 first = row[4 * c + (odd ? 4 : 0)];
    const uint4 second = row[4 * c + (odd ? 0 : 4)];
    parts[c] = odd ? second : first;
    parts[c + 1] = odd ? first : second;
  }
}

// Runs a block of kGemvThreads threads over its tiles.
//   output(token, row, low, high): sums of rows `row` and `row` + high_offset; rows may lie behind the last
template <typename T, bool kAligned, typename Output>
__device__ void stream_products(const StreamedWeight<T>& weight, const StreamedInput<T>& input, int depth,
                                unsigned char* memory, const Output& output) {
  auto& shared = *reinterpret_cast<GemvShared*>(memory);
  const int steps = (weight.columns + kGemvStride - 1) / kGemvStride;
  const int group = this_lane() / 4;
  const int quad = this_lane() % 4;
  const int column = this_warp() * kGemvChunk + quad * kVectorWidth;
  const int warp_columns = weight.columns - this_warp() * kGemvChunk;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPartials; ++i) {
      init_barrier(&shared.summed[i], kGemvWarps);
      init_barrier(&shared.taken[i], 1);
    }
  }
  WeightStream<T, kAligned> stream(weight, steps, depth, shared, memory + sizeof(GemvShared));
  __syncthreads();

  wait_for_previous();
  const int tokens = input.tokens;
  const T* x = input.x + static_cast<std::int64_t>(min(group, tokens - 1)) * weight.columns + column;
  int turn = 0;  // tiles of this block so far
  for (int tile = static_cast<int>(blockIdx.x); tile < weight.tile_rows.tiles;
       tile += static_cast<int>(gridDim.x), ++turn) {
    float sum[2][4] = {};  // of a part's two mma: half as long a chain of dependent ones
    for (int step = 0; step < steps; ++step) {
      const int inside = weight.columns - column - step * kGemvStride;
      uint4 b[kChunkParts];
#pragma unroll
      for (int c = 0; c < kChunkParts; ++c) {
        b[c] = load_eight<kAligned>(x + step * kGemvStride + 32 * c, group < tokens ? inside - 32 * c : 0);
      }
      const unsigned char* stage = stream.front();
      uint4 low[kChunkParts];
      uint4 high[kChunkParts];
      load_row(stage, group, low);
      load_row(stage, group + 8, high);
      // A chunk over the end of its row: what lies there is of an older chunk, or nobody's.
      if (warp_columns - step * kGemvStride < kGemvChunk) {
#pragma unroll
        for (int c = 0; c < kChunkParts; ++c) {
          if (inside <= 32 * c) low[c] = high[c] = uint4{};
        }
      }
#pragma unroll
      for (int c = 0; c < kChunkParts; ++c) {
        multiply_add<T>(sum[0], {low[c].x, high[c].x, low[c].y, high[c].y}, b[c].x, b[c].y);
        multiply_add<T>(sum[1], {low[c].z, high[c].z, low[c].w, high[c].w}, b[c].z, b[c].w);
      }
      stream.pop();
    }
    // Warps do not wait for each other here but for one of them, each time another, that adds up.
    const int place = turn % kPartials;
    const unsigned parity = static_cast<unsigned>(turn / kPartials) % 2U;
    auto& partial = shared.partial[place];
    wait_barrier(&shared.taken[place], parity ^ 1U);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * quad + i;
      if (t < tokens) {
        partial[this_warp()][t][group] = sum[0][i] + sum[1][i];
        partial[this_warp()][t][group + 8] = sum[0][i + 2] + sum[1][i + 2];
      }
    }
    __syncwarp();
    if (this_lane() == 0) arrive(&shared.summed[place]);
    if (turn % kGemvWarps != this_warp()) continue;
    wait_barrier(&shared.summed[place], parity);
    for (int i = this_lane(); i < 8 * tokens; i += static_cast<int>(kWarpThreads)) {
      const int t = i / 8;
      const int row = i % 8;
      float low = 0.0F;
      float high = 0.0F;
#pragma unroll
      for (int w = 0; w < kGemvWarps; ++w) {
        low += partial[w][t][row];
        high += partial[w][t][row + 8];
      }
      output(t, weight.tile_rows.low(tile) + row, low, high);
    }
    __syncwarp();
    if (this_lane() == 0) arrive(&shared.taken[place]);
  }
}

// How a product is laid over the device.
struct GemvLayout {
  unsigned blocks = 0;
  int depth = 0;

  [[nodiscard]] Dims dims() const {
    return {.grid = dim3(blocks),
            .block = dim3(kGemvThreads),
            .shared_bytes = sizeof(GemvShared) + static_cast<std::size_t>(depth) * kRingStepBytes,
            .overlap = true};
  }
};

inline GemvLayout gemv_layout(int tiles, int multiprocessors) {
  int device = 0;
  int bytes = 0;
  check(cudaGetDevice(&device), "asking for the current GPU");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "reading the GPU's properties");
  constexpr int kReserved = 1024;  // by the driver, a block
  const int ring = bytes / kGemvBlocks - kReserved - static_cast<int>(sizeof(GemvShared));
  // As many tiles for each block, or one less for some: rather fewer blocks than some with twice the work of others.
  const int resident = kGemvBlocks * multiprocessors;
  const int rounds = std::max(1, (tiles + resident - 1) / resident);
  return {.blocks = static_cast<unsigned>((tiles + rounds - 1) / rounds),
          .depth = std::clamp(ring / static_cast<int>(kRingStepBytes), 1, kGemvMaxDepth)};
}

}  // namespace vesper::cuda
