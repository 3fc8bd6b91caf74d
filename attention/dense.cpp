// Dense attention: the list of keys is everything.
#include <algorithm>

#include "attention/attention.h"
#include "engine/core/stream.h"

namespace vesper {

int decode_units(const AttentionLimits& limits) {
  if (limits.device == DeviceKind::kCpu) {
    const std::int64_t keys = std::int64_t{limits.max_seqs} * limits.shape.kv_heads * limits.max_context;
    return static_cast<int>(std::min(keys, std::int64_t{1} << 30));
  }
  constexpr int kBlocksPerMultiprocessor = 2;  // hide each other's waits
  return kBlocksPerMultiprocessor * device_info(DeviceKind::kCuda).multiprocessors;
}

namespace {

// Largest number of (sequence, split) pairs that any batch of up to max_seqs sequences can ask for.
std::int64_t partial_slots(const AttentionLimits& limits) {
  const int units = decode_units(limits);
  std::int64_t slots = 0;
  for (int seqs = 1; seqs <= limits.max_seqs; ++seqs) {
    const int splits = most_splits(limits.shape, seqs, limits.max_context, units);
    slots = std::max(slots, std::int64_t{seqs} * splits);
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
      units_(decode_units(limits)),
      partials_(limits.memory(), scratch_bytes(limits), "the partial results of split attention") {}

void DenseAttention::plan(const Batch& batch) {
  plan_ = plan_splits(limits_.shape, batch.seqs, batch.max_kv_len, units_, units_);
}

void DenseAttention::run(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                         const TensorRef& out, TensorView<float, 2> lse) {
  run_short(exec, layer, q, batch, out, lse, INT32_MAX);
}

void DenseAttention::run_short(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                               const TensorRef& out, TensorView<float, 2> lse, std::int32_t longest) {
  const AttentionShape& shape = limits_.shape;
  auto* floats = static_cast<float*>(partials_.data());
  const std::int64_t rows = std::int64_t{batch.seqs} * shape.heads * plan_.splits;
  const SplitPartials partials{
      .out = TensorView<float, 4>(floats, batch.seqs, shape.heads, plan_.splits, shape.head_dim),
      .lse = TensorView<float, 3>(floats + rows * shape.head_dim, batch.seqs, shape.heads, plan_.splits)};
  layer.begin_stage(exec, "attend", [=, dtype = limits_.dtype, lengths = batch.host_kv_len] {
    std::int64_t seqs = 0;
    std::int64_t tokens = 0;
    for (const std::int32_t kv_len : lengths) {
      seqs += kv_len <= longest ? 1 : 0;
      tokens += kv_len <= longest ? kv_len : 0;
    }
    return attend_decode_cost(shape, dtype, seqs, tokens);
  });
  attend_decode(exec, shape, q, layer.kv, batch, plan_, partials, out, lse, longest);
}

}  // namespace vesper
