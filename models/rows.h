// Row-wise small operations: embedding look-up, choice of rows, and the gated activation of the feed-forward block.
#pragma once

#include <cstdint>

#include "engine/core/cost.h"
#include "engine/core/exec.h"
#include "engine/core/tensor.h"

namespace vesper {

// out row t = table row index(t). The embedding look-up, and the choice of the rows whose logits are wanted.
//   table [rows, columns], on the CPU of any floating type, on CUDA out's;  index [n], each in [0, rows);
//   out [n, columns]
void gather_rows(const Exec& exec, const TensorRef& table, TensorView<const std::int32_t, 1> index,
                 const TensorRef& out);

// out = silu(gate) * up, silu(x) = x / (1 + e^-x), in fp32, rounded once.
//   gate_up [tokens, 2 * ffn]: gate, then up;  out [tokens, ffn], same dtype
// Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
void silu_mul(const Exec& exec, const TensorRef& gate_up, const TensorRef& out);

Cost gather_rows_cost(DType dtype, std::int64_t rows, std::int64_t columns);
// Of the flops, an exponential and a division count as one each.
Cost silu_mul_cost(DType dtype, std::int64_t tokens, std::int64_t ffn);

namespace cpu {
void gather_rows(const TensorRef& table, TensorView<const std::int32_t, 1> index, TensorView<float, 2> out);
void silu_mul(TensorView<const float, 2> gate_up, TensorView<float, 2> out);
}  // namespace cpu
namespace cuda {
void gather_rows(const Exec& exec, const TensorRef& table, TensorView<const std::int32_t, 1> index,
                 const TensorRef& out);
void silu_mul(const Exec& exec, const TensorRef& gate_up, const TensorRef& out);
}  // namespace cuda

}  // namespace vesper
