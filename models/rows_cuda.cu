// Row-wise small operations on CUDA; formulas in models/rows.h. All are bound by bytes: each input row read once, each
// output row written once.
//   block (t, b) = 256 threads over row t, columns from b * 256 * width on; 16 bytes a thread where rows are aligned
#include <cassert>
#include <cstdint>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/vector.cuh"
#include "models/rows.h"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 256;

// Blocks that cover `rows` rows of `units` units, one unit a thread.
Dims cover(std::int64_t rows, std::int64_t units) {
  return {.grid = dim3(static_cast<unsigned>(rows), static_cast<unsigned>((units + kThreads - 1) / kThreads)),
          .block = dim3(kThreads)};
}

template <typename Unit>
struct GatherArgs {
  const Unit* table;
  const std::int32_t* index;
  Unit* out;
  std::int64_t units;  // of a row
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads) copy_chosen_rows(const __grid_constant__ GatherArgs<Unit> args) {
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  let_next_start();
  wait_for_previous();
  if (unit >= args.units) return;
  const std::int64_t from = args.index[blockIdx.x];
  args.out[blockIdx.x * args.units + unit] = args.table[from * args.units + unit];
}

// A copy needs no element type: rows are 16-byte units where they can be, else 2-byte ones, which f32 rows are too.
template <typename Unit>
void gather_units(const Exec& exec, const TensorRef& table, TensorView<const std::int32_t, 1> index,
                  const TensorRef& out) {
  const std::int64_t row_bytes = out.shape[1] * dtype_bytes(out.dtype);
  const auto units = row_bytes / static_cast<std::int64_t>(sizeof(Unit));
  Dims dims = cover(index.shape(0), units);
  dims.overlap = true;
  launch("gather_rows", copy_chosen_rows<Unit>, dims, exec.stream,
         GatherArgs<Unit>{static_cast<const Unit*>(table.data), index.data(), static_cast<Unit*>(out.data), units});
}

template <typename T>
struct SiluArgs {
  const T* gate_up;  // [tokens, 2 * ffn]
  T* out;            // [tokens, ffn]
  std::int64_t ffn;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) silu_mul_row(const __grid_constant__ SiluArgs<T> args) {
  const std::int64_t d = (static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
  if (d >= args.ffn) return;
  const T* gate_row = args.gate_up + 2 * blockIdx.x * args.ffn;
  float gate[kWidth];
  float up[kWidth];
  load_widened(gate_row + d, gate);
  load_widened(gate_row + args.ffn + d, up);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) gate[i] = gate[i] / (1.0F + expf(-gate[i])) * up[i];
  store_narrowed(args.out + blockIdx.x * args.ffn + d, gate);
}

}  // namespace

void gather_rows(const Exec& exec, const TensorRef& table, TensorView<const std::int32_t, 1> index,
                 const TensorRef& out) {
  assert(table.dtype == out.dtype && table.shape[1] == out.shape[1] && index.shape(0) == out.shape[0]);
  if (out.size() == 0) return;
  const std::int64_t halves = out.shape[1] * dtype_bytes(out.dtype) / 2;
  if (rows_are_vectors(halves, {table.data, out.data})) return gather_units<uint4>(exec, table, index, out);
  gather_units<std::uint16_t>(exec, table, index, out);
}

void silu_mul(const Exec& exec, const TensorRef& gate_up, const TensorRef& out) {
  assert(gate_up.dtype == out.dtype && gate_up.shape[0] == out.shape[0] && gate_up.shape[1] == 2 * out.shape[1]);
  if (out.size() == 0) return;
  dispatch_16bit(out.dtype, "silu_mul", [&](auto element) {
    using T = decltype(element);
    const std::int64_t ffn = out.shape[1];
    const SiluArgs<T> args{static_cast<const T*>(gate_up.data), static_cast<T*>(out.data), ffn};
    if (rows_are_vectors(ffn, {gate_up.data, out.data})) {
      return launch("silu_mul", silu_mul_row<T, kVectorWidth>, cover(out.shape[0], ffn / kVectorWidth), exec.stream,
                    args);
    }
    launch("silu_mul", silu_mul_row<T, 1>, cover(out.shape[0], ffn), exec.stream, args);
  });
}

}  // namespace vesper::cuda
