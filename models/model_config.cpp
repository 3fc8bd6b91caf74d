#include "models/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "models/config_keys.h"
#include "models/families.h"
#include "models/generation_config.h"
#include "models/weight_table.h"

namespace vesper {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

// Caps on what a config may ask for, so that products of extents stay far from overflow; generous beside the largest
// Llama (126 layers, hidden 16384, 128 heads, ffn 53248, vocab 128256).
constexpr int kMaxLayers = 1024;
constexpr int kMaxHidden = 1 << 17;
constexpr int kMaxHeads = 1024;
constexpr int kMaxHeadDim = 1024;
constexpr int kMaxFfn = 1 << 20;
constexpr int kMaxVocab = 1 << 24;
constexpr int kMaxPositions = 1 << 27;

DType weights_dtype(const ConfigKeys& keys) {
  for (const char* key : {"dtype", "torch_dtype"}) {  // transformers 5 and before
    const Json* value = keys.find(key);
    if (value == nullptr) continue;
    if (*value == "bfloat16") return DType::kBf16;
    if (*value == "float16") return DType::kF16;
    if (*value == "float32") return DType::kF32;
    keys.refuse_key(key, config_value_text(*value), "bfloat16, float16 or float32");
  }
  return DType::kF32;
}

// One id or a list; null means none.
std::vector<int> token_ids(const ConfigKeys& keys, const std::string& key, int fallback, int vocab) {
  const Json* value = keys.find(key);
  if (value == nullptr) return keys.has(key) ? std::vector<int>{} : std::vector<int>{fallback};
  std::vector<int> ids;
  if (!value->is_array()) return {keys.integer(key, *value, 0, vocab - 1)};
  for (const Json& id : *value) ids.push_back(keys.integer(key, id, 0, vocab - 1));
  return ids;
}

void refuse_what_no_family_has(const ConfigKeys& keys) {
  keys.must_be_absent("quantization_config", "quantised checkpoints are not supported");
  if (const Json* act = keys.find("hidden_act"); act != nullptr && *act != "silu") {
    keys.refuse_key("hidden_act", config_value_text(*act), "\"silu\"");
  }
}

// heads, kv_heads and head_dim, which depend on each other.
void read_heads(const ConfigKeys& keys, const Family& family, ModelConfig& config) {
  config.heads = keys.count("num_attention_heads", family.heads, 1, kMaxHeads);
  config.kv_heads = keys.has("num_key_value_heads") || family.kv_heads == 0 ? config.heads : family.kv_heads;
  if (const Json* kv_heads = keys.find("num_key_value_heads"); kv_heads != nullptr) {
    config.kv_heads = keys.integer("num_key_value_heads", *kv_heads, 1, kMaxHeads);
  }
  if (config.heads % config.kv_heads != 0) {
    refuse({"reading " + keys.source(),
            "num_attention_heads " + std::to_string(config.heads) + " and num_key_value_heads " +
                std::to_string(config.kv_heads),
            "a number of heads that num_key_value_heads divides", "correct one of the two keys"});
  }
  if (const Json* head_dim = keys.find("head_dim"); head_dim != nullptr) {
    config.head_dim = keys.integer("head_dim", *head_dim, 2, kMaxHeadDim);
  } else {
    if (config.hidden % config.heads != 0) {
      refuse({"reading " + keys.source(),
              "hidden_size " + std::to_string(config.hidden) + " and num_attention_heads " +
                  std::to_string(config.heads) + " without head_dim",
              "a hidden_size that num_attention_heads divides", "give head_dim"});
    }
    config.head_dim = config.hidden / config.heads;
  }
  if (config.head_dim % 2 != 0 || config.head_dim > kMaxHeadDim) {
    keys.refuse_key(
        "head_dim", std::to_string(config.head_dim),
        "an even number up to " + std::to_string(kMaxHeadDim) + ": rotary embeddings turn pairs of channels");
  }
}

}  // namespace

std::int64_t ModelConfig::parameters() const {
  std::int64_t sum = 0;
  for (const ExpectedWeight& weight : expected_weights(*this)) sum += weight.elements();
  return sum;
}

ModelConfig parse_model_config(const nlohmann::json& document, const std::string& source) {
  const ConfigKeys keys(document, source);
  const Family& family = family_of(keys);
  refuse_what_no_family_has(keys);
  ModelConfig config;
  config.architecture = family.architecture;
  config.layers = keys.count("num_hidden_layers", family.layers, 1, kMaxLayers);
  config.hidden = keys.count("hidden_size", family.hidden, 1, kMaxHidden);
  config.ffn = keys.count("intermediate_size", family.ffn, 1, kMaxFfn);
  config.vocab = keys.count("vocab_size", family.vocab, 1, kMaxVocab);
  config.max_positions = keys.count("max_position_embeddings", family.max_positions, 1, kMaxPositions);
  family.refuse_unsupported(keys, config.max_positions);
  read_heads(keys, family, config);
  config.rms_eps = static_cast<float>(keys.real("rms_norm_eps", family.rms_eps, 0.0, 1.0));
  config.rope = read_rope(keys, family.rope_theta, config.head_dim, config.max_positions);
  config.tied_embeddings = keys.flag("tie_word_embeddings");
  config.dtype = weights_dtype(keys);
  const std::vector<int> bos = token_ids(keys, "bos_token_id", family.bos_id, config.vocab);
  config.bos_id = bos.empty() ? -1 : bos.front();
  config.eos_ids = token_ids(keys, "eos_token_id", family.eos_id, config.vocab);
  return config;
}

ModelConfig load_model_config(const std::string& folder) {
  const fs::path path = fs::path(folder) / "config.json";
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) {
    refuse({"opening the model " + folder,
            fs::exists(folder, ignored) ? "something that is no folder" : "no such folder",
            "a folder with config.json and safetensors files", "check the path"});
  }
  if (!fs::exists(path, ignored)) {
    refuse({"opening the model " + folder, "no config.json in it",
            "a folder as Hugging Face's save_pretrained writes it", "check the path or copy config.json there"});
  }
  ModelConfig config = parse_model_config(read_json_file(path.string()), path.string());
  const GenerationConfig generation = load_generation_config(folder, config.vocab);
  if (!generation.eos_ids.empty()) config.eos_ids = generation.eos_ids;
  return config;
}

std::string configs_folder(const std::string& name) {
  const std::string doing = "looking for configs/" + name;
  if (const char* given = std::getenv("VESPER_CONFIGS"); given != nullptr) {
    const fs::path folder = fs::path(given) / name;
    if (fs::is_directory(folder)) return folder.string();
    refuse({doing, "no folder " + folder.string(), "one, since VESPER_CONFIGS is set",
            "set VESPER_CONFIGS to the configs folder or unset it"});
  }
  std::error_code ignored;
  const fs::path binary = fs::read_symlink("/proc/self/exe", ignored).parent_path();
  const std::array<fs::path, 3> candidates = {binary / "../configs" / name, binary / "../../configs" / name,
                                              fs::path(VESPER_SOURCE_CONFIGS) / name};
  for (const fs::path& candidate : candidates) {
    if (fs::is_directory(candidate, ignored)) return candidate.lexically_normal().string();
  }
  refuse({doing, "none beside " + binary.string(), "the folder that comes with vesper",
          "set VESPER_CONFIGS to the configs folder"});
}

ModelConfig synthetic_model_config(const std::string& name) {
  const fs::path folder = configs_folder("models");
  std::vector<std::string> known;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".json") known.push_back(entry.path().stem().string());
  }
  std::sort(known.begin(), known.end());
  if (std::find(known.begin(), known.end(), name) == known.end()) {
    refuse({"looking for the synthetic model " + in_quotes(name), "no such shape in " + folder.string(),
            "one of: " + listed(known), ""});
  }
  const std::string path = (folder / (name + ".json")).string();
  return parse_model_config(read_json_file(path), path);
}

}  // namespace vesper
