// 4-bit weights on CUDA: made, and turned back; see models/int4.h.
//
// quantise     a warp a span of a row: lane i takes its columns 4 i ... 4 i + 3, the warp finds the extreme, and two
// lanes
//              join their codes to a word. Bytes: the weights once, 66 a span back: far less time than the copy that
//              brings them.
// dequantise   a warp a span of two rows next to each other: lane i takes octet i mod 16 of row i / 16, one word, and
//              writes 16 bytes. Bytes: 66 a span and row in, two a weight out.
#include <cassert>
#include <cstdint>

#include "attention/mma.cuh"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/vector.cuh"
#include "models/int4.h"

namespace vesper::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kInfinity = 0x7F800000U;
constexpr unsigned short kNanF16 = 0x7E00U;
constexpr unsigned short kInfinityF16 = 0x7C00U;
constexpr unsigned kZeroWord = 0x88888888U;  // eight codes of 8

Dims cover_warps(std::int64_t warps) {
  return {.grid = dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)), .block = dim3(kThreads)};
}

__device__ std::int64_t warp_of_grid() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarps + this_warp();
}

// A row's codes and its scale in the cell of one span.
struct CellRow {
  unsigned* words;
  unsigned short* scale;
};
__device__ CellRow cell_row(std::byte* matrix, std::int64_t spans, std::int64_t row, std::int64_t span) {
  std::byte* cell = matrix + (row / kInt4CellRows * spans + span) * kInt4CellBytes;
  const int within = static_cast<int>(row % kInt4CellRows);
  return {reinterpret_cast<unsigned*>(cell + within * kInt4RowBytes),
          reinterpret_cast<unsigned short*>(cell + kInt4CodesBytes) + int4_scale(within)};
}

template <typename T>
struct QuantiseArgs {
  const T* from;
  std::byte* to;
  std::int64_t rows;  // of `from`
  std::int64_t columns;
  std::int64_t spans;
  std::int64_t first_row;
};

// The scale of a span whose largest key is `largest`: a key is a weight's bits rotated left by one, an order by
// magnitude, then sign, as in models/int4_cpu.cpp.
__device__ unsigned short scale_bits(unsigned largest) {
  if (largest >> 1 >= kInfinity) return kNanF16;
  const float extreme = __uint_as_float(__funnelshift_r(largest, largest, 1));
  const unsigned short bits = __half_as_ushort(__float2half_rn(extreme * -0.125F));
  return (bits & kInfinityF16) == kInfinityF16 ? kNanF16 : bits;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantise_spans(const __grid_constant__ QuantiseArgs<T> args) {
  const std::int64_t row = warp_of_grid() / args.spans;
  const std::int64_t span = warp_of_grid() % args.spans;
  if (row >= args.rows) return;
  const int lane = this_lane();
  const std::int64_t column = span * kInt4SpanColumns + 4 * lane;
  const T* from = args.from + row * args.columns + column;
  float weight[4];
  unsigned largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weight[i] = column + i < args.columns ? widen(from[i]) : 0.0F;
    const unsigned bits = __float_as_uint(weight[i]);
    largest = max(largest, __funnelshift_l(bits, bits, 1));
  }
  const unsigned short scale = scale_bits(__reduce_max_sync(kAllLanes, largest));
  const float step = __half2float(__ushort_as_half(scale));
  const int half = lane % 2;  // of the octet
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int code = 8;
    if (fabsf(step) > 0.0F) {  // neither 0 nor NaN
      code += __float2int_rn(fminf(fmaxf(__fdiv_rn(weight[i], step), -8.0F), 7.0F));
    }
    word |= static_cast<unsigned>(code) << (half == 0 ? int4_shift(i) : int4_shift(4 + i));
  }
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  const CellRow to = cell_row(args.to, args.spans, args.first_row + row, span);
  if (half == 0) to.words[int4_word(lane / 2)] = word;
  if (lane == 0) *to.scale = scale;
}

struct ClearArgs {
  std::byte* matrix;
  std::int64_t rows;
  std::int64_t spans;
};

// A block a cell of the last band; thread 16 r + w clears word w of its row r.
__global__ void __launch_bounds__(kInt4CellRows* kInt4RowWords)
    clear_last_rows(const __grid_constant__ ClearArgs args) {
  const int within = static_cast<int>(threadIdx.x) / kInt4RowWords;
  const int word = static_cast<int>(threadIdx.x) % kInt4RowWords;
  const std::int64_t row = args.rows / kInt4CellRows * kInt4CellRows + within;
  if (row < args.rows) return;
  const CellRow to = cell_row(args.matrix, args.spans, row, blockIdx.x);
  to.words[word] = kZeroWord;
  if (word == 0) *to.scale = 0;
}

template <typename T>
struct DequantiseArgs {
  std::byte* matrix;
  T* out;
  std::int64_t rows;  // of `out`
  std::int64_t columns;
  std::int64_t spans;
  std::int64_t first_row;
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) dequantise_spans(const __grid_constant__ DequantiseArgs<T> args) {
  const int octet = this_lane() % 16;
  const std::int64_t row = warp_of_grid() / args.spans * 2 + this_lane() / 16;
  const std::int64_t span = warp_of_grid() % args.spans;
  const std::int64_t column = span * kInt4SpanColumns + 8 * octet;
  if (row >= args.rows || column >= args.columns) return;
  const CellRow from = cell_row(args.matrix, args.spans, args.first_row + row, span);
  const unsigned word = from.words[int4_word(octet)];
  const float step = __half2float(__ushort_as_half(*from.scale));
  float weight[kVectorWidth];
#pragma unroll
  for (int i = 0; i < kVectorWidth; ++i) {
    const int code = static_cast<int>(word >> int4_shift(i) & 0xFU);
    weight[i] = step * static_cast<float>(code - 8);
  }
  T* to = args.out + row * args.columns + column;
  if constexpr (kAligned) {
    store_narrowed<kVectorWidth>(to, weight);
  } else {
#pragma unroll
    for (int i = 0; i < kVectorWidth; ++i) {
      if (column + i < args.columns) to[i] = narrow<T>(weight[i]);
    }
  }
}

}  // namespace

void quantise_int4(const Exec& exec, const TensorRef& from, std::int64_t first_row, const Int4Matrix& out) {
  assert(from.shape[1] == out.columns && first_row + from.shape[0] <= out.rows);
  if (from.size() == 0) return;
  dispatch_float(from.dtype, "quantise_int4", [&](auto element) {
    using T = decltype(element);
    const QuantiseArgs<T> args{.from = static_cast<const T*>(from.data),
                               .to = out.data,
                               .rows = from.shape[0],
                               .columns = out.columns,
                               .spans = out.spans(),
                               .first_row = first_row};
    launch("quantise_int4", quantise_spans<T>, cover_warps(args.rows * args.spans), exec.stream, args);
  });
}

void clear_int4_padding(const Exec& exec, const Int4Matrix& matrix) {
  if (matrix.rows % kInt4CellRows == 0 || matrix.columns == 0) return;
  const Dims dims{.grid = dim3(static_cast<unsigned>(matrix.spans())), .block = dim3(kInt4CellRows * kInt4RowWords)};
  launch("clear_int4_padding", clear_last_rows, dims, exec.stream,
         ClearArgs{.matrix = matrix.data, .rows = matrix.rows, .spans = matrix.spans()});
}

void dequantise_int4(const Exec& exec, const Int4Matrix& matrix, std::int64_t first_row, const TensorRef& out) {
  assert(out.shape[1] == matrix.columns && first_row + out.shape[0] <= matrix.rows);
  assert(first_row % kInt4CellRows == 0);
  if (out.size() == 0) return;
  dispatch_float(out.dtype, "dequantise_int4", [&](auto element) {
    using T = decltype(element);
    const DequantiseArgs<T> args{.matrix = matrix.data,
                                 .out = static_cast<T*>(out.data),
                                 .rows = out.shape[0],
                                 .columns = matrix.columns,
                                 .spans = matrix.spans(),
                                 .first_row = first_row};
    const Dims dims = cover_warps((args.rows + 1) / 2 * args.spans);
    if constexpr (sizeof(T) == 2) {
      if (rows_are_vectors(args.columns, {out.data})) {
        return launch("dequantise_int4", dequantise_spans<T, true>, dims, exec.stream, args);
      }
    }
    launch("dequantise_int4", dequantise_spans<T, false>, dims, exec.stream, args);
  });
}

}  // namespace vesper::cuda
