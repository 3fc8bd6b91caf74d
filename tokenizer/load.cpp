#include <filesystem>

#include "engine/core/error.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

constexpr const char* kSentencePieceFile = "tokenizer.model";

// What cannot be looked at counts as absent.
bool holds(const std::string& folder, const char* name) {
  std::error_code ignored;
  return std::filesystem::exists(std::filesystem::path(folder) / name, ignored);
}

}  // namespace

bool has_tokenizer(const std::string& folder) {
  return holds(folder, kSentencePieceFile);
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder) {
  if (has_tokenizer(folder)) return load_sentencepiece((std::filesystem::path(folder) / kSentencePieceFile).string());
  const bool has_json = holds(folder, "tokenizer.json");
  refuse(
      {"loading the tokenizer of " + folder,
       has_json ? "tokenizer.json, a format that is not supported yet, and no tokenizer.model" : "no tokenizer.model",
       "tokenizer.model (SentencePiece)", "put the model's tokenizer.model into the folder"});
}

}  // namespace vesper
