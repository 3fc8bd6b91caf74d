// Twilight's pruner: of the candidates, the fewest tokens whose estimated probability reaches p.
// Source: Lin et al., "Twilight", arXiv 2502.02770, section 4.1; the threshold search is ours (docs/backends.md).
#pragma once

#include "attention/attend.h"
#include "attention/selection.h"

namespace vesper {

struct TopPRule {
  float top_p = 0.95F;           // in (0, 1]; 1 keeps every candidate
  std::int32_t min_tokens = 16;  // a query head keeps at least so many of its best candidates, where it has them
  Amount sink_tokens = {};       // of those among the candidates, always kept
  Amount window_tokens = {};
};

// For each query head the smallest set {candidate : score >= tau} whose softmax over the candidates sums to at least
// top_p (ties of tau are all kept), found by a radix descent over the scores' order, which starts at the row's maximum
// and needs no sort; at least min_tokens. Sums are integers whose errors are counted against the set: it never has less
// than top_p, and is no larger than the smallest set of top_p + 2^-19 + candidates * 2^-39 (attention/mass.h). The list
// of a KV head is the union over its query heads, plus the newest token, sink and window, ascending. Same candidates as
// score_tokens.
//   scores [seqs, heads, capacity], on CUDA a multiple of 4;  tokens.index [seqs, kv_heads, capacity]
void prune_top_p(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                 const Selection& pages, const TopPRule& rule, DenseLimit dense, const Selection& tokens);

// `candidates`: of all sequences, for one KV head; `kept`: entries of all lists. Every score once, an exponential each.
Cost prune_top_p_cost(const AttentionShape& shape, std::int64_t candidates, std::int64_t kept);

namespace cpu {
void prune_top_p(const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                 const Selection& pages, const TopPRule& rule, DenseLimit dense, const Selection& tokens);
}  // namespace cpu
namespace cuda {
void prune_top_p(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                 const Selection& pages, const TopPRule& rule, DenseLimit dense, const Selection& tokens);
}  // namespace cuda

}  // namespace vesper
