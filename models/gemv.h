// The CUDA products for few rows of x, where reading the weight once is all the time there is.
#pragma once

#include "engine/core/exec.h"
#include "engine/core/tensor.h"
#include "models/int4.h"

namespace vesper::cuda {

// out[t, r] = sum_c x[t, c] * weight[r, c], accumulated in fp32 in a fixed order that depends on the columns only.
//   x [tokens, columns], 1 <= tokens <= kMaxGemvRows;  weight [rows, columns], x's 16-bit type;
//   out [tokens, rows], that type or f32
//   multiprocessors: of the device
// False, and nothing done, where rows are not on 16 bytes.
bool gemv(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight, const TensorRef& out);

// The same with a weight in 4 bits: sum over the spans of scale * sum_c x[t, c] * (code[r, c] - 8).
//   x of a 16-bit type, out that type or f32
void gemv_int4(const Exec& exec, int multiprocessors, const TensorRef& x, const Int4Matrix& weight,
               const TensorRef& out);

}  // namespace vesper::cuda
