#include "models/families.h"

#include <array>
#include <nlohmann/json.hpp>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

constexpr int kMistralWindow = 4096;  // MistralConfig's sliding_window where the key is absent

void refuse_in_llama(const ConfigKeys& keys, int /*max_positions*/) {
  keys.must_be_off("attention_bias", "biases are not supported");
  keys.must_be_off("mlp_bias", "biases are not supported");
}

// A window that is as long as the context never hides a key, so an absent one matters only where contexts are longer.
void refuse_in_mistral(const ConfigKeys& keys, int max_positions) {
  const std::string expected = "null: sliding windows are not supported";
  if (const nlohmann::json* window = keys.find("sliding_window"); window != nullptr) {
    keys.refuse_key("sliding_window", config_value_text(*window), expected);
  }
  if (!keys.has("sliding_window") && max_positions > kMistralWindow) {
    keys.refuse_key("sliding_window",
                    "no such key, which transformers reads as " + std::to_string(kMistralWindow) + " beside " +
                        std::to_string(max_positions) + " positions",
                    expected);
  }
}

// Sources: LlamaConfig and MistralConfig of transformers 5.
constexpr std::array<Family, 2> kFamilies = {{
    {.architecture = "LlamaForCausalLM",
     .model_type = "llama",
     .layers = 32,
     .hidden = 4096,
     .ffn = 11008,
     .heads = 32,
     .kv_heads = 0,
     .vocab = 32000,
     .max_positions = 2048,
     .rms_eps = 1e-6,
     .rope_theta = 10000.0,
     .bos_id = 1,
     .eos_id = 2,
     .refuse_unsupported = refuse_in_llama},
    {.architecture = "MistralForCausalLM",
     .model_type = "mistral",
     .layers = 32,
     .hidden = 4096,
     .ffn = 14336,
     .heads = 32,
     .kv_heads = 8,
     .vocab = 32000,
     .max_positions = 131072,
     .rms_eps = 1e-6,
     .rope_theta = 10000.0,
     .bos_id = 1,
     .eos_id = 2,
     .refuse_unsupported = refuse_in_mistral},
}};

}  // namespace

std::span<const Family> families() {
  return kFamilies;
}

const Family& family_of(const ConfigKeys& keys) {
  std::string found = "neither \"architectures\" nor \"model_type\"";
  if (const nlohmann::json* names = keys.find("architectures"); names != nullptr) {
    if (!names->is_array() || names->empty() || !names->front().is_string()) {
      keys.refuse_key("architectures", config_value_text(*names), "a list of one name");
    }
    for (const Family& family : kFamilies) {
      if (names->front() == family.architecture) return family;
    }
    found = "the architecture " + config_value_text(names->front());
  } else if (const nlohmann::json* type = keys.find("model_type"); type != nullptr) {
    for (const Family& family : kFamilies) {
      if (*type == family.model_type) return family;
    }
    found = "the model type " + config_value_text(*type);
  }
  std::vector<std::string> known;
  known.reserve(kFamilies.size());
  for (const Family& family : kFamilies) known.emplace_back(family.architecture);
  refuse({"reading " + keys.source(), found, "one of: " + listed(known), "choose a model of a supported architecture"});
}

}  // namespace vesper
