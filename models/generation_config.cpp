// Keys and defaults: transformers, generation/configuration_utils.py.
#include "models/generation_config.h"

#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/core/json.h"
#include "models/config_keys.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kMaxBytes = 1 << 20;
constexpr std::size_t kMaxEosIds = 1024;  // real lists have three

// A key that is not supported, and the value that changes nothing.
struct Unsupported {
  const char* key;
  double neutral;
};
constexpr std::array<Unsupported, 6> kUnsupported = {{{"repetition_penalty", 1.0},
                                                      {"typical_p", 1.0},
                                                      {"min_p", 0.0},
                                                      {"no_repeat_ngram_size", 0.0},
                                                      {"num_beams", 1.0},
                                                      {"guidance_scale", 1.0}}};

std::vector<int> eos_ids(const ConfigKeys& keys, int vocab) {
  const Json* value = keys.find("eos_token_id");
  if (value == nullptr) return {};
  if (!value->is_array()) return {keys.integer("eos_token_id", *value, 0, vocab - 1)};
  if (value->size() > kMaxEosIds) {
    keys.refuse_key("eos_token_id", std::to_string(value->size()) + " ids", "at most " + std::to_string(kMaxEosIds));
  }
  std::vector<int> ids;
  for (const Json& id : *value) ids.push_back(keys.integer("eos_token_id", id, 0, vocab - 1));
  return ids;
}

}  // namespace

GenerationConfig parse_generation_config(const nlohmann::json& document, int vocab, const std::string& source) {
  const ConfigKeys keys(document, source);
  GenerationConfig config;
  config.eos_ids = eos_ids(keys, vocab);
  config.do_sample = keys.find("do_sample") != nullptr && keys.flag("do_sample");
  if (config.do_sample) {  // else they say nothing, and some files hold what no draw could use
    config.temperature = static_cast<float>(keys.real_or_null("temperature", config.temperature, 0.0, 100.0));
    config.top_p = static_cast<float>(keys.real_or_null("top_p", config.top_p, 0.0, 1.0));
    if (const Json* top_k = keys.find("top_k"); top_k != nullptr) {
      config.top_k = keys.integer("top_k", *top_k, 0, INT32_MAX);
    }
  }
  for (const auto& [key, neutral] : kUnsupported) {
    const Json* value = keys.find(key);
    if (value != nullptr && *value != neutral)
      config.ignored.push_back(std::string(key) + " " + config_value_text(*value));
  }
  return config;
}

GenerationConfig load_generation_config(const std::string& folder, int vocab) {
  const std::string path = (std::filesystem::path(folder) / "generation_config.json").string();
  std::error_code ignored;  // what cannot be looked at counts as absent
  if (!std::filesystem::exists(path, ignored)) return {};
  return parse_generation_config(read_json_file(path, kMaxBytes), vocab, path);
}

}  // namespace vesper
