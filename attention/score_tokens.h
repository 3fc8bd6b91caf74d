// Scores of single tokens, from the keys themselves or from their 4-bit copies.
#pragma once

#include "attention/attend.h"
#include "attention/selection.h"

namespace vesper {

// kInt4 needs int4 keys; kExact reads the cache's own keys (an oracle, for studies).
enum class KeySource : std::uint8_t { kInt4, kExact };

// scores(s, h, j) = scale * q . k of candidate j, accumulated in fp32. Candidate j of KV head g is token
// pages.index(s, g, j / page_tokens) * page_tokens + j % page_tokens, for j < pages.count(s, g) * page_tokens, or,
// where `pages.index` has no data, token j, for j < kv_len(s). Candidates behind the sequence's end get -inf. With int4
// keys q . k = scale_k * (q . c) + zero_k * sum(q), c in 0 ... 15 (kvcache/side_tables.h).
//   scores [seqs, heads, capacity]
void score_tokens(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, const Selection& pages, KeySource source, DenseLimit dense,
                  TensorView<float, 3> scores);

// `candidates`: of all sequences, for one KV head. A key (or its 4-bit copy) each, a score for each query head.
Cost score_tokens_cost(const AttentionShape& shape, DType dtype, KeySource source, std::int64_t seqs,
                       std::int64_t candidates);

namespace cpu {
void score_tokens(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                  const Selection& pages, KeySource source, DenseLimit dense, TensorView<float, 3> scores);
}  // namespace cpu
namespace cuda {
void score_tokens(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, const Selection& pages, KeySource source, DenseLimit dense,
                  TensorView<float, 3> scores);
}  // namespace cuda

}  // namespace vesper
