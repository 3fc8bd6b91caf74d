// out = x W^T for 1 to 8 rows of x: every weight goes from memory to the tensor cores once.
//
//   W [rows, columns], x [tokens, columns] of a 16-bit type T; out [tokens, rows] T or f32
//   tile   16 rows of W = one mma.m16n8k16 tall, the 8 columns of the mma being the tokens (absent ones are zero)
//   block  8 warps; walks the tiles blockIdx.x, blockIdx.x + gridDim.x, ...
//   warp w of a tile takes the chunks of 32 columns w, w + 8, ...; the eight partial sums meet in shared memory
//   lane   (g, q) = (lane / 4, lane % 4) takes columns 8q ... 8q + 7 of a chunk from rows g and g + 8 of the tile and
//          from row g of x: 16 bytes each. A dot product does not mind in which order its terms come, so these eight
//          columns serve as the k indices {2q, 2q + 1, 2q + 8, 2q + 9} of two mma, on both sides alike: no shuffle.
//          Fragments: attention/mma.cuh.
//
// Bytes: W once; x comes from L2 the first time a multiprocessor meets it and from L1 after that. W bypasses L1 and
// registers (cp.async): a lane keeps kDepth chunks in flight in a ring of its own in shared memory, across the end of a
// tile too, and reads back only what it copied itself, so the loop has no barrier. In flight: 32 KiB a block, 96 KiB a
// multiprocessor, where latency times bandwidth asks for some 20 KiB (3 TB/s, 0.9 us, 132 multiprocessors). Any shape
// is taken; rows that are not 16-byte aligned are loaded by the element, slowly.
#include <algorithm>
#include <cassert>
#include <cstdint>

#include "attention/mma.cuh"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/vector.cuh"
#include "models/gemv.h"
#include "models/linear.h"

namespace vesper::cuda {
namespace {

constexpr int kTileRows = 16;
constexpr int kTokens = 8;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 32;
constexpr int kStride = kWarps * kChunk;  // columns from one chunk of a warp to its next
constexpr int kDepth = 4;
constexpr int kBlocksPerMultiprocessor = 3;
static_assert(kTokens == kMaxGemvRows);

template <typename T, typename Out>
struct GemvArgs {
  const T* x;
  const T* weight;
  Out* out;
  int tokens;
  int rows;
  int columns;
};

// Eight elements, of which `inside` (0 or less: none) are inside their row; zero in place of the others. Where kAligned
// a row ends with a multiple of eight.
template <bool kAligned, typename T>
__device__ uint4 load_eight(const T* from, int inside) {
  if constexpr (kAligned) {
    return inside > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{};
  } else {
    unsigned word[4] = {};
#pragma unroll
    for (int i = 0; i < kVectorWidth; ++i) {
      if (i < inside) word[i / 2] |= static_cast<unsigned>(from[i].bits) << (16 * (i % 2));
    }
    return {word[0], word[1], word[2], word[3]};
  }
}

// The same to shared memory; where kAligned it is under way until wait_copies.
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
  int column = warp * kChunk + quad * kVectorWidth;
};

// What a lane has under way of one chunk: its part of rows g and g + 8 of the tile.
struct Slot {
  uint4 low[kThreads];
  uint4 high[kThreads];
};

// Where a lane copies from: kDepth chunks ahead of the sums, over the end of one tile into the block's next.
template <typename T, typename Out, bool kAligned>
class Copier {
 public:
  __device__ Copier(const GemvArgs<T, Out>& args, int steps)
      : args_(args), steps_(steps), tile_(static_cast<int>(blockIdx.x)) {
    begin_tile();
  }

  // Queues the warp's next chunk as one group.
  __device__ void copy(Slot& slot) {
    copy_eight<kAligned>(&slot.low[threadIdx.x], low_, inside_);
    copy_eight<kAligned>(&slot.high[threadIdx.x], high_, inside_);
    commit_copies();
    low_ += kStride;
    high_ += kStride;
    inside_ -= kStride;
    if (++step_ == steps_) {
      tile_ += static_cast<int>(gridDim.x);
      begin_tile();
    }
  }

 private:
  // Rows beyond the last are read as the last and their sums dropped; beyond the last tile nothing is read.
  __device__ void begin_tile() {
    const Place place;
    const int row = tile_ * kTileRows + place.group;
    const std::int64_t columns = args_.columns;
    step_ = 0;
    low_ = args_.weight + min(row, args_.rows - 1) * columns + place.column;
    high_ = args_.weight + min(row + 8, args_.rows - 1) * columns + place.column;
    inside_ = tile_ * kTileRows < args_.rows ? args_.columns - place.column : 0;
  }

  const GemvArgs<T, Out>& args_;
  int steps_;
  int tile_;
  int step_ = 0;
  int inside_ = 0;
  const T* low_ = nullptr;
  const T* high_ = nullptr;
};

template <typename T, typename Out, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    multiply_rows(const __grid_constant__ GemvArgs<T, Out> args) {
  __shared__ Slot ring[kDepth];
  // Two by turns, so that one barrier a tile is enough: whoever writes for tile i + 2 has passed the barrier of tile
  // i + 1, which the readers of tile i came to after reading.
  __shared__ float partial[2][kWarps][kTokens][kTileRows];
  const int tiles = (args.rows + kTileRows - 1) / kTileRows;
  const int steps = (args.columns + kStride - 1) / kStride;
  const Place place;
  const T* x = args.x + static_cast<std::int64_t>(place.group) * args.columns + place.column;
  const int x_inside = place.group < args.tokens ? args.columns - place.column : 0;

  Copier<T, Out, kAligned> copier(args, steps);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) copier.copy(ring[i]);

  int next = 0;
  int turn = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x), turn ^= 1) {
    float sum[2][4] = {};  // of a chunk's two mma: half as long a chain of dependent ones
    for (int step = 0; step < steps; ++step) {
      const uint4 b = load_eight<kAligned>(x + step * kStride, x_inside - step * kStride);
      wait_copies<kDepth - 1>();
      const uint4 low = ring[next].low[threadIdx.x];
      const uint4 high = ring[next].high[threadIdx.x];
      multiply_add<T>(sum[0], {low.x, high.x, low.y, high.y}, b.x, b.y);
      multiply_add<T>(sum[1], {low.z, high.z, low.w, high.w}, b.z, b.w);
      copier.copy(ring[next]);
      next = next + 1 == kDepth ? 0 : next + 1;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * place.quad + i;
      if (t < args.tokens) {
        partial[turn][place.warp][t][place.group] = sum[0][i] + sum[1][i];
        partial[turn][place.warp][t][place.group + 8] = sum[0][i + 2] + sum[1][i + 2];
      }
    }
    __syncthreads();
    const int t = static_cast<int>(threadIdx.x) / kTileRows;
    const int row = static_cast<int>(threadIdx.x) % kTileRows;
    if (t < args.tokens && tile * kTileRows + row < args.rows) {
      float total = 0.0F;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += partial[turn][w][t][row];
      args.out[static_cast<std::int64_t>(t) * args.rows + tile * kTileRows + row] = narrow<Out>(total);
    }
  }
  wait_copies<0>();  // what was queued beyond the last tile
}

template <typename T, typename Out>
void gemv_typed(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                const TensorRef& out) {
  const GemvArgs<T, Out> args{.x = static_cast<const T*>(x.data),
                              .weight = static_cast<const T*>(weight.data),
                              .out = static_cast<Out*>(out.data),
                              .tokens = static_cast<int>(x.shape[0]),
                              .rows = static_cast<int>(weight.shape[0]),
                              .columns = static_cast<int>(weight.shape[1])};
  const int tiles = (args.rows + kTileRows - 1) / kTileRows;
  const Dims dims{.grid = dim3(static_cast<unsigned>(std::min(tiles, kBlocksPerMultiprocessor * multiprocessors))),
                  .block = dim3(kThreads)};
  if (rows_are_vectors(args.columns, {x.data, weight.data})) {
    return launch("gemv", multiply_rows<T, Out, true>, dims, exec.stream, args);
  }
  launch("gemv", multiply_rows<T, Out, false>, dims, exec.stream, args);
}

}  // namespace

void gemv(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight, const TensorRef& out) {
  assert(x.dtype == weight.dtype && x.shape[0] >= 1 && x.shape[0] <= kMaxGemvRows);
  assert(x.shape[1] == weight.shape[1] && out.shape[0] == x.shape[0] && out.shape[1] == weight.shape[0]);
  dispatch_16bit(x.dtype, "gemv", [&](auto element) {
    using T = decltype(element);
    if (out.dtype == DType::kF32) return gemv_typed<T, float>(exec, multiprocessors, x, weight, out);
    assert(out.dtype == x.dtype);
    gemv_typed<T, T>(exec, multiprocessors, x, weight, out);
  });
}

}  // namespace vesper::cuda
