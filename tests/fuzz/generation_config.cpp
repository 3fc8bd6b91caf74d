// generation_config.json.
#include "models/generation_config.h"

#include "engine/core/json.h"
#include "tests/fuzz/fuzz.h"

namespace vesper {

void fuzz(std::string_view input) {
  constexpr int kVocab = 32000;
  const GenerationConfig config =
      parse_generation_config(parse_json(input, "generation_config.json"), kVocab, "generation_config.json");
  for (const int id : config.eos_ids) promise(id >= 0 && id < kVocab, "an id that ends answers is the vocabulary's");
  promise(config.temperature > 0.0F && config.top_p > 0.0F && config.top_p <= 1.0F && config.top_k >= 0,
          "answers can be drawn so");
}

}  // namespace vesper
