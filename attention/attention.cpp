#include "attention/attention.h"

#include <algorithm>

#include "engine/core/error.h"

namespace vesper {

std::int64_t ModelAttention::scratch_bytes(const AttentionConfig& /*config*/, const AttentionLimits& limits) {
  return DenseAttention::scratch_bytes(limits);
}

ModelAttention::ModelAttention(const AttentionConfig& config, const AttentionLimits& limits) : limits_(limits) {
  if constexpr (kHaveCuda) {
    if (limits.device == DeviceKind::kCuda) cuda::check_attention_shape(limits.shape);
  }
  std::vector<BackendConfig> distinct;
  for (const BackendConfig& layer : config.layers) {
    auto known = std::find(distinct.begin(), distinct.end(), layer);
    const auto number = static_cast<std::size_t>(known - distinct.begin());
    if (known == distinct.end()) {
      distinct.push_back(layer);
      backends_.push_back(std::make_unique<DenseAttention>(limits));
    }
    of_layer_.push_back(backends_[number].get());
  }
}

void ModelAttention::plan(const Batch& batch) {
  if (batch.phase == Phase::kPrefill) return;
  for (const auto& backend : backends_) backend->plan(batch);
}

void ModelAttention::run(const Exec& exec, int layer, const TensorRef& q, const LayerKv& kv, const Batch& batch,
                         const TensorRef& out, TensorView<float, 2> lse) {
  if (batch.phase == Phase::kPrefill) return attend_prefill(exec, limits_.shape, q, kv, batch, out);
  of_layer_[static_cast<std::size_t>(layer)]->run(exec, layer, q, kv, batch, out, lse);
}

}  // namespace vesper
