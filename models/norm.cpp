#include "models/norm.h"

namespace vesper {

void rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& weight, float eps, const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::rms_norm(exec, x, weight, eps, out);
  }
  cpu::rms_norm(x.as<const float, 2>(), weight, eps, out.as<float, 2>());
}

void add_rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& addend, const TensorRef& weight, float eps,
                  const TensorRef& sum, const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::add_rms_norm(exec, x, addend, weight, eps, sum, out);
  }
  cpu::add_rms_norm(x.as<const float, 2>(), addend.as<const float, 2>(), weight, eps, sum.as<float, 2>(),
                    out.as<float, 2>());
}

Cost rms_norm_cost(DType dtype, std::int64_t tokens, std::int64_t hidden) {
  const std::int64_t elements = tokens * hidden;
  return {.bytes = (2 * elements + hidden) * dtype_bytes(dtype), .flops = 4 * elements};
}

Cost add_rms_norm_cost(DType dtype, std::int64_t tokens, std::int64_t hidden) {
  const std::int64_t elements = tokens * hidden;
  return {.bytes = (4 * elements + hidden) * dtype_bytes(dtype), .flops = 5 * elements};
}

}  // namespace vesper
