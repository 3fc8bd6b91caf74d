// Weights without a checkpoint: drawn from a seed, for measurements at real sizes.
#include <cmath>
#include <utility>

#include "models/fill.h"
#include "models/weight_table.h"
#include "models/weights.h"

namespace vesper {
namespace {

// A uniform draw in +-r has variance r^2 / 3. Matrices get 1 / columns, so that unit variance in gives unit variance
// out; the embedding gets 1.
float half_range(const ExpectedWeight& weight) {
  const bool is_embedding = weight.rule == &llama_weight_table().front();
  return std::sqrt(3.0F / (is_embedding ? 1.0F : static_cast<float>(weight.shape[1])));
}

}  // namespace

ModelWeights synthetic_weights(const ModelConfig& config, std::uint64_t seed, const Exec& exec) {
  const std::vector<ExpectedWeight> expected = expected_weights(config);
  const WeightsLayout layout = lay_out(expected, plan_synthetic_weights(config, exec.device).dtype);
  Buffer storage(exec.on_cuda() ? Memory::kDevice : Memory::kHost, layout.bytes, "the weights");
  std::vector<TensorRef> tensors;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    tensors.push_back(laid_out_tensor(layout, expected, i, storage.data()));
    if (expected[i].rule->is_matrix()) {
      fill_uniform(exec, tensors.back(), seed, static_cast<std::uint32_t>(i), half_range(expected[i]));
    } else {
      fill_constant(exec, tensors.back(), 1.0F);
    }
  }
  ModelWeights weights = place_weights(config, expected, tensors);
  weights.storage = std::move(storage);
  return weights;
}

}  // namespace vesper
