#include "models/fill.h"

namespace vesper {

void fill_uniform(const Exec& exec, const TensorRef& out, std::uint64_t seed, std::uint32_t tensor, float half_range,
                  std::int64_t first) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::fill_uniform(exec, out, seed, tensor, half_range, first);
  }
  cpu::fill_uniform(out, seed, tensor, half_range, first);
}

void fill_constant(const Exec& exec, const TensorRef& out, float value) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::fill_constant(exec, out, value);
  }
  cpu::fill_constant(out, value);
}

}  // namespace vesper
