#include "engine/roof.h"

#include <unistd.h>

#include <algorithm>

#include "engine/core/buffer.h"
#include "engine/core/read_probe.h"
#include "engine/core/stream.h"
#include "engine/kernel_timer.h"
#include "engine/statistics.h"
#include "models/fill.h"
#include "models/linear.h"

namespace vesper {
namespace {

double matrix_rate(const Exec& exec) {
  const bool cuda = exec.on_cuda();
  const std::int64_t size = cuda ? 8192 : 512;
  const DType dtype = cuda ? DType::kBf16 : DType::kF32;
  const std::int64_t bytes = size * size * dtype_bytes(dtype);
  const Buffer storage(memory_of(exec.device), 3 * bytes, "the matrix probe");
  auto* data = static_cast<std::byte*>(storage.data());
  const TensorRef x = tensor_ref(data, dtype, size, size);
  const TensorRef matrix = tensor_ref(data + bytes, dtype, size, size);
  const TensorRef out = tensor_ref(data + 2 * bytes, dtype, size, size);
  fill_uniform(exec, x, 0, 0, 1.0F);
  fill_uniform(exec, matrix, 0, 1, 1.0F);
  LinearWeight weight;
  weight.blocks[0] = matrix;
  weight.count = 1;
  const LinearContext context(exec.device);
  const double seconds = quantile(time_turns(exec, 1, [&](int) { linear(exec, context, x, weight, out); }), 0.5);
  return static_cast<double>(linear_cost(dtype, dtype, size, size, size).flops) / seconds;
}

}  // namespace

Roof probe_roof(DeviceKind device) {
  const Stream stream(device);
  return {.read_bytes_per_s = probe_read_rate(stream.exec()).bytes_per_s,
          .matrix_flops_per_s = matrix_rate(stream.exec())};
}

Roof higher(const Roof& a, const Roof& b) {
  return {.read_bytes_per_s = std::max(a.read_bytes_per_s, b.read_bytes_per_s),
          .matrix_flops_per_s = std::max(a.matrix_flops_per_s, b.matrix_flops_per_s)};
}

double bound_seconds(const Cost& cost, const Roof& roof) {
  return std::max(static_cast<double>(cost.bytes) / roof.read_bytes_per_s,
                  static_cast<double>(cost.flops) / roof.matrix_flops_per_s);
}

std::int64_t last_cache_bytes(DeviceKind device) {
  if (device == DeviceKind::kCuda) return device_info(device).l2_bytes;
  constexpr std::int64_t kUnknown = std::int64_t{64} << 20;  // some virtual machines do not tell
  const std::int64_t told = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return told > 0 ? told : kUnknown;
}

}  // namespace vesper
