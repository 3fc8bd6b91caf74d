#include "attention/select_pages.h"

#include "attention/attend_chosen.h"

namespace vesper {
namespace {

[[maybe_unused]] bool has_room_for_pages(const AttentionShape& shape, const Batch& batch, std::int64_t capacity) {
  return batch.max_kv_len <= capacity * shape.page_tokens;
}

}  // namespace

void score_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                 const Batch& batch, PageScore page_score, GroupScore group_score, DenseLimit dense,
                 TensorView<float, 3> scores) {
  assert(has_room_for_pages(shape, batch, scores.shape(2)));
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::score_pages(exec, shape, q, kv, batch, page_score, group_score, dense, scores);
  }
  cpu::score_pages(shape, q.as<const float, 2>(), kv, batch, page_score, group_score, dense, scores);
}

void choose_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, PageScore page_score, GroupScore group_score, const PageBudget& budget,
                  DenseLimit dense, const PageScratch& scratch, const Selection& pages) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda() && page_score != PageScore::kMeanStd) {
      assert(has_room_for_pages(shape, batch, scratch.scores.shape(2)));
      const int cluster = cuda::choosing_cluster(shape, batch.seqs, page_count(batch.max_kv_len, shape.page_tokens));
      if (cluster > 1) {
        return cuda::choose_in_clusters(exec, shape, q, kv, batch, page_score, group_score, budget, dense, cluster,
                                        pages);
      }
      return cuda::choose_pages(exec, shape, q, kv, batch, page_score, group_score, budget, dense, scratch, pages);
    }
  }
  score_pages(exec, shape, q, kv, batch, page_score, group_score, dense, scratch.scores);
  select_pages(exec, shape, batch, scratch.scores, budget, dense, pages);
}

std::int64_t page_facts_bytes(int head_dim, DType dtype, PageScore page_score) {
  const KvShape shape{.kv_heads = 1, .head_dim = head_dim, .dtype = dtype};
  return shape.side_table_bytes({.page_bounds = page_score == PageScore::kMinMax,
                                 .int8_bounds = page_score == PageScore::kMinMaxInt8,
                                 .page_moments = page_score == PageScore::kMeanStd});
}

Cost score_pages_cost(const AttentionShape& shape, DType dtype, PageScore page_score, std::int64_t seqs,
                      std::int64_t pages) {
  const std::int64_t score_bytes = 4;
  const std::int64_t page_bytes = page_facts_bytes(shape.head_dim, dtype, page_score) + score_bytes;
  return {.bytes = pages * shape.kv_heads * page_bytes + seqs * shape.heads * shape.head_dim * dtype_bytes(dtype),
          .flops = 4 * pages * shape.heads * shape.head_dim};
}

Cost select_pages_cost(const AttentionShape& shape, std::int64_t pages, std::int64_t kept) {
  return {.bytes = 4 * (pages * shape.kv_heads + kept), .flops = pages * shape.kv_heads};
}

Cost choose_pages_cost(const AttentionShape& shape, DType dtype, PageScore page_score, std::int64_t seqs,
                       std::int64_t pages, std::int64_t kept) {
  const Cost scoring = score_pages_cost(shape, dtype, page_score, seqs, pages);
  return {.bytes = scoring.bytes + 4 * kept, .flops = scoring.flops};
}

void select_pages(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                  const PageBudget& budget, DenseLimit dense, const Selection& pages) {
  assert(has_room_for_pages(shape, batch, scores.shape(2)));
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::select_pages(exec, shape, batch, scores, budget, dense, pages);
  }
  cpu::select_pages(shape, batch, scores, budget, dense, pages);
}

}  // namespace vesper
