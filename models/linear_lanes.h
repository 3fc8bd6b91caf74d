// The inner loops of the CPU product, in one build for each instruction set; models/linear_cpu.cpp chooses.
#pragma once

#include <cstdint>

#include "engine/core/dtype.h"

namespace vesper::cpu {

// out[t, r] = sum_c x[t, c] * weight[r, c] for t < tokens, r < rows, in the order of summation of models/linear.h.
struct LinearTile {
  const float* x = nullptr;  // [tokens, columns]
  std::int64_t tokens = 0;
  std::int64_t columns = 0;
  const void* weight = nullptr;  // [rows, columns] of type f32, bf16 or f16, or cells of models/int4.h from row 0 on
  DType dtype = DType::kF32;
  bool is_int4 = false;  // then `dtype` says nothing
  std::int64_t rows = 0;
  float* out = nullptr;  // [tokens, rows], a row every `out_stride` elements
  std::int64_t out_stride = 0;
};

namespace baseline {
void multiply(const LinearTile& tile);
}
namespace avx2 {
void multiply(const LinearTile& tile);
}

}  // namespace vesper::cpu
