#include "attention/prune_top_p.h"

#include <cassert>

namespace vesper {

void prune_top_p(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                 const Selection& pages, const TopPRule& rule, DenseLimit dense, const Selection& tokens) {
  assert(rule.top_p > 0.0F && rule.top_p <= 1.0F);
  assert(tokens.unit == SelectionUnit::kTokens);
  assert(pages.index.data() == nullptr || pages.unit == SelectionUnit::kPages);
  assert(scores.shape(2) >=
         (pages.index.data() == nullptr ? batch.max_kv_len : pages.index.shape(2) * shape.page_tokens));
  assert(tokens.index.shape(2) >= scores.shape(2) || tokens.index.shape(2) >= batch.max_kv_len);
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::prune_top_p(exec, shape, batch, scores, pages, rule, dense, tokens);
  }
  cpu::prune_top_p(shape, batch, scores, pages, rule, dense, tokens);
}

Cost prune_top_p_cost(const AttentionShape& shape, std::int64_t candidates, std::int64_t kept) {
  return {.bytes = 4 * (candidates * shape.heads + kept), .flops = 2 * candidates * shape.heads};
}

}  // namespace vesper
