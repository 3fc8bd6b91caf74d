// Root-mean-square norm, alone and fused with the residual add before it.
// Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467; transformers, LlamaRMSNorm.
#pragma once

#include <cstdint>

#include "engine/core/cost.h"
#include "engine/core/exec.h"
#include "engine/core/tensor.h"

namespace vesper {

// out = x / sqrt(mean(x^2) + eps) * weight, a row a token; the mean and the product in fp32, rounded once.
//   x, out [tokens, hidden], one dtype;  weight [hidden], on the CPU of any floating type, on CUDA x's
void rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& weight, float eps, const TensorRef& out);

// sum = x + addend (rounded to x's dtype), then out = rms_norm(sum). `addend` is the sum over ranks of partial
// products: a reduction between ranks happens before this call, and the residual enters here, once. `sum` may be x.
void add_rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& addend, const TensorRef& weight, float eps,
                  const TensorRef& sum, const TensorRef& out);

Cost rms_norm_cost(DType dtype, std::int64_t tokens, std::int64_t hidden);
Cost add_rms_norm_cost(DType dtype, std::int64_t tokens, std::int64_t hidden);

namespace cpu {
void rms_norm(TensorView<const float, 2> x, const TensorRef& weight, float eps, TensorView<float, 2> out);
void add_rms_norm(TensorView<const float, 2> x, TensorView<const float, 2> addend, const TensorRef& weight, float eps,
                  TensorView<float, 2> sum, TensorView<float, 2> out);
}  // namespace cpu
namespace cuda {
void rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& weight, float eps, const TensorRef& out);
void add_rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& addend, const TensorRef& weight, float eps,
                  const TensorRef& sum, const TensorRef& out);
}  // namespace cuda

}  // namespace vesper
