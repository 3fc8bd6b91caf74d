#include "attention/sparse.h"

#include <algorithm>
#include <cassert>
#include <numeric>
#include <vector>

#include "attention/attend_sampled.h"
#include "attention/select_pages.h"
#include "engine/core/stream.h"

namespace vesper {
namespace {

constexpr std::int64_t kFloatBytes = 4;

// Fewer lists are read by clusters of more than two blocks each, which merge sooner than shared ones.
constexpr int kFewLists = 32;
constexpr int kPartNumbers = 4;  // of a part of a shared list

constexpr int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

}  // namespace

Selection take_selection(ScratchCarver& carver, SelectionUnit unit, int seqs, int kv_heads, int capacity) {
  Selection list;
  list.unit = unit;
  list.index = carver.take<std::int32_t>(seqs, kv_heads, capacity);
  list.count = carver.take<std::int32_t>(seqs, kv_heads);
  list.tail_begin = carver.take<std::int32_t>(seqs, kv_heads);
  list.tail_log_weight = carver.take<float>(seqs, kv_heads);
  return list;
}

int page_list_bound(const PageBudget& budget, int tokens, int page_tokens) {
  const int pages = page_count(tokens, page_tokens);
  // Rounded up: a budget that covers every token takes the last page too, full or not.
  const int chosen = std::max(1, page_count(tokens_of(budget.tokens, tokens), page_tokens));
  // A window may touch one page more than its tokens fill.
  const int forced = 1 + page_count(tokens_of(budget.sink_tokens, tokens), page_tokens) +
                     page_count(tokens_of(budget.window_tokens, tokens), page_tokens) + 1;
  return std::min(pages, std::max(chosen, forced));
}

bool shares_lists(const AttentionLimits& limits, bool differ, int seqs) {
  if (limits.device != DeviceKind::kCuda) return false;
  const std::int64_t lists = std::int64_t{seqs} * limits.shape.kv_heads;
  return differ && lists >= kFewLists && lists <= kMostSharedLists;
}

int list_splits(const AttentionLimits& limits, bool differ, int units, int seqs, int entries, int min_entries) {
  // As many spare blocks as multiprocessors, half of the units, or as lists.
  const int wanted = shares_lists(limits, differ, seqs) ? 1 + divide_up(units / 2, seqs * limits.shape.kv_heads)
                                                        : wanted_splits(seqs, limits.shape.kv_heads, units);
  return std::min(wanted, divide_up(entries, min_entries));
}

SplitPartials list_partials(const AttentionLimits& limits, bool differ, int units, int seqs, int entries,
                            int min_entries, float* memory, TensorView<std::int32_t, 2> tickets) {
  const AttentionShape& shape = limits.shape;
  const int splits = list_splits(limits, differ, units, seqs, entries, min_entries);
  const std::int64_t rows = std::int64_t{seqs} * shape.heads * splits;
  SplitPartials partials{.out = TensorView<float, 4>(memory, seqs, shape.heads, splits, shape.head_dim),
                         .lse = TensorView<float, 3>(memory + rows * shape.head_dim, seqs, shape.heads, splits)};
  if (!shares_lists(limits, differ, seqs)) return partials;
  const std::int64_t parts = std::int64_t{seqs} * shape.kv_heads * splits;
  const std::int64_t floats = (rows * (shape.head_dim + 1) + kPartNumbers - 1) / kPartNumbers * kPartNumbers;
  partials.parts = TensorView<std::int32_t, 2>(reinterpret_cast<std::int32_t*>(memory + floats), parts, kPartNumbers);
  partials.tickets = tickets;
  return partials;
}

std::int64_t list_partial_bytes(const AttentionLimits& limits, bool differ, int entries, int min_entries) {
  const int units = decode_units(limits);
  const AttentionShape& shape = limits.shape;
  std::int64_t slots = 0;   // (sequence, split) pairs
  std::int64_t shared = 0;  // of them where lists share splits out
  for (int seqs = 1; seqs <= limits.max_seqs; ++seqs) {
    const std::int64_t own = std::int64_t{seqs} * list_splits(limits, differ, units, seqs, entries, min_entries);
    slots = std::max(slots, own);
    if (shares_lists(limits, differ, seqs)) shared = std::max(shared, own);
  }
  const std::int64_t part_bytes = shared == 0 ? 0 : kPartNumbers * kFloatBytes * (shared * shape.kv_heads + 1);
  return slots * shape.heads * (shape.head_dim + 1) * kFloatBytes + part_bytes;
}

std::int64_t entries_of(const Exec& exec, const Selection& list) {
  std::vector<std::int32_t> counts(static_cast<std::size_t>(list.count.size()));
  copy_bytes(exec, counts.data(), list.count.data(), list.count.size() * 4);
  synchronize(exec);
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

std::int64_t listed_tokens(const Exec& exec, const AttentionShape& shape, const Selection& list) {
  return entries_of(exec, list) * (list.unit == SelectionUnit::kPages ? shape.page_tokens : 1);
}

std::int64_t ticket_bytes(const AttentionLimits& limits) {
  return sample_tickets(std::int64_t{limits.max_seqs} * limits.shape.kv_heads) *
         static_cast<std::int64_t>(sizeof(std::int32_t));
}

SparseAttention::SparseAttention(const AttentionLimits& limits, DenseLimit dense, const AttentionScratch& scratch,
                                 int min_entries, bool differ)
    : limits_(limits),
      dense_limit_(dense),
      min_entries_(min_entries),
      differ_(differ),
      units_(decode_units(limits)),
      dense_(limits),
      partials_(limits.memory(), scratch.partials, "the partial results of attention over lists"),
      scratch_(limits.memory(), scratch.selections - ticket_bytes(limits), "scores and lists of sparse attention"),
      tickets_(limits.memory(), ticket_bytes(limits), "the counters of sparse attention") {
  const Exec exec{.device = limits.device};
  zero_bytes(exec, tickets_.data(), tickets_.bytes());
  synchronize(exec);
}

void SparseAttention::plan(const Batch& batch) {
  dense_.plan(batch);
  any_dense_ = false;
  any_sparse_ = false;
  metadata_bytes_ = 0;
  for (const std::int32_t tokens : batch.host_kv_len) {
    const bool sparse = tokens > dense_limit_.tokens;
    any_sparse_ = any_sparse_ || sparse;
    any_dense_ = any_dense_ || !sparse;
    if (sparse) metadata_bytes_ += limits_.shape.kv_heads * scoring_bytes(tokens);
  }
}

void SparseAttention::choose_pages_of_step(const Exec& exec, const AttendLayer& layer, const TensorRef& q,
                                           const Batch& batch, PageScore page_score, GroupScore group_score,
                                           const PageBudget& budget, TensorView<float, 3> scores,
                                           const Selection& pages) const {
  layer.begin_stage(exec, "score+select", [=, this, seqs = batch.seqs, scored = pages_of(batch)] {
    return choose_pages_cost(limits_.shape, limits_.dtype, page_score, seqs, scored, entries_of(exec, pages));
  });
  choose_pages(exec, limits_.shape, q, layer.kv, batch, page_score, group_score, budget, dense_limit_,
               {.scores = scores, .tickets = tickets(batch)}, pages);
}

void SparseAttention::score_pages_apart(const Exec& exec, const AttendLayer& layer, const TensorRef& q,
                                        const Batch& batch, PageScore page_score, GroupScore group_score,
                                        TensorView<float, 3> scores) const {
  layer.begin_stage(exec, "score", [this, page_score, seqs = batch.seqs, pages = pages_of(batch)] {
    return score_pages_cost(limits_.shape, limits_.dtype, page_score, seqs, pages);
  });
  score_pages(exec, limits_.shape, q, layer.kv, batch, page_score, group_score, dense_limit_, scores);
}

std::int64_t SparseAttention::pages_of(const Batch& batch) const {
  std::int64_t pages = 0;
  for (const std::int32_t tokens : batch.host_kv_len) {
    if (tokens > dense_limit_.tokens) pages += page_count(tokens, limits_.shape.page_tokens);
  }
  return pages;
}

void SparseAttention::run(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                          const TensorRef& out, TensorView<float, 2> lse) {
  if (any_dense_) dense_.run_short(exec, layer, q, batch, out, lse, dense_limit_.tokens);
  if (!any_sparse_) return;
  ScratchCarver scratch(scratch_.data());
  const MadeLists made = select(exec, layer, q, batch, scratch);
  list_ = made.list;
  assert(scratch.used() <= scratch_.bytes());
  const LayerCounters& counters = layer.counters;
  attend(exec, layer, q, batch, list_, out, lse,
         {.kept_tokens = counters.kept_tokens,
          .visible_tokens = counters.visible_tokens,
          .sampled_tokens = counters.sampled_tokens,
          .lists = counters.lists,
          .guard_hits = counters.guard_hits,
          .list_guard_hits = made.guard_hits});
}

void SparseAttention::attend(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                             const Selection& list, const TensorRef& out, TensorView<float, 2> lse,
                             const KeptCounters& counters) {
  layer.begin_stage(exec, "attend", [=, this, seqs = batch.seqs] {
    return attend_selected_cost(limits_.shape, limits_.dtype, seqs, listed_tokens(exec, limits_.shape, list));
  });
  const AttentionShape& shape = limits_.shape;
  const SplitPartials partials =
      list_partials(limits_, differ_, units_, batch.seqs, static_cast<int>(list.index.shape(2)), min_entries_,
                    static_cast<float*>(partials_.data()), tickets(batch));
  assert((partials.out.size() + partials.lse.size() + partials.parts.size()) * kFloatBytes <= partials_.bytes());
  attend_selected(exec, shape, q, layer.kv, batch, list, min_entries_, dense_limit_, partials, out, lse);
  if (counters.lists.data() == nullptr) return;
  layer.begin_stage(exec, "count", [=, this, seqs = batch.seqs] {
    return Cost{.bytes = std::int64_t{8} * seqs * limits_.shape.kv_heads, .flops = 0};
  });
  count_selected(exec, shape, batch, list, dense_limit_, counters);
}

}  // namespace vesper
