// The CUDA product for 9 to 64 rows of x: reading the weight once is still all the time there is, but the sums are many
// enough for whole tiles of the tensor cores.
#pragma once

#include "engine/core/exec.h"
#include "engine/core/tensor.h"
#include "kvcache/append.h"

namespace vesper::cuda {

// Whether the device runs these kernels: compute capability 9.0, and a build for it.
bool has_small_gemm();

// Whether they take this product: more than kMaxGemvRows and at most kMaxSmallGemmRows rows of x, x and weight of one
// type with rows on 16 bytes.
bool small_gemm_takes(const TensorRef& x, const TensorRef& weight);

// out[t, r] = sum_c x[t, c] * weight[r, c], accumulated in fp32 in a fixed order that depends on the weight's shape and
// the device only. False, and nothing done, where the product is not taken.
//   x [tokens, columns];  weight [rows, columns];  out [tokens, rows], x's type or f32
//   multiprocessors: of the device
bool small_gemm(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                const TensorRef& out);

// project_qkv and project_ffn of models/projections.h in one kernel each, with the bits of small_gemm and the step
// after it. False, and nothing done, also where half a head is no multiple of 16 channels.
bool small_gemm_qkv(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                    const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& query);
bool small_gemm_ffn(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                    const TensorRef& out);

}  // namespace vesper::cuda
