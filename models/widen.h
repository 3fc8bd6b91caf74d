// A row of weights of any floating type as fp32, for the CPU.
#pragma once

#include <cassert>
#include <cstdint>

#include "engine/core/tensor.h"

namespace vesper::cpu {

// to[i] = from[first + i] for i < count. `from` has type f32, bf16 or f16.
inline void widen_row(const TensorRef& from, std::int64_t first, std::int64_t count, float* to) {
  const auto copy = [&](const auto* data) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_float(data[first + i]);
  };
  switch (from.dtype) {
    case DType::kF32:
      return copy(static_cast<const float*>(from.data));
    case DType::kBf16:
      return copy(static_cast<const bf16*>(from.data));
    case DType::kF16:
      return copy(static_cast<const f16*>(from.data));
    case DType::kI32:
    case DType::kU8:
      assert(false && "weights are of a floating type");
  }
}

}  // namespace vesper::cpu
