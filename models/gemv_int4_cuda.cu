// out = x W^T for 1 to 8 rows of x and W in 4 bits (models/int4.h): every code goes from memory to the tensor cores
// once.
//
//   x [tokens, columns] of a 16-bit type T; W [rows, columns] in cells; out [tokens, rows] T or f32
//   tile   32 rows of W = two cells on top of each other = two mma.m16n8k16 tall, the 8 columns of the mma being the
//          tokens (absent ones are zero). Two, so that a load of x serves twice as many weights: at 8 tokens x is as
//          many bytes as the codes of 32 rows, and would be twice those of 16.
//   block  8 warps; walks the tiles blockIdx.x, blockIdx.x + gridDim.x, ...
//   warp w of a tile takes its spans w, w + 8, ...; the eight partial sums meet in shared memory
//   lane   (g, q) = (lane / 4, lane % 4) takes 16 bytes of rows g and g + 8 of each cell: octets q, q + 4, q + 8, q +
//   12
//          of the span, and of row g of x the same octets. An octet serves as the k indices {2q, 2q + 1, 2q + 8, 2q +
//          9} of two mma, on both sides alike, as in models/gemv_cuda.cu. Fragments: attention/mma.cuh.
//
// Codes less 8 are exact in either type, and so are their products with x in the tensor cores; a span's sum is fp32 and
// is multiplied by the row's scale once. The order of all sums depends on the columns only.
//
// From code to number: OR-ed into the mantissa of a power of two whose last place is 1 (bf16 128, f16 1024), a code
// adds itself; one subtraction, exact, takes the power and the 8 away. Masks fetch two columns at once, as the layout
// has column 2 p + 1 sixteen bits above column 2 p. Source: Kim, Henry, Fahim, Awadalla, "Who Says Elephants Can't
// Run", arXiv 2211.10017 (there to f16). Some 11 instructions for 8 weights of a lane, where at 3 TB/s a multiprocessor
// is to take 27 weights a clock: a third of what its integer units do.
//
// Bytes: W once, 4.125 bits a weight; x from L2 once a block, then from L1. W bypasses L1 and registers (cp.async): a
// lane keeps kDepth steps in flight in a ring of its own in shared memory, across the end of a tile too, and reads back
// only what it copied itself, so the loop has no barrier. In flight: 64 KiB a block, where the whole chip needs
// some 2.7 MB (3 TB/s, 0.9 us): 42 blocks. The first kDepth steps are on their way before the kernel in front has ended
// (engine/core/overlap.cuh): a matrix of 4096 x 4096 is then in flight whole. Rows of x that are not 16-byte aligned
// are loaded by the element, slowly.
#include <algorithm>
#include <cassert>
#include <cstdint>
#include <type_traits>

#include "attention/mma.cuh"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/vector.cuh"
#include "models/gemv.h"
#include "models/linear.h"

namespace vesper::cuda {
namespace {

constexpr int kCells = 2;  // of a tile, on top of each other
constexpr int kTileRows = kCells * kInt4CellRows;
constexpr int kTokens = 8;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStride = kWarps * kInt4SpanColumns;  // columns from one span of a warp to its next
constexpr int kDepth = 4;
constexpr int kBlocksPerMultiprocessor = 2;
static_assert(kTokens == kMaxGemvRows && kTokens * kTileRows == kThreads);

template <typename T, typename Out>
struct GemvInt4Args {
  const T* x;
  const std::byte* weight;
  Out* out;
  int tokens;
  int rows;
  int columns;
  int spans;
};

// a * b + c on pairs of 16-bit numbers, rounded once.
template <typename T>
__device__ unsigned fma_pair(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

// The eight codes of a word less 8: columns 2 p and 2 p + 1 in pair[p].
template <typename T>
__device__ void widen_codes(unsigned word, unsigned (&pair)[4]) {
  if constexpr (std::is_same_v<T, bf16>) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {  // 128 + code, times 1, less 136
      pair[p] = fma_pair<T>((word >> (4 * p) & 0x000F000FU) | 0x43004300U, 0x3F803F80U, 0xC308C308U);
    }
  } else {
#pragma unroll
    for (int p = 0; p < 4; p += 2) {
      const unsigned two = word >> (4 * p);
      // 1024 + code, times 1, less 1032; and 1024 + 16 code, times 1/16, less 72.
      pair[p] = fma_pair<T>((two & 0x000F000FU) | 0x64006400U, 0x3C003C00U, 0xE408E408U);
      pair[p + 1] = fma_pair<T>((two & 0x00F000F0U) | 0x64006400U, 0x2C002C00U, 0xD480D480U);
    }
  }
}

// Queues a copy of 4 bytes from device to shared memory; zeros where not valid.
__device__ void copy_word_async(unsigned to, const void* from, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// What the lanes of a block have under way of one step: of each cell its part of rows g and g + 8, and their two
// scales.
struct Slot {
  uint4 codes[kCells][2][kThreads];
  unsigned scales[kCells][kThreads];
};
constexpr int kRingBytes = kDepth * static_cast<int>(sizeof(Slot));

// Where a lane copies from: kDepth steps ahead of the sums, over the end of one tile into the block's next.
template <typename Args>
class Copier {
 public:
  __device__ Copier(const Args& args, int steps) : args_(args), steps_(steps), tile_(static_cast<int>(blockIdx.x)) {
    begin_tile();
  }

  // Queues the warp's next span as one group.
  __device__ void copy(Slot& slot) {
    const bool valid = span_ < end_;
#pragma unroll
    for (int c = 0; c < kCells; ++c) {
      const std::byte* codes = cell_[c] + 16 * this_lane();
      const std::byte* scales = cell_[c] + kInt4CodesBytes + 4 * (this_lane() / 4);
      copy_chunk_async(shared_address(&slot.codes[c][0][threadIdx.x]), codes, valid);
      copy_chunk_async(shared_address(&slot.codes[c][1][threadIdx.x]), codes + kInt4CodesBytes / 2, valid);
      copy_word_async(shared_address(&slot.scales[c][threadIdx.x]), scales, valid);
      cell_[c] += kWarps * kInt4CellBytes;
    }
    commit_copies();
    span_ += kWarps;
    if (++step_ == steps_) {
      tile_ += static_cast<int>(gridDim.x);
      begin_tile();
    }
  }

 private:
  // Cells beyond the last are read as the last and their sums dropped; beyond the last tile nothing is read, and the
  // next kernel may have the memory.
  __device__ void begin_tile() {
    const int bands = (args_.rows + kInt4CellRows - 1) / kInt4CellRows;
    step_ = 0;
    span_ = this_warp();
    end_ = tile_ * kCells < bands ? args_.spans : 0;
#pragma unroll
    for (int c = 0; c < kCells; ++c) {
      const std::int64_t band = min(tile_ * kCells + c, bands - 1);
      cell_[c] = args_.weight + (band * args_.spans + span_) * kInt4CellBytes;
    }
    if (end_ == 0) let_next_start();
  }

  const Args& args_;
  int steps_;
  int tile_;
  int step_ = 0;
  int span_ = 0;
  int end_ = 0;
  const std::byte* cell_[kCells] = {};
};

// sum[i] += the scaled products of one cell and span; i as in the fragment D, tokens across.
template <typename T>
__device__ void multiply_cell(const uint4& low, const uint4& high, unsigned scales, const uint4 (&x)[4],
                              float (&sum)[4]) {
  const unsigned low_words[4] = {low.x, low.y, low.z, low.w};
  const unsigned high_words[4] = {high.x, high.y, high.z, high.w};
  float even[4] = {};  // of an octet's two mma: half as long a chain of dependent ones
  float odd[4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    unsigned upper[4];  // row g
    unsigned lower[4];  // row g + 8
    widen_codes<T>(low_words[k], upper);
    widen_codes<T>(high_words[k], lower);
    multiply_add<T>(even, {upper[0], lower[0], upper[1], lower[1]}, x[k].x, x[k].y);
    multiply_add<T>(odd, {upper[2], lower[2], upper[3], lower[3]}, x[k].z, x[k].w);
  }
  const float2 scale = widen_pair<f16>(scales);
  sum[0] += scale.x * (even[0] + odd[0]);
  sum[1] += scale.x * (even[1] + odd[1]);
  sum[2] += scale.y * (even[2] + odd[2]);
  sum[3] += scale.y * (even[3] + odd[3]);
}

template <typename T, typename Out, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    multiply_int4_rows(const __grid_constant__ GemvInt4Args<T, Out> args) {
  extern __shared__ __align__(16) unsigned char shared[];
  Slot* ring = reinterpret_cast<Slot*>(shared);
  // Two by turns, so that one barrier a tile is enough: whoever writes for tile i + 2 has passed the barrier of tile
  // i + 1, which the readers of tile i came to after reading.
  __shared__ float partial[2][kWarps][kTokens][kTileRows];
  const int tiles = (args.rows + kTileRows - 1) / kTileRows;
  const int steps = (args.spans + kWarps - 1) / kWarps;
  const int group = this_lane() / 4;
  const int quad = this_lane() % 4;
  const int first_column = this_warp() * kInt4SpanColumns + quad * kVectorWidth;
  const T* x = args.x + static_cast<std::int64_t>(group) * args.columns + first_column;
  const int x_inside = group < args.tokens ? args.columns - first_column : 0;

  Copier<GemvInt4Args<T, Out>> copier(args, steps);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) copier.copy(ring[i]);
  wait_for_previous();

  int next = 0;
  int turn = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x), turn ^= 1) {
    float sum[kCells][4] = {};
    for (int step = 0; step < steps; ++step) {
      uint4 octets[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = step * kStride + k * 32;
        octets[k] = load_eight<kAligned>(x + column, x_inside - column);
      }
      wait_copies<kDepth - 1>();
      const Slot& slot = ring[next];
#pragma unroll
      for (int c = 0; c < kCells; ++c) {
        multiply_cell<T>(slot.codes[c][0][threadIdx.x], slot.codes[c][1][threadIdx.x], slot.scales[c][threadIdx.x],
                         octets, sum[c]);
      }
      copier.copy(ring[next]);
      next = next + 1 == kDepth ? 0 : next + 1;
    }
#pragma unroll
    for (int c = 0; c < kCells; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* to = &partial[turn][this_warp()][2 * quad + i][c * kInt4CellRows + group];
        to[0] = sum[c][i];
        to[8] = sum[c][i + 2];
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
void gemv_int4_typed(const Exec& exec, int multiprocessors, const TensorRef& x, const Int4Matrix& weight,
                     const TensorRef& out) {
  const GemvInt4Args<T, Out> args{.x = static_cast<const T*>(x.data),
                                  .weight = weight.data,
                                  .out = static_cast<Out*>(out.data),
                                  .tokens = static_cast<int>(x.shape[0]),
                                  .rows = static_cast<int>(weight.rows),
                                  .columns = static_cast<int>(weight.columns),
                                  .spans = static_cast<int>(weight.spans())};
  const int tiles = (args.rows + kTileRows - 1) / kTileRows;
  const Dims dims{.grid = dim3(static_cast<unsigned>(std::min(tiles, kBlocksPerMultiprocessor * multiprocessors))),
                  .block = dim3(kThreads),
                  .shared_bytes = kRingBytes,
                  .overlap = true};
  if (rows_are_vectors(args.columns, {x.data})) {
    return launch("gemv_int4", multiply_int4_rows<T, Out, true>, dims, exec.stream, args);
  }
  launch("gemv_int4", multiply_int4_rows<T, Out, false>, dims, exec.stream, args);
}

}  // namespace

void gemv_int4(const Exec& exec, int multiprocessors, const TensorRef& x, const Int4Matrix& weight,
               const TensorRef& out) {
  assert(x.shape[0] >= 1 && x.shape[0] <= kMaxGemvRows && x.shape[1] == weight.columns);
  assert(out.shape[0] == x.shape[0] && out.shape[1] == weight.rows);
  dispatch_16bit(x.dtype, "gemv_int4", [&](auto element) {
    using T = decltype(element);
    if (out.dtype == DType::kF32) return gemv_int4_typed<T, float>(exec, multiprocessors, x, weight, out);
    assert(out.dtype == x.dtype);
    gemv_int4_typed<T, T>(exec, multiprocessors, x, weight, out);
  });
}

}  // namespace vesper::cuda
