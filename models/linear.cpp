#include "models/linear.h"

#include <algorithm>

namespace vesper {
namespace {

// Of dequantised weights: stays in the L2 cache of a large GPU (50 MB on Hopper) between its writing and its reading,
// and is a product of its own that fills the chip.
constexpr std::int64_t kPanelBytes = 32LL << 20;

}  // namespace

std::int64_t LinearContext::workspace_bytes(DeviceKind device) {
  if constexpr (kHaveCuda) {
    if (device == DeviceKind::kCuda) return cuda::linear_workspace_bytes();
  }
  return 0;
}

std::int64_t LinearContext::panel_bytes(std::int64_t rows, std::int64_t columns) {
  const std::int64_t row_bytes = 2 * columns;
  const std::int64_t most_rows = std::max<std::int64_t>(1, kPanelBytes / row_bytes / kInt4CellRows) * kInt4CellRows;
  return std::min(rows, most_rows) * row_bytes;
}

LinearContext::LinearContext(DeviceKind device, std::int64_t panel_bytes) {
  if constexpr (kHaveCuda) {
    if (device == DeviceKind::kCuda) impl_.reset(cuda::create_linear_context(panel_bytes));
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

Cost linear_int4_cost(DType dtype, DType out_dtype, std::int64_t tokens, std::int64_t rows, std::int64_t columns) {
  return {.bytes = Int4Matrix{.rows = rows, .columns = columns}.bytes() + tokens * columns * dtype_bytes(dtype) +
                   tokens * rows * dtype_bytes(out_dtype),
          .flops = 2 * tokens * rows * columns};
}

}  // namespace vesper
