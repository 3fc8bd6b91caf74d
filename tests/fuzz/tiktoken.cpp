// tokenizer.model in tiktoken's text. load_tiktoken takes Llama 3's 128000 pieces only, which no fuzzer changes in
// useful time: here any number of them becomes a tokenizer by the same steps.
#include "tokenizer/tiktoken_file.h"

#include "tests/fuzz/fuzz.h"
#include "tokenizer/bpe_tokenizer.h"

namespace vesper {

void fuzz(std::string_view input) {
  if (!is_tiktoken_text(input)) return;
  Vocabulary vocabulary = read_tiktoken_ranks(input, "tokenizer.model");
  const std::vector<Merge> merges = merges_of_ranks(vocabulary);
  BpeTokenizerParts parts;
  parts.splits.emplace_back(kLlama3Pattern, "tokenizer.model");
  BpeOptions options;
  options.bytes = true;
  options.ignore_merges = true;
  use_tokenizer(*make_bpe_tokenizer(Bpe(std::move(vocabulary), merges, options), std::move(parts)));
}

}  // namespace vesper
