#include "tokenizer/chat_template.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "tokenizer/jinja_eval.h"
#include "tokenizer/jinja_parser.h"

namespace vesper {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// The longest template known to us has some 25 KB.
constexpr std::int64_t kMaxTemplateBytes = 1 << 20;
constexpr std::int64_t kMaxConfigBytes = 64LL << 20;

constexpr const char* kJinjaFile = "chat_template.jinja";
constexpr const char* kJsonFile = "chat_template.json";
constexpr const char* kConfigFile = "tokenizer_config.json";
constexpr const char* kTokensFile = "special_tokens_map.json";
constexpr const char* kKey = "chat_template";

constexpr std::array<const char*, 7> kTokenNames = {"bos_token", "eos_token", "unk_token", "sep_token",
                                                    "pad_token", "cls_token", "mask_token"};

bool holds(const std::string& folder, const char* name) {
  std::error_code ignored;  // what cannot be looked at counts as absent
  return fs::exists(fs::path(folder) / name, ignored);
}

std::string path_of(const std::string& folder, const char* name) {
  return (fs::path(folder) / name).string();
}

// An object; empty where the file is absent.
Json read_object(const std::string& folder, const char* name) {
  if (!holds(folder, name)) return Json::object();
  const std::string path = path_of(folder, name);
  Json document = read_json_file(path, kMaxConfigBytes);
  if (!document.is_object()) {
    refuse({"reading " + path, std::string("JSON of type ") + document.type_name(), "an object",
            "copy or download the file again"});
  }
  return document;
}

std::string read_template_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::int64_t bytes = file ? static_cast<std::int64_t>(file.tellg()) : -1;
  if (bytes > kMaxTemplateBytes) {
    refuse({"reading " + path, std::to_string(bytes) + " bytes", "at most " + std::to_string(kMaxTemplateBytes), ""});
  }
  std::string text(static_cast<std::size_t>(std::max<std::int64_t>(bytes, 0)), '\0');
  file.seekg(0);
  if (bytes < 0 || !file.read(text.data(), bytes)) {
    refuse({"reading " + path, "a file that cannot be read", "a chat template", "check the path"});
  }
  return text;
}

// The text behind "chat_template": a string, or the one named "default" of a list. Nothing where there is none.
std::optional<std::string> template_text(const Json& document, const std::string& path) {
  const auto found = document.find(kKey);
  if (found == document.end() || found->is_null()) return std::nullopt;
  if (found->is_string()) return found->get<std::string>();
  std::string names;
  for (const Json& entry : found->is_array() ? *found : Json::array()) {
    const bool sound = entry.is_object() && entry.contains("name") && entry["name"].is_string() &&
                       entry.contains("template") && entry["template"].is_string();
    if (!sound) {
      names.clear();
      break;
    }
    if (entry["name"] == "default") return entry["template"].get<std::string>();
    names += (names.empty() ? "" : ", ") + in_quotes(entry["name"].get<std::string>());
  }
  refuse({"reading " + path + ", key \"chat_template\"",
          names.empty() ? std::string("JSON of type ") + found->type_name() : "templates named " + names,
          R"(a string, or a list of {"name", "template"} with one named "default")", ""});
}

// The token names that a document gives: strings, or objects with "content".
void add_tokens(ChatTemplate::TokenNames& tokens, const Json& document, const std::string& path) {
  for (const char* name : kTokenNames) {
    const auto found = document.find(name);
    if (found == document.end() || found->is_null()) continue;
    const Json& text = found->is_object() ? found->value("content", Json()) : *found;
    if (!text.is_string()) {
      refuse({"reading " + path + ", key " + in_quotes(name), std::string("JSON of type ") + text.type_name(),
              R"(a token, or an object with it as "content")", ""});
    }
    const bool known =
        std::any_of(tokens.begin(), tokens.end(), [&](const auto& token) { return token.first == name; });
    if (!known) tokens.emplace_back(name, text.get<std::string>());
  }
}

jinja::Value message_value(jinja::Rendering& rendering, const ChatMessage& message) {
  rendering.take(message.content.size());
  jinja::Dict fields;
  fields.set(ChatText::of_template("role"), rendering.text(message.role));
  fields.set(ChatText::of_template("content"), rendering.keep(ChatText::of_message(message.content)));
  return rendering.dict(std::move(fields));
}

}  // namespace

ChatTemplate::ChatTemplate(std::string_view text, std::string source, TokenNames tokens)
    : source_(std::move(source)), tokens_(std::move(tokens)) {
  if (const std::int64_t at = find_invalid_utf8(text); at >= 0) {
    refuse({"reading " + source_, "a byte that is no UTF-8 at byte offset " + std::to_string(at), "valid UTF-8",
            "copy or download the file again"});
  }
  if (text.size() > static_cast<std::size_t>(kMaxTemplateBytes)) {
    refuse({"reading " + source_, "a template of " + std::to_string(text.size()) + " bytes",
            "at most " + std::to_string(kMaxTemplateBytes), ""});
  }
  program_ = jinja::parse(text, source_);
}

ChatText ChatTemplate::render(std::span<const ChatMessage> messages, bool add_generation_prompt,
                              const std::tm& now) const {
  jinja::Rendering rendering(source_, now);
  jinja::List turns;
  for (const ChatMessage& message : messages) turns.items.push_back(message_value(rendering, message));
  jinja::Variables variables = {{"messages", rendering.list(std::move(turns))},
                                {"tools", jinja::None{}},
                                {"documents", jinja::None{}},
                                {"add_generation_prompt", add_generation_prompt}};
  for (const auto& [name, token] : tokens_) variables.emplace_back(name, rendering.text(token));
  return jinja::run(program_, rendering, variables);
}

std::tm today() {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  return local;
}

bool has_chat_template(const std::string& folder) {
  if (holds(folder, kJinjaFile) || holds(folder, kJsonFile)) return true;
  const Json config = read_object(folder, kConfigFile);
  const auto found = config.find(kKey);
  return found != config.end() && !found->is_null();
}

ChatTemplate load_chat_template(const std::string& folder) {
  const Json config = read_object(folder, kConfigFile);
  ChatTemplate::TokenNames tokens;
  add_tokens(tokens, config, path_of(folder, kConfigFile));
  add_tokens(tokens, read_object(folder, kTokensFile), path_of(folder, kTokensFile));
  if (holds(folder, kJinjaFile)) {
    const std::string path = path_of(folder, kJinjaFile);
    return {read_template_file(path), path, std::move(tokens)};
  }
  for (const char* name : {kJsonFile, kConfigFile}) {
    const std::string path = path_of(folder, name);
    const std::optional<std::string> text = template_text(read_object(folder, name), path);
    if (text) return {*text, path + "'s chat_template", std::move(tokens)};
  }
  refuse({"looking for the chat template of " + folder, "none",
          "chat_template.jinja, chat_template.json, or \"chat_template\" in tokenizer_config.json",
          "choose an instruct model, or use generate without --chat"});
}

}  // namespace vesper
