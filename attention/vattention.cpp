// vAttention: attend to the heavy tokens exactly and to a random sample of the rest, as large as a bound on the error
// asks. Desai et al., "vAttention: Verified Sparse Attention via Sampling", arXiv 2510.05688.
//
//   static part  sink, window and top-k tokens, weight 1
//   tail         b of the n_rest others, uniform without replacement, weight n_rest / b in numerator and denominator
//   b            from a pilot sample, so that P(error > epsilon) <= delta by the normal bound (Lemma 4.1)
//
// Ours: the pilot is absolute and becomes the first part of the sample; b is sized for the output (or, as the paper ran
// it, for the denominator); a sampled token that alone exceeds the tolerance shows that top-k missed it, and the sample
// grows. Three operations a layer: scores, static part, and attention that draws the tail as it
// goes (attend_sampled).
#include <algorithm>
#include <cmath>

#include "attention/attend_sampled.h"

namespace vesper {
namespace {

struct VAttentionScratch {
  TensorView<float, 3> page_scores;   // top_k_by quest
  TensorView<float, 3> token_scores;  // top_k_by int4 or oracle
  Selection list;
  SampledScratch sampled;
  TensorView<std::int32_t, 2> guard_hits;
};

VAttentionScratch lay_out(ScratchCarver& carver, const VAttentionConfig& config, const AttentionLimits& limits,
                          int seqs, int tokens) {
  const AttentionShape& shape = limits.shape;
  VAttentionScratch scratch;
  if (config.top_k_by == TopKBy::kQuest) {
    scratch.page_scores = carver.take<float>(seqs, shape.kv_heads, page_count(tokens, shape.page_tokens));
  }
  if (config.top_k_by == TopKBy::kInt4 || config.top_k_by == TopKBy::kOracle) {
    scratch.token_scores = carver.take<float>(seqs, shape.heads, tokens);
  }
  scratch.list = take_selection(carver, SelectionUnit::kTokens, seqs, shape.kv_heads, tokens);
  scratch.sampled = take_sampled_scratch(carver, limits, seqs, tokens);
  scratch.guard_hits = carver.take<std::int32_t>(seqs, shape.kv_heads);
  return scratch;
}

// Where static part and pilot leave nothing to save: n <= sink + window + top-k + pilot.
DenseLimit dense_limit_of(const VAttentionConfig& config, int dense_below, int max_context) {
  const auto saves_nothing = [&](int tokens) {
    return tokens <= std::int64_t{tokens_of(config.sink_tokens, tokens)} + tokens_of(config.window_tokens, tokens) +
                         tokens_of(config.top_k, tokens) + tokens_of(config.pilot, tokens);
  };
  int limit = 0;
  for (int tokens = 1; tokens <= max_context && saves_nothing(tokens); ++tokens) limit = tokens;
  return {std::max(dense_below, limit)};
}

// Random entries of all lists. Waits.
std::int64_t tail_entries(const Exec& exec, const Selection& list) {
  Selection statics = list;
  statics.count = list.tail_begin;
  return entries_of(exec, list) - entries_of(exec, statics);
}

class VAttention final : public SparseAttention {
 public:
  VAttention(const VAttentionConfig& config, int dense_below, const AttentionLimits& limits)
      : SparseAttention(limits, dense_limit_of(config, dense_below, limits.max_context),
                        vattention_scratch(config, limits), 1, true),
        config_(config) {
    sample_.epsilon = config.epsilon;
    sample_.z = static_cast<float>(inverse_normal(1.0 - static_cast<double>(config.delta) / 2.0));
    sample_.pilot = config.pilot;
    sample_.verify = config.verify;
    sample_.on_outlier = config.on_outlier;
    sample_.safety = config.safety;
    sample_.seed = config.seed < 0 ? limits.seed : static_cast<std::uint32_t>(config.seed);
  }

 private:
  MadeLists select(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                   ScratchCarver& carver) override {
    const AttentionShape& shape = limits().shape;
    scratch_ = lay_out(carver, config_, limits(), batch.seqs, batch.max_kv_len);
    scratch_.sampled.tickets = all_tickets();
    TopKScores scores;
    if (config_.top_k_by == TopKBy::kQuest) {
      score_pages_apart(exec, layer, q, batch, config_.page_score, config_.group, scratch_.page_scores);
      scores.of_pages = scratch_.page_scores;
    } else if (config_.top_k_by != TopKBy::kNone) {
      const KeySource source = config_.top_k_by == TopKBy::kInt4 ? KeySource::kInt4 : KeySource::kExact;
      layer.begin_stage(exec, "score_tokens", [=, this, seqs = batch.seqs, pages = pages_of(batch)] {
        return score_tokens_cost(limits().shape, limits().dtype, source, seqs, pages * limits().shape.page_tokens);
      });
      score_tokens(exec, shape, q, layer.kv, batch, {}, source, dense_limit(), scratch_.token_scores);
      scores.of_tokens = scratch_.token_scores;
    }
    const StaticRule rule{.sink_tokens = config_.sink_tokens,
                          .window_tokens = config_.window_tokens,
                          .top_k = config_.top_k_by == TopKBy::kNone ? Amount{0.0} : config_.top_k,
                          .group_score = config_.group};
    const std::int64_t scored = scores.of_pages.size() + scores.of_tokens.size();
    layer.begin_stage(exec, "select",
                      [=, list = scratch_.list] { return select_static_cost(scored, entries_of(exec, list)); });
    select_static(exec, shape, batch, scores, rule, dense_limit(), scratch_.list);
    return {.list = scratch_.list, .guard_hits = scratch_.guard_hits};
  }

  void attend(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch, const Selection& list,
              const TensorRef& out, TensorView<float, 2> lse, const KeptCounters& counters) override {
    SampleRule sample = sample_;
    sample.layer = layer.number;
    layer.begin_stage(exec, "sample+attend", [=, this, seqs = batch.seqs] {
      return attend_sampled_cost(limits().shape, limits().dtype, seqs, entries_of(exec, list),
                                 tail_entries(exec, list));
    });
    attend_sampled(exec, limits().shape, q, layer.kv, batch, sample, dense_limit(), list, {scratch_.guard_hits},
                   scratch_.sampled, out, lse, counters);
  }

  // Tokens of the newest page are candidates of top-k, by its score, where the window does not cover it. The newest
  // token itself never is, and of int4 keys the others' rows are older.
  [[nodiscard]] bool chooses_by_newest_entries() const override {
    const int window = tokens_of(config_.window_tokens, dense_limit().tokens + 1);  // the shortest
    return config_.top_k_by == TopKBy::kQuest && window < limits().shape.page_tokens;
  }

  [[nodiscard]] std::int64_t scoring_bytes(int tokens) const override {
    switch (config_.top_k_by) {
      case TopKBy::kQuest:
        return page_scoring_bytes(config_.page_score, limits(), tokens);
      case TopKBy::kInt4:
        return token_scoring_bytes(KeySource::kInt4, limits(), tokens);
      case TopKBy::kOracle:
        return token_scoring_bytes(KeySource::kExact, limits(), tokens);
      case TopKBy::kNone:
        break;
    }
    return 0;
  }

  VAttentionConfig config_;
  SampleRule sample_;
  VAttentionScratch scratch_;  // of the layer that runs
};

}  // namespace

AttentionScratch vattention_scratch(const VAttentionConfig& config, const AttentionLimits& limits) {
  ScratchCarver counter(nullptr);
  (void)lay_out(counter, config, limits, limits.max_seqs, limits.max_context);
  return {.partials = 0, .selections = counter.used() + ticket_bytes(limits)};
}

std::unique_ptr<AttentionBackend> make_vattention(const VAttentionConfig& config, int dense_below,
                                                  const AttentionLimits& limits) {
  return std::make_unique<VAttention>(config, dense_below, limits);
}

}  // namespace vesper
