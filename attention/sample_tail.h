// vAttention's list: sink, window and top-k tokens, then a uniform random sample of the rest, as large as (epsilon,
// delta) asks. Source: Desai et al., "vAttention: Verified Sparse Attention", arXiv 2510.05688, Lemma 4.1; the output's
// bound, the outlier guard and the draws are ours (docs/backends.md).
#pragma once

#include "attention/attend.h"
#include "attention/residual.h"
#include "attention/select_pages.h"
#include "attention/selection.h"

namespace vesper {

// Tokens that are always on the list. The top-k tokens are those of the largest score outside sink and window, all of
// them where there are no more; ties go to the lower token. NaN scores count as -inf.
struct StaticRule {
  Amount sink_tokens;
  Amount window_tokens;
  Amount top_k;
  GroupScore group_score = GroupScore::kMax;
};

// Where top-k scores come from; at most one has data. None: no top-k.
struct TopKScores {
  TensorView<const float, 3>
      of_tokens;                        // [seqs, heads, tokens] of score_tokens over all tokens, reduced over the group
  TensorView<const float, 3> of_pages;  // [seqs, kv_heads, pages]; a token's score is its page's
};

// Writes the static part: sink, window, top-k, the newest token; ascending, without duplicates; tail_begin = count.
// What lies behind it in the list's row is overwritten.
//   list.index [seqs, kv_heads, capacity >= the longest context]
void select_static(const Exec& exec, const AttentionShape& shape, const Batch& batch, const TopKScores& scores,
                   const StaticRule& rule, DenseLimit dense, const Selection& list);

enum class Verify : std::uint8_t { kOutput, kDenominator };
enum class OnOutlier : std::uint8_t { kEscalate, kReport };

struct SampleRule {
  float epsilon = 0.05F;
  float z = 1.959964F;  // two-sided normal quantile of delta: inverse_normal(1 - delta / 2)
  Amount pilot{512};
  Verify verify = Verify::kOutput;
  OnOutlier on_outlier = OnOutlier::kEscalate;
  float safety = 1.2F;
  std::uint32_t seed = 0;
  std::int32_t layer = 0;
};

// The standard normal's quantile, to 1e-9.
double inverse_normal(double probability);

// What sampling did, for the counters; each [seqs, kv_heads].
struct SampleReport {
  // Tokens that the guard found, in the sample as sized and in what doubling added; 0 where the sequence attends dense.
  TensorView<std::int32_t, 2> guard_hits;
};

// `scores` of pages or tokens read for all sequences and KV heads, `kept` entries of all lists written.
Cost select_static_cost(std::int64_t scores, std::int64_t kept);

// On CUDA draw_pilot and size_sample are parts of attend_sampled (attention/attend_sampled.h).
namespace cpu {
void select_static(const AttentionShape& shape, const Batch& batch, const TopKScores& scores, const StaticRule& rule,
                   DenseLimit dense, const Selection& list);

// Appends the pilot: min(tokens_of(pilot, kv_len), n_rest) draws of the residual, at least two of them, since one has
// no variance (attention/residual.h: DrawOrder, `step` being kv_len - 1). Sets count = tail_begin + drawn and
// tail_log_weight = log(n_rest / drawn); 0 where there is no residual.
void draw_pilot(const AttentionShape& shape, const Batch& batch, const SampleRule& rule, DenseLimit dense,
                const Selection& list);

// Sizes the sample from the pilot and extends the list. For a query head, with o and D = e^lse from attending to static
// part and weighted pilot, and w_i = e^{s_i} / D of pilot token i:
//   denominator  b = (z n_rest sd(w) / epsilon)^2
//   output       b = (z n_rest sqrt(Tr Cov(w_i (v_i - o))) / (epsilon |o|))^2, the error of the ratio in first order,
//                and no less than the denominator's at epsilon
// (unbiased moments over the pilot; Tr Cov as sum over channels; |o| = |N| / D), b' = b / (1 + b / n_rest),
// drawn = ceil(safety b'), between the pilot and n_rest; the largest of the group's heads. tail_log_weight becomes
// log(n_rest / drawn) for pilot and appended draws alike. A sample that is the whole rest has weight 1 and no error.
//
// The guard looks at every sampled token, unless the sample is the whole rest. A term (n_rest / drawn) w_i > epsilon
// (for output: that, or (n_rest / drawn) w_i |v_i - o| > epsilon |o|) of any head of the group means that top-k missed
// a heavy token, where variances of a pilot say little. The token is counted; with kEscalate the sample doubles, is
// looked at again, and becomes the whole rest where it still has one. A heavy token that no draw meets is seen by
// nobody: the chance is (1 - drawn / n_rest) for each, so (epsilon, delta) holds as far as missed tokens are many or
// light.
//   out [seqs, heads * head_dim] in the cache's dtype, lse [seqs, heads]: of attend_selected over static part and pilot
void size_sample(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                 TensorView<const float, 2> out, TensorView<const float, 2> lse, const SampleRule& rule,
                 DenseLimit dense, const Selection& list, const SampleReport& report);
}  // namespace cpu
namespace cuda {
void select_static(const Exec& exec, const AttentionShape& shape, const Batch& batch, const TopKScores& scores,
                   const StaticRule& rule, DenseLimit dense, const Selection& list);
}  // namespace cuda

}  // namespace vesper
