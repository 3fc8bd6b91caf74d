// Attention of one query token a sequence over the keys of a selection.
#pragma once

#include "attention/attend.h"
#include "attention/selection.h"

namespace vesper {

// out = sum_i w_i e^{s_i} v_i / sum_i w_i e^{s_i} over the list of the head's KV head; w = 1 on the static part and
// e^{tail_log_weight} on the tail, which enters as one number added to the tail's scores. The list is
// cut into splits of split_length() entries (pages or tokens), at least `min_entries`, by its own count; a split behind
// the count is empty (lse = -inf).
// Where the partials have tickets, lists share out their splits * seqs * kv_heads splits by their counts instead, so
// that one much longer than the others is read by as many more blocks: list l has max(1, round(count_l / e)) even ones,
// e = max(min_entries, sum of counts / spare), spare = the lists, or the multiprocessors where those are more, as far
// as the splits go. The counts alone decide, not the order of the batch.
//   q, out [seqs, heads * head_dim], dtype of the cache;  lse [seqs, heads] where its data is not null
//   partials as in attend_decode: [seqs, heads, splits, ...]
// Sequences at or under the dense limit are not touched. Same limits of shape as attend_prefill. A page's tokens behind
// the sequence's end are not read.
void attend_selected(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                     const Batch& batch, const Selection& list, int min_entries, DenseLimit dense,
                     const SplitPartials& partials, const TensorRef& out, TensorView<float, 2> lse);

// As many lists as attention with tickets takes: one block looks through the counts of all.
inline constexpr int kMostSharedLists = 8192;

// `listed`: tokens of all lists (one list a sequence and KV head), each K and V row once and its entry.
Cost attend_selected_cost(const AttentionShape& shape, DType dtype, std::int64_t seqs, std::int64_t listed);

// Adds what this step's lists hold to running totals: one number each for every (layer's) KV head.
struct KeptCounters {
  TensorView<std::int64_t, 1> kept_tokens;      // [kv_heads] tokens on lists (of pages: their tokens)
  TensorView<std::int64_t, 1> visible_tokens;   // [kv_heads] kv_len of the same sequences
  TensorView<std::int64_t, 1> sampled_tokens;   // [kv_heads] entries of random tails
  TensorView<std::int64_t, 1> lists;            // [kv_heads] how many lists were made
  TensorView<std::int64_t, 1> guard_hits = {};  // [kv_heads] sum of list_guard_hits; unused where that has no data
  TensorView<const std::int32_t, 2> list_guard_hits = {};  // [seqs, kv_heads] of size_sample, this step's
};
void count_selected(const Exec& exec, const AttentionShape& shape, const Batch& batch, const Selection& list,
                    DenseLimit dense, const KeptCounters& counters);

namespace cpu {
void attend_selected(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                     const Selection& list, int min_entries, DenseLimit dense, const SplitPartials& partials,
                     TensorView<float, 2> out, TensorView<float, 2> lse);
void count_selected(const AttentionShape& shape, const Batch& batch, const Selection& list, DenseLimit dense,
                    const KeptCounters& counters);
}  // namespace cpu
namespace cuda {
void attend_selected(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                     const Batch& batch, const Selection& list, int min_entries, DenseLimit dense,
                     const SplitPartials& partials, const TensorRef& out, TensorView<float, 2> lse);
void count_selected(const Exec& exec, const AttentionShape& shape, const Batch& batch, const Selection& list,
                    DenseLimit dense, const KeptCounters& counters);
}  // namespace cuda

}  // namespace vesper
