#include "models/rows.h"

namespace vesper {

void gather_rows(const Exec& exec, const TensorRef& table, TensorView<const std::int32_t, 1> index,
                 const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::gather_rows(exec, table, index, out);
  }
  cpu::gather_rows(table, index, out.as<float, 2>());
}

void silu_mul(const Exec& exec, const TensorRef& gate_up, const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::silu_mul(exec, gate_up, out);
  }
  cpu::silu_mul(gate_up.as<const float, 2>(), out.as<float, 2>());
}

Cost gather_rows_cost(DType dtype, std::int64_t rows, std::int64_t columns) {
  return {.bytes = 2 * rows * columns * dtype_bytes(dtype) + rows * dtype_bytes(DType::kI32), .flops = 0};
}

Cost silu_mul_cost(DType dtype, std::int64_t tokens, std::int64_t ffn) {
  return {.bytes = 3 * tokens * ffn * dtype_bytes(dtype), .flops = 4 * tokens * ffn};
}

}  // namespace vesper
