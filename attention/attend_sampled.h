// Attention of one query token a sequence over sampled lists: the tail is drawn, sized and attended to in one
// operation, given the static part. Formulas in attention/sample_tail.h.
#pragma once

#include "attention/attend_selected.h"
#include "attention/sample_tail.h"
#include "attention/sparse.h"

namespace vesper {

// How the work on lists is cut into parts on CUDA, where as many blocks as run at once take them as they come. The cuts
// depend on the number of lists and on each list's own numbers, so results do not depend on who takes what.
struct SampledCuts {
  int team = 1;    // parts of a list's static part and pilot
  int draws = 16;  // of a later part, a multiple of 16, unless they are too many for
  int parts = 1;   // so many parts of each round of draws
};
// For lists of up to `tokens` entries, each for `group` query heads, on a device that runs `units` blocks.
SampledCuts sampled_cuts(int lists, int group, int tokens, int units);

inline constexpr int kMostParts = 64;  // of a round
inline constexpr int kPartSums = 4;
inline constexpr int kRoundNumbers = 8;
inline constexpr int kQueueNumbers = 4;
inline constexpr int kQueuedNumbers = 8;

// Counters of lists and of the queue, and a bit for each of its entries.
std::int64_t sample_tickets(std::int64_t lists);

// What attend_sampled works with, on the step's device; each device uses its own half.
struct SampledScratch {
  // CPU: results of static part and pilot, and parts of attend_selected.
  TensorRef pilot_out;             // [seqs, heads * head_dim]
  TensorView<float, 2> pilot_lse;  // [seqs, heads]
  SplitPartials partials;

  // CUDA. A part is what one block attended to: of the static part, of the pilot (and its squared weights), or of what
  // is drawn behind it. Maxima and logarithms are exponents of 2.
  TensorView<float, 4> parts;           // [lists, parts, group, head_dim] sums of w v, w = e^{s - max}
  TensorView<float, 4> part_sums;       // [lists, parts, group, 4]: kPartSums
  TensorView<float, 4> totals;          // [lists, {static, tail}, group, head_dim] of the parts so far
  TensorView<float, 4> total_sums;      // [lists, {static, tail}, group, {max, sum}]
  TensorView<float, 3> estimates;       // [lists, group, head_dim] o of static part and pilot
  TensorView<float, 3> estimate_sums;   // [lists, group, {log D, |o|^2}]
  TensorView<std::int32_t, 2> rounds;   // [lists, kRoundNumbers]
  TensorView<std::int32_t, 2> queue;    // [.., kQueuedNumbers] parts that wait for a block
  TensorView<float, 2> shares;          // [lists, capacity] of a draw: its largest w / tolerance
  TensorView<std::int32_t, 1> tickets;  // [sample_tickets(lists)] of the caller's: all zero before and after
  SampledCuts cuts;
};

// Views over lists of up to `tokens` entries for `seqs` sequences, without `tickets`.
SampledScratch take_sampled_scratch(ScratchCarver& carver, const AttentionLimits& limits, int seqs, int tokens);

// draw_pilot, attend_selected, size_sample, attend_selected. Lists come with their static part and leave with their
// tail; out and lse are those of attend_selected over them, which are then counted where `counters` has data.
void attend_sampled(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const SampleRule& rule, DenseLimit dense, const Selection& list,
                    const SampleReport& report, const SampledScratch& scratch, const TensorRef& out,
                    TensorView<float, 2> lse, const KeptCounters& counters = {});

// `listed`: tokens of all lists, `sampled` those of their tails. K and V of listed tokens once, tails written.
Cost attend_sampled_cost(const AttentionShape& shape, DType dtype, std::int64_t seqs, std::int64_t listed,
                         std::int64_t sampled);

namespace cpu {
void attend_sampled(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                    const SampleRule& rule, DenseLimit dense, const Selection& list, const SampleReport& report,
                    const SampledScratch& scratch, TensorView<float, 2> out, TensorView<float, 2> lse,
                    const KeptCounters& counters);
}  // namespace cpu
namespace cuda {
void attend_sampled(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const SampleRule& rule, DenseLimit dense, const Selection& list,
                    const SampleReport& report, const SampledScratch& scratch, const TensorRef& out,
                    TensorView<float, 2> lse, const KeptCounters& counters);
}  // namespace cuda

}  // namespace vesper
