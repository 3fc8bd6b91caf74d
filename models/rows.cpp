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

}  // namespace vesper
