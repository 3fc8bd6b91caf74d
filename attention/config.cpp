#include "attention/config.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <string_view>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

constexpr std::array<std::string_view, 1> kBackends = {"dense"};
constexpr std::array<std::string_view, 2> kRuleKeys = {"layers", "backend"};

template <typename Names>
std::string list(const Names& names) {
  std::string text;
  for (const std::string_view name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

bool is_backend(const std::string& name) {
  return std::find(kBackends.begin(), kBackends.end(), name) != kBackends.end();
}

std::optional<int> parse_number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

// Marks the layers that "3", "3-5" or "2-" names. False where the text is none of these or leaves the model.
bool mark_range(std::string_view text, std::vector<bool>& marked) {
  const int layers = static_cast<int>(marked.size());
  const std::size_t dash = text.find('-');
  const std::optional<int> first = parse_number(text.substr(0, dash));
  std::optional<int> last = first;
  if (dash != std::string_view::npos) {
    last = dash + 1 == text.size() ? std::optional<int>(layers - 1) : parse_number(text.substr(dash + 1));
  }
  if (!first || !last || *first > *last || *last >= layers) return false;
  for (int l = *first; l <= *last; ++l) marked[static_cast<std::size_t>(l)] = true;
  return true;
}

std::vector<bool> parse_layers(std::string_view text, int layers, const std::string& where) {
  std::vector<bool> marked(static_cast<std::size_t>(layers), text == "all");
  if (text == "all") return marked;
  for (std::string_view rest = text;;) {
    const std::size_t comma = rest.find(',');
    if (!mark_range(rest.substr(0, comma), marked)) {
      refuse({where, "\"layers\": \"" + std::string(text) + "\"",
              "\"all\" or numbers and ranges such as \"0\", \"3-5\", \"2-\" within 0-" + std::to_string(layers - 1),
              ""});
    }
    if (comma == std::string_view::npos) return marked;
    rest.remove_prefix(comma + 1);
  }
}

std::string string_value(const nlohmann::json& rule, const char* key, const std::string& where) {
  if (!rule.contains(key)) refuse({where, "no \"" + std::string(key) + "\"", "the keys: " + list(kRuleKeys), ""});
  if (!rule[key].is_string()) refuse({where, "\"" + std::string(key) + "\": " + rule[key].dump(), "a string", ""});
  return rule[key].get<std::string>();
}

AttentionConfig parse_file(const std::string& path, int layers) {
  const nlohmann::json document = read_json_file(path);
  const std::string file = "reading the attention file " + path;
  if (document.is_object()) {
    for (const auto& [key, value] : document.items()) {
      if (key != "attention") refuse({file, "the key " + in_quotes(key), "one of: attention", ""});
    }
  }
  if (!document.is_object() || !document.contains("attention") || !document["attention"].is_array()) {
    refuse({file, "another shape", "an object whose one key \"attention\" holds a list of rules", ""});
  }
  std::vector<std::optional<BackendConfig>> chosen(static_cast<std::size_t>(layers));
  int number = 0;
  for (const nlohmann::json& rule : document["attention"]) {
    const std::string where = file + ", rule " + std::to_string(++number);
    if (!rule.is_object()) refuse({where, rule.dump(), "an object", ""});
    for (const auto& [key, value] : rule.items()) {
      if (std::find(kRuleKeys.begin(), kRuleKeys.end(), key) == kRuleKeys.end()) {
        refuse({where, "the key " + in_quotes(key), "one of: " + list(kRuleKeys), ""});
      }
    }
    const BackendConfig config{.backend = string_value(rule, "backend", where)};
    if (!is_backend(config.backend)) {
      refuse({where, "the backend " + in_quotes(config.backend), "one of: " + list(kBackends), ""});
    }
    const std::vector<bool> marked = parse_layers(string_value(rule, "layers", where), layers, where);
    for (std::size_t l = 0; l < chosen.size(); ++l) {
      if (marked[l]) chosen[l] = config;
    }
  }
  AttentionConfig config;
  for (std::size_t l = 0; l < chosen.size(); ++l) {
    if (!chosen[l]) {
      refuse({file, "no rule for layer " + std::to_string(l), "every layer covered",
              R"(begin with { "layers": "all", "backend": "dense" })"});
    }
    config.layers.push_back(*chosen[l]);
  }
  return config;
}

}  // namespace

AttentionConfig parse_attention(const std::string& file_or_shorthand, int layers) {
  if (file_or_shorthand.ends_with(".json") || file_or_shorthand.find('/') != std::string::npos) {
    return parse_file(file_or_shorthand, layers);
  }
  if (!is_backend(file_or_shorthand)) {
    refuse({"reading --attention", "\"" + file_or_shorthand + "\"",
            "a backend (" + list(kBackends) + ") or a file whose name ends in .json", ""});
  }
  return AttentionConfig{
      .layers = std::vector<BackendConfig>(static_cast<std::size_t>(layers), BackendConfig{file_or_shorthand})};
}

}  // namespace vesper
