// Attention of one query token a sequence over sampled lists: the tail is drawn, sized and attended to in one
// operation, given the static part. Formulas in attention/sample_tail.h.
#pragma once

#include "attention/attend_selected.h"
#include "attention/sample_tail.h"
#include "attention/sparse.h"

namespace vesper {

// What attend_sampled works with, on the step's device; each device uses its own half.
struct SampledScratch {
  // CPU: results of static part and pilot, and parts of attend_selected.
  TensorRef pilot_out;             // [seqs, heads * head_dim]
  TensorView<float, 2> pilot_lse;  // [seqs, heads]
  SplitPartials partials;

  // CUDA. A block is one of the team that attends over a list, `static` and `tail` the two parts of a list.
  TensorView<float, 4> parts;      // [blocks, {static, tail}, group, head_dim] sums of e^{s - max} v
  TensorView<float, 4> part_sums;  // [blocks, {static, tail}, group, {max, sum}], max in exponents of 2
  TensorView<float, 2> estimates;  // [lists, {o, sum over the pilot of w (v - o), log2 of D}]: 2 group head_dim + group
  TensorView<double, 3> moments;   // [blocks, group, {sum w, sum w^2, sum w^2 |v - o|^2}]
  TensorView<std::int32_t, 3> beyond;   // [blocks, {first look, second}, {fresh, old draws}] beyond the tolerance
  TensorView<float, 2> shares;          // [lists, capacity] of a draw: its largest w / tolerance
  TensorView<std::int32_t, 2> tickets;  // [seqs, kv_heads] counters, of the caller's: all zero before and after
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
