#include "attention/attend_sampled.h"

#include <algorithm>

namespace vesper {
namespace {

constexpr int kMinSplitTokens = 128;

}  // namespace

SampledScratch take_sampled_scratch(ScratchCarver& carver, const AttentionLimits& limits, int seqs, int tokens) {
  const AttentionShape& shape = limits.shape;
  SampledScratch scratch;
  if (limits.device == DeviceKind::kCpu) {
    const std::int64_t columns = std::int64_t{shape.heads} * shape.head_dim;
    const int splits = list_splits(limits, true, decode_units(limits), seqs, tokens, kMinSplitTokens);
    scratch.pilot_out = tensor_ref(carver.take<float>(seqs, columns).data(), DType::kF32, seqs, columns);
    scratch.pilot_lse = carver.take<float>(seqs, shape.heads);
    scratch.partials = {.out = carver.take<float>(seqs, shape.heads, splits, shape.head_dim),
                        .lse = carver.take<float>(seqs, shape.heads, splits)};
    return scratch;
  }
  const int lists = seqs * shape.kv_heads;
  const int blocks = std::max(lists, decode_units(limits));
  const int group = shape.group();
  scratch.parts = carver.take<float>(blocks, 2, group, shape.head_dim);
  scratch.part_sums = carver.take<float>(blocks, 2, group, 2);
  scratch.estimates = carver.take<float>(lists, 2 * group * shape.head_dim + group);
  scratch.moments = carver.take<double>(blocks, group, 3);
  scratch.beyond = carver.take<std::int32_t>(blocks, 2, 2);
  scratch.shares = carver.take<float>(lists, tokens);
  return scratch;
}

void attend_sampled(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const SampleRule& rule, DenseLimit dense, const Selection& list,
                    const SampleReport& report, const SampledScratch& scratch, const TensorRef& out,
                    TensorView<float, 2> lse, const KeptCounters& counters) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) {
      return cuda::attend_sampled(exec, shape, q, kv, batch, rule, dense, list, report, scratch, out, lse, counters);
    }
  }
  cpu::attend_sampled(shape, q.as<const float, 2>(), kv, batch, rule, dense, list, report, scratch, out.as<float, 2>(),
                      lse, counters);
}

Cost attend_sampled_cost(const AttentionShape& shape, DType dtype, std::int64_t seqs, std::int64_t listed,
                         std::int64_t sampled) {
  const Cost attended = attend_selected_cost(shape, dtype, seqs, listed);
  return {.bytes = attended.bytes + 4 * sampled,
          .flops = attended.flops + 6 * sampled * shape.group() * shape.head_dim};
}

namespace cpu {

void attend_sampled(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                    const SampleRule& rule, DenseLimit dense, const Selection& list, const SampleReport& report,
                    const SampledScratch& scratch, TensorView<float, 2> out, TensorView<float, 2> lse,
                    const KeptCounters& counters) {
  const auto pilot_out = scratch.pilot_out.as<float, 2>();
  draw_pilot(shape, batch, rule, dense, list);
  attend_selected(shape, q, kv, batch, list, kMinSplitTokens, dense, scratch.partials, pilot_out, scratch.pilot_lse);
  size_sample(shape, q, kv, batch, pilot_out, scratch.pilot_lse, rule, dense, list, report);
  attend_selected(shape, q, kv, batch, list, kMinSplitTokens, dense, scratch.partials, out, lse);
  if (counters.lists.data() != nullptr) count_selected(shape, batch, list, dense, counters);
}

}  // namespace cpu
}  // namespace vesper
