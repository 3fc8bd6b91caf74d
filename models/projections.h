// The products that open a decoder block's two halves, each with the step after it: what a decode step on CUDA does in
// one kernel. Everywhere else, and as their truth, they are compositions of models/linear.h, models/rows.h and
// kvcache/append.h.
#pragma once

#include "kvcache/append.h"
#include "models/linear.h"

namespace vesper {

// query = rotate(q), and k (rotated) and v into the cache with its side tables, where q, k, v = x * weight^T.
//   x [tokens, hidden];  weight [(heads + 2 kv_heads) * head_dim, hidden];  query [tokens, heads * head_dim]
//   wide [tokens, rows of the weight]: room for what the composition leaves between its steps
void project_qkv(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& wide,
                 const TensorRef& query);

// out = silu(gate) * up, where gate, up = x * weight^T.
//   x [tokens, hidden];  weight [2 ffn, hidden]: gate, up;  wide [tokens, 2 ffn]: room;  out [tokens, ffn]
void project_ffn(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const TensorRef& wide, const TensorRef& out);

// Weights once, x and the outputs.
Cost project_qkv_cost(DType dtype, std::int64_t tokens, std::int64_t hidden, std::int64_t rows);
Cost project_ffn_cost(DType dtype, std::int64_t tokens, std::int64_t hidden, std::int64_t ffn);

namespace cuda {
// In one kernel, with the bits of the composition; false where a shape is not taken: more tokens than kMaxGemvRows (on
// compute capability 9.0 and with a weight in 16 bits kMaxSmallGemmRows), rows that are not 16-byte aligned, a head_dim
// or an ffn that tiles do not divide, weights that are not of x's type.
// Side tables are left as they are.
bool project_qkv(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& query);
bool project_ffn(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const TensorRef& out);
}  // namespace cuda

}  // namespace vesper
