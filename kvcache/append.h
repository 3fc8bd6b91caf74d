// The append pass: rotates the queries and keys of a step and stores its keys and values in the cache, in one pass.
#pragma once

#include "engine/core/cost.h"
#include "engine/core/exec.h"
#include "engine/core/tensor.h"
#include "kvcache/batch.h"
#include "kvcache/layout.h"

namespace vesper {

// Rotary embedding in the rotate-half form of Hugging Face's Llama: channel d < head_dim / 2 pairs with
// d + head_dim / 2, by the angle position * inv_freq[d] in fp32. `inv_freq` lies on the step's device. Cosine and
// sine are multiplied by `attention_factor`, so that q·k is by its square.
// Source: Su et al., "RoFormer", arXiv 2104.09864; transformers, models/llama/modeling_llama.py.
struct Rope {
  TensorView<const float, 1> inv_freq;  // [head_dim / 2], or as many for each sequence of the step
  int seq_stride = 0;                   // from one sequence's frequencies to the next's; 0: all share one row
  float attention_factor = 1.0F;        // yarn's; 1 changes no bit
};

// q_out = rotate(q); K cache row = rotate(k); V cache row = v. Row of query token t: page
// page_table(seq_of_token(t), positions(t) / page_tokens), line positions(t) % page_tokens.
//   qkv    [tokens, (heads + 2 kv_heads) * head_dim]: heads of q, then kv_heads of k, then kv_heads of v
//   q_out  [tokens, heads * head_dim], same dtype as qkv
//   kv     dtype equal to qkv's
// Rotation in fp32, rounded once to the dtype. Pages must exist; nothing is checked on the device. The side tables that
// `kv` has are brought up to date (kvcache/side_tables.h).
void append_kv(const Exec& exec, const TensorRef& qkv, const Rope& rope, const Batch& batch, const LayerKv& kv,
               const TensorRef& q_out);

// Of a decode step, one token a sequence: its row of q, k and v, and, where there are tables, the keys of its page and
// the page's tables anew.
Cost append_kv_cost(const KvShape& shape, int heads, const SideTables& tables, std::int64_t seqs);

// Without the side tables.
namespace cpu {
void append_kv(TensorView<const float, 2> qkv, const Rope& rope, const Batch& batch, const LayerKv& kv,
               TensorView<float, 2> q_out);
}  // namespace cpu
namespace cuda {
void append_kv(const Exec& exec, const TensorRef& qkv, const Rope& rope, const Batch& batch, const LayerKv& kv,
               const TensorRef& q_out);
}  // namespace cuda

}  // namespace vesper
