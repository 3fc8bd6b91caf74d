// Dense attention: the list of keys is everything.
#include <algorithm>

#include "attention/attention.h"
#include "engine/core/stream.h"

namespace vesper {
namespace {

// Blocks that a device runs side by side: two a multiprocessor hide each other's waits. The CPU cuts by length alone,
// as finely as plan_splits allows, so that a sequence's result does not depend on the batch it is in.
int units_of(const AttentionLimits& limits) {
  if (limits.device == DeviceKind::kCpu) {
    const std::int64_t keys = std::int64_t{limits.max_seqs} * limits.shape.kv_heads * limits.max_context;
    return static_cast<int>(std::min(keys, std::int64_t{1} << 30));
  }
  return 2 * device_info(DeviceKind::kCuda).multiprocessors;
}

// Largest number of (sequence, split) pairs that any batch of up to max_seqs sequences can ask for.
std::int64_t partial_slots(const AttentionLimits& limits) {
  const int units = units_of(limits);
  std::int64_t slots = 0;
  for (int seqs = 1; seqs <= limits.max_seqs; ++seqs) {
    const SplitPlan longest = plan_splits(limits.shape, seqs, limits.max_context, units, units);
    slots = std::max(slots, std::int64_t{seqs} * longest.splits);
  }
  return slots;
}

}  // namespace

std::int64_t DenseAttention::scratch_bytes(const AttentionLimits& limits) {
  constexpr std::int64_t kFloatBytes = 4;
  return partial_slots(limits) * limits.shape.heads * (limits.shape.head_dim + 1) * kFloatBytes;
}

DenseAttention::DenseAttention(const AttentionLimits& limits)
    : limits_(limits),
      units_(units_of(limits)),
      partials_(limits.device == DeviceKind::kCuda ? Memory::kDevice : Memory::kHost, scratch_bytes(limits),
                "the partial results of split attention") {}

void DenseAttention::plan(const Batch& batch) {
  plan_ = plan_splits(limits_.shape, batch.seqs, batch.max_kv_len, units_, units_);
}

void DenseAttention::run(const Exec& exec, int /*layer*/, const TensorRef& q, const LayerKv& kv, const Batch& batch,
                         const TensorRef& out, TensorView<float, 2> lse) {
  const AttentionShape& shape = limits_.shape;
  auto* floats = static_cast<float*>(partials_.data());
  const std::int64_t rows = std::int64_t{batch.seqs} * shape.heads * plan_.splits;
  const SplitPartials partials{
      .out = TensorView<float, 4>(floats, batch.seqs, shape.heads, plan_.splits, shape.head_dim),
      .lse = TensorView<float, 3>(floats + rows * shape.head_dim, batch.seqs, shape.heads, plan_.splits)};
  attend_decode(exec, shape, q, kv, batch, plan_, partials, out, lse);
}

}  // namespace vesper
