#include "models/linear.h"

namespace vesper {

std::int64_t LinearContext::workspace_bytes(DeviceKind device) {
  if constexpr (kHaveCuda) {
    if (device == DeviceKind::kCuda) return cuda::linear_workspace_bytes();
  }
  return 0;
}

LinearContext::LinearContext(DeviceKind device) {
  if constexpr (kHaveCuda) {
    if (device == DeviceKind::kCuda) impl_.reset(cuda::create_linear_context());
  }
}

LinearContext::~LinearContext() = default;
LinearContext::LinearContext(LinearContext&&) noexcept = default;
LinearContext& LinearContext::operator=(LinearContext&&) noexcept = default;

void LinearContext::Deleter::operator()(Impl* impl) const noexcept {
  if constexpr (kHaveCuda) cuda::destroy_linear_context(impl);
}

void linear(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
            const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::linear(exec, context, x, weight, out);
  }
  cpu::linear(x.as<const float, 2>(), weight, out.as<float, 2>());
}

Cost linear_cost(DType dtype, DType out_dtype, std::int64_t tokens, std::int64_t rows, std::int64_t columns) {
  return {.bytes = (rows + tokens) * columns * dtype_bytes(dtype) + tokens * rows * dtype_bytes(out_dtype),
          .flops = 2 * tokens * rows * columns};
}

}  // namespace vesper
