#include "attention/score_tokens.h"

#include <cassert>

namespace vesper {

void score_tokens(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, const Selection& pages, KeySource source, DenseLimit dense,
                  TensorView<float, 3> scores) {
  assert(source == KeySource::kExact || (kv.int4.data != nullptr && kv.int4_params.data != nullptr));
  assert(source == KeySource::kExact || shape.head_dim % 2 == 0);
  assert(pages.index.data() == nullptr || pages.unit == SelectionUnit::kPages);
  assert(scores.shape(2) >=
         (pages.index.data() == nullptr ? batch.max_kv_len : pages.index.shape(2) * shape.page_tokens));
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::score_tokens(exec, shape, q, kv, batch, pages, source, dense, scores);
  }
  cpu::score_tokens(shape, q.as<const float, 2>(), kv, batch, pages, source, dense, scores);
}

Cost score_tokens_cost(const AttentionShape& shape, DType dtype, KeySource source, std::int64_t seqs,
                       std::int64_t candidates) {
  const std::int64_t head_dim = shape.head_dim;
  const std::int64_t key = source == KeySource::kInt4 ? head_dim / 2 + 4 : head_dim * dtype_bytes(dtype);
  return {.bytes = candidates * (shape.kv_heads * key + std::int64_t{4} * shape.heads) +
                   seqs * shape.heads * head_dim * dtype_bytes(dtype),
          .flops = 2 * candidates * shape.heads * head_dim};
}

}  // namespace vesper
