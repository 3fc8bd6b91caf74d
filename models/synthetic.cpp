// Weights without a checkpoint: drawn from a seed, for measurements at real sizes.
#include <algorithm>
#include <cassert>
#include <cmath>
#include <optional>
#include <utility>

#include "engine/core/stream.h"
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

// Draws in panels of whole rows, whose elements count on as if they were drawn at once.
class Quantiser {
 public:
  Quantiser(const Exec& exec, DType dtype, std::uint64_t seed)
      : exec_(exec),
        dtype_(dtype),
        seed_(seed),
        panel_(memory_of(exec.device), kPanelBytes, "a panel of weights to quantise") {}

  void draw(const ExpectedWeight& weight, std::size_t number, std::int64_t first_row, const Int4Matrix& to) {
    const std::int64_t fits = kPanelBytes / (to.columns * dtype_bytes(dtype_));
    const std::int64_t step = fits / 4 * 4;  // draws come in fours
    assert(step > 0);                        // models/model_config.cpp caps columns at 4 MiB of a row
    for (std::int64_t first = 0; first < weight.shape[0]; first += step) {
      const std::int64_t rows = std::min(step, weight.shape[0] - first);
      const TensorRef drawn = panel_.ref(dtype_, rows, to.columns);
      fill_uniform(exec_, drawn, seed_, static_cast<std::uint32_t>(number), half_range(weight), first * to.columns);
      quantise_int4(exec_, drawn, first_row + first, to);
    }
  }

 private:
  static constexpr std::int64_t kPanelBytes = 32LL << 20;

  Exec exec_;
  DType dtype_;
  std::uint64_t seed_;
  Buffer panel_;
};

}  // namespace

ModelWeights synthetic_weights(const ModelConfig& config, std::uint64_t seed, const Exec& exec, WeightFormat format) {
  const std::vector<ExpectedWeight> expected = expected_weights(config);
  const WeightsLayout layout = lay_out(expected, plan_synthetic_weights(config, exec.device).dtype,
                                       lay_out_int4(expected, config.tied_embeddings, format));
  Buffer storage(memory_of(exec.device), layout.bytes, "the weights");
  std::optional<Quantiser> quantiser;
  if (!layout.int4.parts.empty()) quantiser.emplace(exec, layout.dtype, seed);
  std::vector<PlacedWeight> placed;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const PlacedWeight& weight = placed.emplace_back(laid_out_weight(layout, expected, i, storage.data()));
    if (!expected[i].rule->is_matrix()) {
      fill_constant(exec, weight.tensor, 1.0F);
    } else if (!layout.int4.replaces(i)) {
      fill_uniform(exec, weight.tensor, seed, static_cast<std::uint32_t>(i), half_range(expected[i]));
    }
    if (const Int4Part* part = layout.int4.of(i)) {
      if (part->first_row == 0) clear_int4_padding(exec, weight.int4);
      quantiser->draw(expected[i], i, part->first_row, weight.int4);
    }
  }
  if (quantiser) synchronize(exec);  // the panel is read until then
  ModelWeights weights = place_weights(config, expected, placed);
  weights.storage = std::move(storage);
  return weights;
}

}  // namespace vesper
