// The products that open a decoder block's two halves, each with the norm before it and the step after it: what a
// decode step on CUDA does in one kernel. Everywhere else, and as their truth, they are compositions of models/norm.h,
// models/linear.h, models/rows.h and kvcache/append.h.
#pragma once

#include "kvcache/append.h"
#include "models/linear.h"

namespace vesper {

// The residual stream as it enters a half of a block: sum = residual + addend, normed = rms_norm(sum).
struct BlockInput {
  TensorRef residual;  // [tokens, hidden]
  TensorRef addend =
      {};            // [tokens, hidden]: what the half before put out, summed over ranks; null data before the first
  TensorRef sum;     // [tokens, hidden]: not `residual`; untouched where there is no addend
  TensorRef weight;  // [hidden], of the norm
  float eps = 0.0F;
};

// Room for what the composition leaves between its steps; what it holds afterwards is nobody's business.
struct ProjectionScratch {
  TensorRef normed;  // [tokens, hidden]
  TensorRef wide;    // [tokens, rows of the weight]
};

// query = rotate(q), and k (rotated) and v into the cache with its side tables, where q, k, v = normed * weight^T.
//   weight [(heads + 2 kv_heads) * head_dim, hidden];  query [tokens, heads * head_dim]
void project_qkv(const Exec& exec, const LinearContext& context, const BlockInput& input, const LinearWeight& weight,
                 const Rope& rope, const Batch& batch, const LayerKv& kv, const ProjectionScratch& scratch,
                 const TensorRef& query);

// out = silu(gate) * up, where gate, up = normed * weight^T.
//   weight [2 ffn, hidden]: gate, up;  out [tokens, ffn]
void project_ffn(const Exec& exec, const LinearContext& context, const BlockInput& input, const LinearWeight& weight,
                 const ProjectionScratch& scratch, const TensorRef& out);

// Weights once; the residual stream in and out, the norm's weight and the outputs.
Cost project_qkv_cost(DType dtype, std::int64_t tokens, std::int64_t hidden, std::int64_t rows);
Cost project_ffn_cost(DType dtype, std::int64_t tokens, std::int64_t hidden, std::int64_t ffn);

namespace cuda {
// In one kernel, with the bits of the composition; false where a shape is not taken: more than kMaxGemvRows tokens,
// rows that are not 16-byte aligned, a norm's input that does not fit in shared memory, a head_dim or an ffn that tiles
// do not divide, weights that are not of x's type. Side tables are left as they are.
bool project_qkv(const Exec& exec, const LinearContext& context, const BlockInput& input, const LinearWeight& weight,
                 const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& query);
bool project_ffn(const Exec& exec, const LinearContext& context, const BlockInput& input, const LinearWeight& weight,
                 const TensorRef& out);
}  // namespace cuda

}  // namespace vesper
