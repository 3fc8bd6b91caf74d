// vocab.json with merges.txt, as GPT-2 and Qwen2 publish them; and their two contents, which tokenizer.json holds too.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/bpe.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/tokenizer_folder.h"

namespace vesper {

// Of an object that gives each piece its id. Throws an input error that names `source`.
Vocabulary vocabulary_of_json(const nlohmann::json& pieces, const std::string& source);

// Merges in the order in which they are added: the first has the lowest rank.
class MergeList {
 public:
  // Both must outlive this.
  MergeList(const Vocabulary& vocabulary, const std::string& source) : vocabulary_(vocabulary), source_(source) {}
  // Throws an input error where the two or what they become is no piece.
  void add(std::string_view left, std::string_view right);
  // The same for "left right", with one space.
  void add_line(std::string_view line);
  std::vector<Merge> take() && { return std::move(merges_); }

 private:
  const Vocabulary& vocabulary_;
  const std::string& source_;
  std::vector<Merge> merges_;
};

// A whole file of at most kMaxTokenizerBytes. Throws an input error where it cannot be read.
std::string read_tokenizer_file(const std::string& path);

// How texts are split is in neither file: it follows from tokenizer_class, which must be GPT2Tokenizer or
// Qwen2Tokenizer
// ("Fast" behind it or not). Throws an input error for others, and where a file is broken.
std::unique_ptr<Tokenizer> load_vocab_and_merges(const std::string& vocab_path, const std::string& merges_path,
                                                 const TokenizerFolder& folder);

}  // namespace vesper
