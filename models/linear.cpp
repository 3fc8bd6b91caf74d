#include "models/linear.h"

namespace vesper {

void linear(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
            const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::linear(exec, context, x, weight, out);
  }
  cpu::linear(x.as<const float, 2>(), weight, out.as<float, 2>());
}

}  // namespace vesper
