#include "attention/attend_sampled.h"

#include <algorithm>

namespace vesper {
namespace {

constexpr int kMinSplitTokens = 128;
constexpr int kLeastParts = 8;  // of a list's round
constexpr int kAllParts = 16384;

// Places for a list's parts: static part, pilot and squares of a team, or those of a round.
int places_of(const SampledCuts& cuts) {
  return std::max(3 * cuts.team, cuts.parts);
}

// Parts of three rounds of draws of all lists, and of a second look at pilots.
std::int64_t most_queued(std::int64_t lists) {
  return 4 * (kAllParts + kLeastParts * lists);
}

}  // namespace

std::int64_t sample_tickets(std::int64_t lists) {
  constexpr std::int64_t kBits = 32;
  constexpr std::int64_t kMostBlocks = 4096;  // which wait for entries behind the last
  return lists + kQueueNumbers + (most_queued(lists) + kMostBlocks) / kBits;
}

SampledCuts sampled_cuts(int lists, int group, int tokens, int units) {
  // A part costs its block a twentieth of a long list's static part and pilot beside its share of them.
  constexpr double kOwnCost = 0.05;
  constexpr int kMostTeam = 32;
  constexpr int kShortContext = 8192;
  constexpr int kShortTeam = 16;
  constexpr int kWideGroup = 4;
  SampledCuts cuts;
  double least = 0.0;
  for (int team = 1; team <= (tokens < kShortContext ? kShortTeam : kMostTeam); team *= 2) {
    const std::int64_t waves = (std::int64_t{lists} * team + units - 1) / units;
    const double cost = static_cast<double>(waves) * (1.0 / team + kOwnCost);
    if (team == 1 || cost < least) {
      least = cost;
      cuts.team = team;
    }
  }
  // Few lists leave a block one part of each, many have the other lists' work to hide a long part behind. A group draws
  // as much as the head of it that asks for most: long samples, whose parts may be longer too. Measured with 1 and 4
  // heads at 32K (docs/kernels.md).
  if (group >= kWideGroup && tokens >= kShortContext) {
    cuts.draws = std::clamp(16 * lists, 128, 512);
  } else {
    cuts.draws = lists * 8 <= units ? 128 : 256;
  }
  cuts.parts = std::clamp(kAllParts / std::max(1, lists), kLeastParts, kMostParts);
  return cuts;
}

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
  const int group = shape.group();
  scratch.cuts = sampled_cuts(lists, group, tokens, decode_units(limits));
  const int parts = places_of(scratch.cuts);
  // As much as any smaller step takes, whose lists are cut more finely.
  std::int64_t most = 0;
  for (int s = 1; s <= seqs; ++s) {
    const int smaller = s * shape.kv_heads;
    most =
        std::max(most, std::int64_t{smaller} * places_of(sampled_cuts(smaller, group, tokens, decode_units(limits))));
  }
  scratch.parts =
      TensorView<float, 4>(carver.take<float>(most, group, shape.head_dim).data(), lists, parts, group, shape.head_dim);
  scratch.part_sums =
      TensorView<float, 4>(carver.take<float>(most, group, kPartSums).data(), lists, parts, group, kPartSums);
  scratch.totals = carver.take<float>(lists, 2, group, shape.head_dim);
  scratch.total_sums = carver.take<float>(lists, 2, group, 2);
  scratch.estimates = carver.take<float>(lists, group, shape.head_dim);
  scratch.estimate_sums = carver.take<float>(lists, group, 2);
  scratch.rounds = carver.take<std::int32_t>(lists, kRoundNumbers);
  scratch.queue = carver.take<std::int32_t>(most_queued(lists), kQueuedNumbers);
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
