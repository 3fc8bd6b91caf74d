// out = x W^T on the CPU; see models/linear.h.
#include <cstdint>

#include "engine/core/parallel.h"
#include "models/linear.h"

namespace vesper::cpu {
namespace {

template <typename T>
float dot(const float* x, const T* weight, std::int64_t columns) {
  float lane[8] = {};
  for (std::int64_t c = 0; c < columns; ++c) lane[c % 8] += x[c] * to_float(weight[c]);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

template <typename T>
void multiply(TensorView<const float, 2> x, TensorView<const T, 2> weight, std::int64_t first_row,
              TensorView<float, 2> out) {
  parallel_for(weight.shape(0), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t t = 0; t < x.shape(0); ++t) {
        out(t, first_row + r) = dot(&x(t, 0), &weight(r, 0), x.shape(1));
      }
    }
  });
}

}  // namespace

void linear(TensorView<const float, 2> x, const LinearWeight& weight, TensorView<float, 2> out) {
  std::int64_t first_row = 0;
  for (int b = 0; b < weight.count; ++b) {
    const TensorRef& block = weight.blocks[static_cast<std::size_t>(b)];
    if (block.dtype == DType::kF32) multiply(x, block.as<const float, 2>(), first_row, out);
    if (block.dtype == DType::kBf16) multiply(x, block.as<const bf16, 2>(), first_row, out);
    if (block.dtype == DType::kF16) multiply(x, block.as<const f16, 2>(), first_row, out);
    first_row += block.shape[0];
  }
}

}  // namespace vesper::cpu
