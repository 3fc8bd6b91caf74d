#include "tokenizer/tokenizer_folder.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

bool flag(const Json& object, const char* key, bool otherwise, const std::string& source) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return otherwise;
  if (!found->is_boolean())
    refuse({"reading " + source, in_quotes(found->dump()) + " for " + key, "true or false", ""});
  return found->get<bool>();
}

// "bos_token" and its like: a string, or an object with "content"; a null is as good as none.
std::optional<AddedToken> named_special_token(const Json& value, const std::string& source) {
  if (value.is_null()) return std::nullopt;
  AddedToken token;
  if (value.is_string()) {
    token.content = value.get<std::string>();
    token.special = true;
  } else {
    token = read_added_token(value, source);
    token.special = true;
  }
  return token;
}

void read_named_tokens(const Json& document, const std::string& source, TokenizerFolder& folder) {
  const auto add = [&](const Json& value, std::string* name) {
    std::optional<AddedToken> token = named_special_token(value, source);
    if (!token || token->content.empty()) return;
    if (name != nullptr && name->empty()) *name = token->content;
    folder.added.push_back(std::move(*token));
  };
  for (const char* key : {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}) {
    std::string* name = nullptr;
    if (std::string_view(key) == "bos_token") name = &folder.bos;
    if (std::string_view(key) == "eos_token") name = &folder.eos;
    if (document.contains(key)) add(document[key], name);
  }
  const auto more = document.find("additional_special_tokens");
  if (more == document.end() || !more->is_array()) return;
  for (const Json& value : *more) add(value, nullptr);
}

void read_added_tokens_decoder(const Json& document, const std::string& source, TokenizerFolder& folder) {
  const auto found = document.find("added_tokens_decoder");
  if (found == document.end() || found->is_null()) return;
  if (!found->is_object()) refuse({"reading " + source, "an added_tokens_decoder that is no object", "one", ""});
  for (const auto& [key, entry] : found->items()) {
    AddedToken token = read_added_token(entry, source);
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token.id);
    if (error != std::errc() || end != key.data() + key.size() || token.id < 0 || token.id >= kMaxVocab) {
      refuse({"reading " + source, "the id " + in_quotes(key) + " in added_tokens_decoder",
              "a number from 0 to " + std::to_string(kMaxVocab - 1), ""});
    }
    folder.added.push_back(std::move(token));
  }
  std::sort(folder.added.begin(), folder.added.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
}

Json read_object(const std::string& path) {
  Json document = read_json_file(path, kMaxTokenizerBytes);
  if (!document.is_object()) refuse({"reading " + path, "JSON that is no object", "an object", ""});
  return document;
}

}  // namespace

AddedToken read_added_token(const Json& entry, const std::string& source) {
  const auto content = entry.is_object() ? entry.find("content") : entry.end();
  if (!entry.is_object() || content == entry.end() || !content->is_string()) {
    refuse({"reading " + source, "the added token " + in_quotes(entry.dump()), R"(an object with "content")", ""});
  }
  AddedToken token;
  token.content = content->get<std::string>();
  if (token.content.empty() || token.content.size() > kMaxPieceBytes) {
    refuse({"reading " + source, "an added token of " + std::to_string(token.content.size()) + " bytes",
            "1 to " + std::to_string(kMaxPieceBytes), ""});
  }
  token.special = flag(entry, "special", false, source);
  token.normalized = flag(entry, "normalized", !token.special, source);
  token.lstrip = flag(entry, "lstrip", false, source);
  token.rstrip = flag(entry, "rstrip", false, source);
  if (flag(entry, "single_word", false, source)) {
    refuse({"reading " + source, "the flag single_word of the added token " + in_quotes(token.content),
            "tokens that are found anywhere", "this tokenizer is not supported"});
  }
  return token;
}

TokenizerFolder read_tokenizer_folder(const std::string& path) {
  TokenizerFolder folder;
  const auto config = std::filesystem::path(path) / "tokenizer_config.json";
  folder.settings = config.string();
  std::error_code ignored;
  if (std::filesystem::exists(config, ignored)) {
    const std::string source = config.string();
    const Json document = read_object(source);
    if (const auto found = document.find("tokenizer_class"); found != document.end() && found->is_string()) {
      folder.tokenizer_class = found->get<std::string>();
    }
    const bool adds_eos = flag(document, "add_eos_token", false, source);
    if (adds_eos) {
      refuse({"reading " + source, "add_eos_token true", "false: an end-of-sequence token behind each prompt ends it",
              "set it to false"});
    }
    if (document.contains("add_bos_token")) folder.adds_bos = flag(document, "add_bos_token", false, source);
    folder.legacy = flag(document, "legacy", true, source);
    read_added_tokens_decoder(document, source, folder);
    read_named_tokens(document, source, folder);
  }
  const auto map = std::filesystem::path(path) / "special_tokens_map.json";
  if (std::filesystem::exists(map, ignored)) read_named_tokens(read_object(map.string()), map.string(), folder);
  return folder;
}

std::vector<AddedToken> place_added_tokens(std::vector<AddedToken> own, const Vocabulary& vocabulary,
                                           const TokenizerFolder& folder, const std::string& source) {
  std::vector<AddedToken> tokens = std::move(own);
  const auto find = [&](const std::string& content) {
    return std::find_if(tokens.begin(), tokens.end(), [&](const auto& token) { return token.content == content; });
  };
  for (AddedToken token : folder.added) {
    const bool has_id = token.id >= 0;
    const auto known = find(token.content);
    if (!has_id) {
      token.id = vocabulary.find(token.content);
      if (known != tokens.end() || token.id < 0) continue;  // known with its flags, or without a part in the vocabulary
      tokens.push_back(std::move(token));
    } else if (known == tokens.end()) {
      tokens.push_back(std::move(token));
    } else if (known->id == token.id) {
      *known = std::move(token);
    } else {
      refuse({"reading " + folder.settings,
              "the id " + std::to_string(token.id) + " for the added token " + in_quotes(token.content),
              std::to_string(known->id) + ", as in the vocabulary's file", "copy or download both files again"});
    }
  }
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  int next = vocabulary.size();
  for (const AddedToken& token : tokens) {
    const bool is_piece = token.id >= 0 && token.id < vocabulary.size() && vocabulary.piece(token.id) == token.content;
    const bool is_new = token.id == next && vocabulary.find(token.content) < 0;
    if (!is_piece && !is_new) {
      refuse({"reading " + source + " and its settings",
              "the id " + std::to_string(token.id) + " for the added token " + in_quotes(token.content),
              vocabulary.find(token.content) >= 0
                  ? std::to_string(vocabulary.find(token.content)) + ", as in the vocabulary"
                  : "the next free id, " + std::to_string(next),
              "copy or download the folder again"});
    }
    next += is_new ? 1 : 0;
  }
  return tokens;
}

int named_token(const std::string& name, const char* setting, const Vocabulary& vocabulary,
                const std::vector<AddedToken>& added, const TokenizerFolder& folder) {
  if (name.empty()) return -1;
  for (const AddedToken& token : added) {
    if (token.content == name) return token.id;
  }
  if (const int id = vocabulary.find(name); id >= 0) return id;
  refuse({"reading " + folder.settings, std::string("the ") + setting + " " + in_quotes(name) + ", which is no token",
          "one of the vocabulary", "copy or download the folder again"});
}

}  // namespace vesper
