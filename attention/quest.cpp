// Quest: attend to the pages whose keys can score highest. Tang et al., "Quest: Query-Aware Sparsity for Efficient
// Long-Context LLM Inference", arXiv 2406.10774.
//
//   U(p) = sum_d max(q_d M_pd, q_d m_pd)      the largest q . k that a key of page p can have (section 3.3)
//   keep the token_budget / page_tokens pages of largest U, the newest always; attend to them exactly (Algorithm 1)
//
// Ours: one list for each KV head, by the group's largest score (the paper has one KV head a query head); optional sink
// and window tokens inside the budget. On a GPU that a few clusters of blocks fill the whole layer is one launch
// (attention/attend_chosen.h), else pages are chosen in one and attended to in another.
#include <algorithm>

#include "attention/attend_chosen.h"
#include "attention/sparse.h"
#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr int kMinSplitTokens = 128;

PageBudget budget_of(const QuestConfig& config) {
  return {.tokens = config.token_budget, .sink_tokens = config.sink_tokens, .window_tokens = config.window_tokens};
}

struct QuestScratch {
  TensorView<float, 3> scores;
  Selection pages;
};

QuestScratch lay_out(ScratchCarver& carver, const QuestConfig& config, const AttentionShape& shape, int seqs,
                     int tokens) {
  QuestScratch scratch;
  scratch.scores = carver.take<float>(seqs, shape.kv_heads, page_count(tokens, shape.page_tokens));
  scratch.pages = take_selection(carver, SelectionUnit::kPages, seqs, shape.kv_heads,
                                 page_list_bound(budget_of(config), tokens, shape.page_tokens));
  return scratch;
}

// Contexts that the budget covers whole. Of a fraction of the context no length is.
DenseLimit dense_limit_of(const QuestConfig& config, int dense_below, const AttentionShape& shape) {
  const double budget = config.token_budget.value;
  const int whole_pages = budget < 1.0 ? 0 : static_cast<int>(budget) / shape.page_tokens * shape.page_tokens;
  return {std::max(dense_below, whole_pages)};
}

// Of one step: amounts in tokens make lists of one length, of all sequences that they do not cover.
bool lists_differ(const QuestConfig& config) {
  const auto is_share = [](Amount amount) { return amount.value > 0.0 && amount.value < 1.0; };
  return is_share(config.token_budget) || is_share(config.sink_tokens) || is_share(config.window_tokens);
}

class Quest final : public SparseAttention {
 public:
  Quest(const QuestConfig& config, int dense_below, const AttentionLimits& limits)
      : SparseAttention(limits, dense_limit_of(config, dense_below, limits.shape), quest_scratch(config, limits),
                        kMinSplitTokens / limits.shape.page_tokens, lists_differ(config)),
        config_(config) {
    if (config.token_budget.value >= 1.0 && config.token_budget.value < limits.shape.page_tokens) {
      refuse({"setting up quest", "a token_budget of " + std::to_string(static_cast<int>(config.token_budget.value)),
              "at least one page of " + std::to_string(limits.shape.page_tokens) + " tokens", "raise token_budget"});
    }
  }

 private:
  MadeLists select(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                   ScratchCarver& carver) override {
    const AttentionShape& shape = limits().shape;
    const QuestScratch scratch = lay_out(carver, config_, shape, batch.seqs, batch.max_kv_len);
    if (config_.kernels == Kernels::kSeparate) return select_apart(exec, layer, q, batch, scratch);
    if (cluster_of(exec, batch) > 1) return {.list = scratch.pages, .guard_hits = {}};
    choose_pages_of_step(exec, layer, q, batch, config_.page_score, config_.group, budget_of(config_), scratch.scores,
                         scratch.pages);
    return {.list = scratch.pages, .guard_hits = {}};
  }

  MadeLists select_apart(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                         const QuestScratch& scratch) const {
    score_pages_apart(exec, layer, q, batch, config_.page_score, config_.group, scratch.scores);
    layer.begin_stage(exec, "select", [=, this, pages = pages_of(batch), list = scratch.pages] {
      return select_pages_cost(limits().shape, pages, entries_of(exec, list));
    });
    select_pages(exec, limits().shape, batch, scratch.scores, budget_of(config_), dense_limit(), scratch.pages);
    return {.list = scratch.pages, .guard_hits = {}};
  }

  // Blocks of the clusters that choose and attend in one launch; 1 where select() has chosen already.
  [[nodiscard]] int cluster_of(const Exec& exec, const Batch& batch) const {
    if constexpr (kHaveCuda) {
      if (exec.on_cuda() && config_.page_score != PageScore::kMeanStd && config_.kernels == Kernels::kFused) {
        const AttentionShape& shape = limits().shape;
        return cuda::chosen_cluster(shape, batch.seqs, page_count(batch.max_kv_len, shape.page_tokens),
                                    page_list_bound(budget_of(config_), batch.max_kv_len, shape.page_tokens));
      }
    }
    return 1;
  }

  // The newest page is on every list: select_pages does not look at its score.
  [[nodiscard]] bool chooses_by_newest_entries() const override { return false; }

  void attend(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch, const Selection& list,
              const TensorRef& out, TensorView<float, 2> lse, const KeptCounters& counters) override {
    const int cluster = cluster_of(exec, batch);
    if (cluster == 1) return SparseAttention::attend(exec, layer, q, batch, list, out, lse, counters);
    if constexpr (kHaveCuda) {
      layer.begin_stage(exec, "score+select+attend+count", [=, this, seqs = batch.seqs, pages = pages_of(batch)] {
        const AttentionShape& shape = limits().shape;
        const DType dtype = limits().dtype;
        const Cost choosing = choose_pages_cost(shape, dtype, config_.page_score, seqs, pages, entries_of(exec, list));
        return choosing + attend_selected_cost(shape, dtype, seqs, listed_tokens(exec, shape, list));
      });
      cuda::attend_chosen(exec, limits().shape, q, layer.kv, batch, config_.page_score, config_.group,
                          budget_of(config_), dense_limit(), cluster, min_entries(), list, out, lse, counters);
    }
  }

  [[nodiscard]] std::int64_t scoring_bytes(int tokens) const override {
    return page_scoring_bytes(config_.page_score, limits(), tokens);
  }

  QuestConfig config_;
};

}  // namespace

std::int64_t page_scoring_bytes(PageScore score, const AttentionLimits& limits, int tokens) {
  return page_count(tokens, limits.shape.page_tokens) * page_facts_bytes(limits.shape.head_dim, limits.dtype, score);
}

AttentionScratch quest_scratch(const QuestConfig& config, const AttentionLimits& limits) {
  ScratchCarver counter(nullptr);
  const QuestScratch largest = lay_out(counter, config, limits.shape, limits.max_seqs, limits.max_context);
  const int entries = static_cast<int>(largest.pages.index.shape(2));
  return {
      .partials = list_partial_bytes(limits, lists_differ(config), entries, kMinSplitTokens / limits.shape.page_tokens),
      .selections = counter.used() + ticket_bytes(limits)};
}

std::unique_ptr<AttentionBackend> make_quest(const QuestConfig& config, int dense_below,
                                             const AttentionLimits& limits) {
  return std::make_unique<Quest>(config, dense_below, limits);
}

}  // namespace vesper
