// Quest's selector: score pages by a bound on q . k, keep the best. Source: Tang et al., "Quest", arXiv 2406.10774,
// section 3.3 and Algorithm 1; scores of a group and forced pages are ours.
#pragma once

#include "attention/attend.h"
#include "attention/selection.h"

namespace vesper {

// How the scores of a group's query heads become the KV head's one score.
enum class GroupScore : std::uint8_t { kMax, kSum, kMean };

// min_max: sum_d max(q_d M_d, q_d m_d), the largest that q . k can be for a key of the page (needs page bounds).
// mean_std: sum_d q_d mu_d + |q_d| sigma_d over the page's tokens (needs page moments).
// min_max_int8: min_max of the bounds in 8 bits, never less than of the bounds themselves (needs those).
enum class PageScore : std::uint8_t { kMinMax, kMeanStd, kMinMaxInt8 };

// scores(s, g, p) for every page p of a sequence, in fp32, unscaled; pages behind the end are not written.
//   q      [seqs, heads * head_dim], dtype of the cache
//   scores [seqs, kv_heads, page capacity]
void score_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                 const Batch& batch, PageScore page_score, GroupScore group_score, DenseLimit dense,
                 TensorView<float, 3> scores);

// How many pages, and which always. The budget is floored to whole pages, at least one, unless it covers every token;
// it includes the forced pages: the newest, those that hold the first sink tokens and those that hold the last window
// tokens. Where the forced pages alone exceed the budget, they are the list.
struct PageBudget {
  Amount tokens = {};
  Amount sink_tokens = {};
  Amount window_tokens = {};
};

// The best-scored pages, ascending; among equal scores the lower page wins. No tail. NaN scores count as -inf.
//   pages.index [seqs, kv_heads, capacity >= page capacity of the longest budget]
void select_pages(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                  const PageBudget& budget, DenseLimit dense, const Selection& pages);

// Both: the lists of select_pages from the scores of score_pages, which may be left in `scratch` or not. One launch on
// CUDA where pages are scored by their bounds, in whatever bits: by clusters (attention/attend_chosen.h) where they
// serve all lists side by side.
struct PageScratch {
  TensorView<float, 3> scores;          // [seqs, kv_heads, page capacity]
  TensorView<std::int32_t, 2> tickets;  // [seqs, kv_heads] counters, CUDA only: all zero before and after
};
void choose_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, PageScore page_score, GroupScore group_score, const PageBudget& budget,
                  DenseLimit dense, const PageScratch& scratch, const Selection& pages);

// Bytes of what a page is scored by, of one KV head: two table rows, with their scales.
std::int64_t page_facts_bytes(int head_dim, DType dtype, PageScore page_score);

// `pages`: of all sequences. What a page is scored by for each KV head, one score.
Cost score_pages_cost(const AttentionShape& shape, DType dtype, PageScore page_score, std::int64_t seqs,
                      std::int64_t pages);
// Every score once, every entry of a list once; `kept`: entries of all lists.
Cost select_pages_cost(const AttentionShape& shape, std::int64_t pages, std::int64_t kept);

Cost choose_pages_cost(const AttentionShape& shape, DType dtype, PageScore page_score, std::int64_t seqs,
                       std::int64_t pages, std::int64_t kept);

namespace cpu {
void score_pages(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                 PageScore page_score, GroupScore group_score, DenseLimit dense, TensorView<float, 3> scores);
void select_pages(const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                  const PageBudget& budget, DenseLimit dense, const Selection& pages);
}  // namespace cpu
namespace cuda {
void score_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                 const Batch& batch, PageScore page_score, GroupScore group_score, DenseLimit dense,
                 TensorView<float, 3> scores);
void select_pages(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                  const PageBudget& budget, DenseLimit dense, const Selection& pages);
// By page bounds, in whatever bits; the last block of a list's that is done with scores, which are left, chooses.
void choose_pages(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, PageScore page_score, GroupScore group_score, const PageBudget& budget,
                  DenseLimit dense, const PageScratch& scratch, const Selection& pages);
}  // namespace cuda

}  // namespace vesper
