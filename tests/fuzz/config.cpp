// config.json, and what a model is planned from: frequencies, the list of weights.
#include "engine/core/json.h"
#include "models/model_config.h"
#include "tests/fuzz/fuzz.h"

namespace vesper {

void fuzz(std::string_view input) {
  const ModelConfig config = parse_model_config(parse_json(input, "config.json"), "config.json");
  promise(config.heads % config.kv_heads == 0 && config.head_dim % 2 == 0, "heads come in groups, channels in pairs");
  promise(config.parameters() > 0, "a model has weights");
  promise(!describe(config.rope).empty(), "positions have a description");
  for (const int length : {1, config.max_positions}) {
    const std::vector<float> frequencies = rope_inv_freq(config.rope, config.head_dim, length);
    promise(static_cast<int>(frequencies.size()) * 2 == config.head_dim, "a pair of channels has a frequency");
  }
}

}  // namespace vesper
