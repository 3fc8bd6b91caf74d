#include <array>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/core/error.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/tiktoken_file.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/tokenizer_folder.h"
#include "tokenizer/tokenizer_json.h"
#include "tokenizer/vocab_and_merges.h"

namespace vesper {
namespace {

// The files of one kind of vocabulary; all of them must be there.
struct Source {
  const char* file;
  const char* second;  // null: none
};

// In the order of choice. tokenizer.json comes first because it says all that the others leave to code, and because it
// is what transformers reads.
constexpr std::array<Source, 3> kSources = {
    {{"tokenizer.json", nullptr}, {"tokenizer.model", nullptr}, {"vocab.json", "merges.txt"}}};

std::string in_folder(const std::string& folder, const char* name) {
  return (std::filesystem::path(folder) / name).string();
}

// What cannot be looked at counts as absent.
bool holds(const std::string& folder, const char* name) {
  std::error_code ignored;
  return std::filesystem::exists(in_folder(folder, name), ignored);
}

std::vector<Source> sources_in(const std::string& folder) {
  std::vector<Source> there;
  for (const Source& source : kSources) {
    if (holds(folder, source.file) && (source.second == nullptr || holds(folder, source.second)))
      there.push_back(source);
  }
  return there;
}

}  // namespace

bool has_tokenizer(const std::string& folder) {
  return !sources_in(folder).empty();
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder) {
  const std::vector<Source> there = sources_in(folder);
  if (there.empty()) {
    refuse({"loading the tokenizer of " + folder, "no tokenizer",
            "tokenizer.json, tokenizer.model, or vocab.json with merges.txt",
            "put the model's tokenizer.json or tokenizer.model into the folder"});
  }
  TokenizerFolder settings = read_tokenizer_folder(folder);
  for (std::size_t i = 1; i < there.size(); ++i) {
    settings.unread += std::string(i == 1 ? " (not read: " : ", ") + there[i].file;
  }
  if (there.size() > 1) settings.unread += ")";

  const std::string path = in_folder(folder, there[0].file);
  if (there[0].second != nullptr) return load_vocab_and_merges(path, in_folder(folder, there[0].second), settings);
  if (std::string_view(there[0].file) == "tokenizer.json") return load_tokenizer_json(path, settings);
  return is_tiktoken_text(read_tokenizer_file(path)) ? load_tiktoken(path, settings)
                                                     : load_sentencepiece(path, settings);
}

}  // namespace vesper
