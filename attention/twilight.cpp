// Twilight: of a wide base selection, attend to the fewest tokens that carry the share p of the attention. Lin et al.,
// "Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning", arXiv 2502.02770.
//
//   I0 = the base selector's tokens, a quarter of the context by default (section 4.1)
//   W  = softmax over I0 of q . k~ / sqrt(d), k~ the 4-bit keys (section 4.2)
//   I1 = the smallest set with sum_{i in I1} W_i >= p; attend to I1 with the exact keys and values
//
// Ours: the base's pages are chosen once a KV head, the pruned sets of a group's heads are united, and the heads attend
// to the union; a head keeps at least min_tokens; the newest token is always kept.
#include <algorithm>

#include "attention/sparse.h"
#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr int kMinSplitTokens = 128;

PageBudget base_budget_of(const TwilightConfig& config) {
  return {.tokens = config.base_budget, .sink_tokens = config.sink_tokens, .window_tokens = config.window_tokens};
}

struct TwilightScratch {
  TensorView<float, 3> page_scores;
  Selection pages;  // the base's; without data where every token is a candidate
  TensorView<float, 3> token_scores;
  Selection tokens;
};

TwilightScratch lay_out(ScratchCarver& carver, const TwilightConfig& config, const AttentionShape& shape, int seqs,
                        int tokens) {
  TwilightScratch scratch;
  int pages = page_count(tokens, shape.page_tokens);
  if (!config.dense_base) {
    scratch.page_scores = carver.take<float>(seqs, shape.kv_heads, pages);
    pages = page_list_bound(base_budget_of(config), tokens, shape.page_tokens);
    scratch.pages = take_selection(carver, SelectionUnit::kPages, seqs, shape.kv_heads, pages);
  }
  const int candidates = pages * shape.page_tokens;  // whole pages of rows
  scratch.token_scores = carver.take<float>(seqs, shape.heads, candidates);
  scratch.tokens = take_selection(carver, SelectionUnit::kTokens, seqs, shape.kv_heads, candidates);
  return scratch;
}

class Twilight final : public SparseAttention {
 public:
  Twilight(const TwilightConfig& config, int dense_below, const AttentionLimits& limits)
      : SparseAttention(limits, {std::max(dense_below, config.min_tokens)}, twilight_scratch(config, limits),
                        kMinSplitTokens, true),
        config_(config) {
    if (!config.dense_base && config.base_budget.value >= 1.0 && config.base_budget.value < limits.shape.page_tokens) {
      refuse({"setting up twilight", "a base_budget of " + std::to_string(static_cast<int>(config.base_budget.value)),
              "at least one page of " + std::to_string(limits.shape.page_tokens) + " tokens", "raise base_budget"});
    }
  }

 private:
  MadeLists select(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                   ScratchCarver& carver) override {
    const AttentionShape& shape = limits().shape;
    const TwilightScratch scratch = lay_out(carver, config_, shape, batch.seqs, batch.max_kv_len);
    const std::int64_t pages = pages_of(batch);
    if (!config_.dense_base) {
      choose_pages_of_step(exec, layer, q, batch, config_.page_score, config_.group, base_budget_of(config_),
                           scratch.page_scores, scratch.pages);
    }
    const auto candidates = [=, this, list = scratch.pages] {  // of one KV head
      const AttentionShape& of = limits().shape;
      return config_.dense_base ? pages * of.page_tokens : listed_tokens(exec, of, list) / of.kv_heads;
    };
    layer.begin_stage(exec, "score_tokens", [=, this, seqs = batch.seqs] {
      return score_tokens_cost(limits().shape, limits().dtype, config_.scores, seqs, candidates());
    });
    score_tokens(exec, shape, q, layer.kv, batch, scratch.pages, config_.scores, dense_limit(), scratch.token_scores);
    const TopPRule rule{.top_p = config_.top_p,
                        .min_tokens = config_.min_tokens,
                        .sink_tokens = config_.sink_tokens,
                        .window_tokens = config_.window_tokens};
    layer.begin_stage(exec, "prune", [=, this, list = scratch.tokens] {
      return prune_top_p_cost(limits().shape, candidates(), entries_of(exec, list));
    });
    prune_top_p(exec, shape, batch, scratch.token_scores, scratch.pages, rule, dense_limit(), scratch.tokens);
    return {.list = scratch.tokens, .guard_hits = {}};
  }

  // The newest token's weight is a part of the softmax that top-p cuts; its page is always the base's, so of page
  // bounds the newest do not matter.
  [[nodiscard]] bool chooses_by_newest_entries() const override { return config_.scores == KeySource::kInt4; }

  [[nodiscard]] std::int64_t scoring_bytes(int tokens) const override {
    const AttentionShape& shape = limits().shape;
    if (config_.dense_base) return token_scoring_bytes(config_.scores, limits(), tokens);
    const int pages = page_list_bound(base_budget_of(config_), tokens, shape.page_tokens);
    const int candidates = std::min(tokens, pages * shape.page_tokens);
    return page_scoring_bytes(config_.page_score, limits(), tokens) +
           token_scoring_bytes(config_.scores, limits(), candidates);
  }

  TwilightConfig config_;
};

}  // namespace

std::int64_t token_scoring_bytes(KeySource source, const AttentionLimits& limits, int tokens) {
  const std::int64_t head_dim = limits.shape.head_dim;
  constexpr std::int64_t kParamBytes = 4;  // scale and zero
  const std::int64_t row =
      source == KeySource::kInt4 ? head_dim / 2 + kParamBytes : head_dim * dtype_bytes(limits.dtype);
  return tokens * row;
}

AttentionScratch twilight_scratch(const TwilightConfig& config, const AttentionLimits& limits) {
  ScratchCarver counter(nullptr);
  const TwilightScratch largest = lay_out(counter, config, limits.shape, limits.max_seqs, limits.max_context);
  const int entries = static_cast<int>(largest.tokens.index.shape(2));
  return {.partials = list_partial_bytes(limits, true, entries, kMinSplitTokens),
          .selections = counter.used() + ticket_bytes(limits)};
}

std::unique_ptr<AttentionBackend> make_twilight(const TwilightConfig& config, int dense_below,
                                                const AttentionLimits& limits) {
  return std::make_unique<Twilight>(config, dense_below, limits);
}

}  // namespace vesper
