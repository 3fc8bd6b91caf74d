#include <filesystem>

#include "engine/core/error.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/tokenizer.h"

namespace vesper {

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder) {
  namespace fs = std::filesystem;
  const std::string path = (fs::path(folder) / "tokenizer.model").string();
  std::error_code ignored;  // what cannot be looked at counts as absent
  if (fs::exists(path, ignored)) return load_sentencepiece(path);
  const bool has_json = fs::exists(fs::path(folder) / "tokenizer.json", ignored);
  refuse(
      {"loading the tokenizer of " + folder,
       has_json ? "tokenizer.json, a format that is not supported yet, and no tokenizer.model" : "no tokenizer.model",
       "tokenizer.model (SentencePiece)", "put the model's tokenizer.model into the folder"});
}

}  // namespace vesper
