#include "models/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "models/weight_table.h"

namespace vesper {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

constexpr std::array<const char*, 1> kArchitectures = {"LlamaForCausalLM"};

// Caps on what a config may ask for, so that products of extents stay far from overflow; generous beside the largest
// Llama (126 layers, hidden 16384, 128 heads, ffn 53248, vocab 128256).
constexpr int kMaxLayers = 1024;
constexpr int kMaxHidden = 1 << 17;
constexpr int kMaxHeads = 1024;
constexpr int kMaxHeadDim = 1024;
constexpr int kMaxFfn = 1 << 20;
constexpr int kMaxVocab = 1 << 24;
constexpr int kMaxPositions = 1 << 27;
constexpr double kMaxTheta = 1e12;

constexpr double kDefaultTheta = 10000.0;  // as LlamaConfig has it

std::string text_of(const Json& value) {
  return value.is_string() ? in_quotes(value.get<std::string>()) : value.dump(-1, ' ', true).substr(0, 100);
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// Typed access to the keys of one config.json. A key whose default in LlamaConfig is None may also be null.
class Keys {
 public:
  Keys(const Json& document, const std::string& source) : document_(document), source_(source) {
    if (!document.is_object()) {
      refuse({"reading " + source, std::string("JSON of type ") + document.type_name(), "an object",
              "take the config.json that belongs to the weights"});
    }
  }

  // nullptr where the key is absent or null.
  [[nodiscard]] const Json* find(const std::string& key) const {
    const auto found = document_.find(key);
    return found == document_.end() || found->is_null() ? nullptr : &*found;
  }

  // An integer in [least, most].
  [[nodiscard]] int count(const std::string& key, int fallback, int least, int most) const {
    const auto found = document_.find(key);
    if (found == document_.end()) return fallback;
    return integer(key, *found, least, most);
  }

  [[nodiscard]] int integer(const std::string& key, const Json& value, int least, int most) const {
    const bool good = value.is_number_integer() && value >= least && value <= most;
    if (!good) {
      refuse_key(key, text_of(value), "an integer from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return value.get<int>();
  }

  [[nodiscard]] double real(const std::string& key, double fallback, double above, double most) const {
    const auto found = document_.find(key);
    if (found == document_.end()) return fallback;
    const bool good = found->is_number() && found->get<double>() > above && found->get<double>() <= most;
    if (!good) {
      refuse_key(key, text_of(*found), "a number above " + Json(above).dump() + ", at most " + Json(most).dump());
    }
    return found->get<double>();
  }

  [[nodiscard]] bool flag(const std::string& key) const {
    const auto found = document_.find(key);
    if (found == document_.end()) return false;
    if (!found->is_boolean()) refuse_key(key, text_of(*found), "true or false");
    return found->get<bool>();
  }

  void must_be_off(const std::string& key) const {
    if (flag(key)) refuse_key(key, "true", "false: biases are not supported");
  }

  void must_be_absent(const std::string& key, const std::string& why) const {
    if (const Json* value = find(key); value != nullptr) refuse_key(key, text_of(*value), "no such key: " + why);
  }

  [[noreturn]] void refuse_key(const std::string& key, const std::string& found, const std::string& expected) const {
    refuse({"reading " + source_ + ", key " + in_quotes(key), found, expected, ""});
  }

  [[nodiscard]] const std::string& source() const { return source_; }

 private:
  const Json& document_;
  const std::string& source_;
};

std::string architecture(const Keys& keys) {
  std::string found = "neither \"architectures\" nor \"model_type\": \"llama\"";
  if (const Json* names = keys.find("architectures"); names != nullptr) {
    if (!names->is_array() || names->empty() || !names->front().is_string()) {
      keys.refuse_key("architectures", text_of(*names), "a list of one name");
    }
    const auto name = names->front().get<std::string>();
    for (const char* known : kArchitectures) {
      if (name == known) return known;
    }
    found = "the architecture " + in_quotes(name);
  } else if (const Json* type = keys.find("model_type"); type != nullptr) {
    if (*type == "llama") return kArchitectures[0];
    found = "the model type " + text_of(*type);
  }
  const std::vector<std::string> known(kArchitectures.begin(), kArchitectures.end());
  refuse({"reading " + keys.source(), found, "one of: " + joined(known), "choose a model of a supported architecture"});
}

// rope_scaling (before transformers 5) and rope_parameters (since) may only say that nothing is scaled.
void check_rope(const Keys& keys, const std::string& key) {
  const Json* value = keys.find(key);
  if (value == nullptr) return;
  if (!value->is_object()) keys.refuse_key(key, text_of(*value), "an object or null");
  for (const char* type_key : {"rope_type", "type"}) {
    if (const auto type = value->find(type_key); type != value->end() && *type != "default") {
      keys.refuse_key(key, std::string(type_key) + " " + text_of(*type),
                      "\"default\": scaled rotary embeddings are not supported");
    }
  }
  const bool says_default = value->contains("rope_type") || value->contains("type");
  if (key == "rope_scaling" && !says_default) {
    keys.refuse_key(key, text_of(*value), "null: scaled rotary embeddings are not supported");
  }
  if (const auto part = value->find("partial_rotary_factor"); part != value->end() && *part != 1) {
    keys.refuse_key(key, "partial_rotary_factor " + text_of(*part), "1: partial rotation is not supported");
  }
}

double rope_theta(const Keys& keys) {
  if (const Json* parameters = keys.find("rope_parameters");
      parameters != nullptr && parameters->contains("rope_theta")) {
    const std::string source = keys.source() + ", key \"rope_parameters\"";
    return Keys(*parameters, source).real("rope_theta", kDefaultTheta, 0.0, kMaxTheta);
  }
  return keys.real("rope_theta", kDefaultTheta, 0.0, kMaxTheta);
}

DType weights_dtype(const Keys& keys) {
  for (const char* key : {"dtype", "torch_dtype"}) {  // transformers 5 and before
    const Json* value = keys.find(key);
    if (value == nullptr) continue;
    if (*value == "bfloat16") return DType::kBf16;
    if (*value == "float16") return DType::kF16;
    if (*value == "float32") return DType::kF32;
    keys.refuse_key(key, text_of(*value), "bfloat16, float16 or float32");
  }
  return DType::kF32;
}

// One id or a list; null means none.
std::vector<int> token_ids(const Keys& keys, const std::string& key, int fallback, int vocab, bool given) {
  const Json* value = keys.find(key);
  if (value == nullptr) return given ? std::vector<int>{} : std::vector<int>{fallback};
  std::vector<int> ids;
  if (!value->is_array()) return {keys.integer(key, *value, 0, vocab - 1)};
  for (const Json& id : *value) ids.push_back(keys.integer(key, id, 0, vocab - 1));
  return ids;
}

void refuse_what_is_unsupported(const Keys& keys) {
  check_rope(keys, "rope_scaling");
  check_rope(keys, "rope_parameters");
  keys.must_be_off("attention_bias");
  keys.must_be_off("mlp_bias");
  keys.must_be_absent("quantization_config", "quantised checkpoints are not supported");
  if (const Json* part = keys.find("partial_rotary_factor"); part != nullptr && *part != 1) {
    keys.refuse_key("partial_rotary_factor", text_of(*part), "1: partial rotation is not supported");
  }
  if (const Json* act = keys.find("hidden_act"); act != nullptr && *act != "silu") {
    keys.refuse_key("hidden_act", text_of(*act), "\"silu\"");
  }
}

// heads, kv_heads and head_dim, which depend on each other.
void read_heads(const Keys& keys, ModelConfig& config) {
  config.heads = keys.count("num_attention_heads", 32, 1, kMaxHeads);
  const Json* kv_heads = keys.find("num_key_value_heads");
  config.kv_heads = kv_heads == nullptr ? config.heads : keys.integer("num_key_value_heads", *kv_heads, 1, kMaxHeads);
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

// Where configs/ may lie, the first that holds models/ counts.
fs::path synthetic_folder() {
  if (const char* given = std::getenv("VESPER_CONFIGS"); given != nullptr) {
    fs::path folder = fs::path(given) / "models";
    if (fs::is_directory(folder)) return folder;
    refuse({"looking for model shapes", "no folder " + folder.string(), "one, since VESPER_CONFIGS is set",
            "set VESPER_CONFIGS to the configs folder or unset it"});
  }
  std::error_code ignored;
  const fs::path binary = fs::read_symlink("/proc/self/exe", ignored).parent_path();
  const std::array<fs::path, 3> candidates = {binary / "../configs/models", binary / "../../configs/models",
                                              fs::path(VESPER_SOURCE_CONFIGS) / "models"};
  for (const fs::path& candidate : candidates) {
    if (fs::is_directory(candidate, ignored)) return candidate.lexically_normal();
  }
  refuse({"looking for model shapes", "no configs/models beside " + binary.string(),
          "the folder that comes with vesper", "set VESPER_CONFIGS to the configs folder"});
}

}  // namespace

std::int64_t ModelConfig::parameters() const {
  std::int64_t sum = 0;
  for (const ExpectedWeight& weight : expected_weights(*this)) sum += weight.elements();
  return sum;
}

// Defaults: transformers, models/llama/configuration_llama.py.
ModelConfig parse_model_config(const nlohmann::json& document, const std::string& source) {
  const Keys keys(document, source);
  ModelConfig config;
  config.architecture = architecture(keys);
  refuse_what_is_unsupported(keys);
  config.layers = keys.count("num_hidden_layers", 32, 1, kMaxLayers);
  config.hidden = keys.count("hidden_size", 4096, 1, kMaxHidden);
  config.ffn = keys.count("intermediate_size", 11008, 1, kMaxFfn);
  config.vocab = keys.count("vocab_size", 32000, 1, kMaxVocab);
  config.max_positions = keys.count("max_position_embeddings", 2048, 1, kMaxPositions);
  read_heads(keys, config);
  config.rms_eps = static_cast<float>(keys.real("rms_norm_eps", 1e-6, 0.0, 1.0));
  config.rope_theta = rope_theta(keys);
  config.tied_embeddings = keys.flag("tie_word_embeddings");
  config.dtype = weights_dtype(keys);
  const std::vector<int> bos = token_ids(keys, "bos_token_id", 1, config.vocab, document.contains("bos_token_id"));
  config.bos_id = bos.empty() ? -1 : bos.front();
  config.eos_ids = token_ids(keys, "eos_token_id", 2, config.vocab, document.contains("eos_token_id"));
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
  return parse_model_config(read_json_file(path.string()), path.string());
}

ModelConfig synthetic_model_config(const std::string& name) {
  const fs::path folder = synthetic_folder();
  std::vector<std::string> known;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".json") known.push_back(entry.path().stem().string());
  }
  std::sort(known.begin(), known.end());
  if (std::find(known.begin(), known.end(), name) == known.end()) {
    refuse({"looking for the synthetic model " + in_quotes(name), "no such shape in " + folder.string(),
            "one of: " + joined(known), ""});
  }
  const std::string path = (folder / (name + ".json")).string();
  return parse_model_config(read_json_file(path), path);
}

}  // namespace vesper
