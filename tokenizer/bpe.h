// Byte pair encoding of one word: symbols that stand side by side are merged, the pair of the lowest rank first, the
// leftmost of equal rank first (Sennrich et al. 2016, arXiv 1508.07909; ties and fallbacks as in Hugging Face's
// `tokenizers`, models/bpe). A heap of candidates over a linked list of symbols: O(n log n) for a word of n symbols.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "tokenizer/vocabulary.h"

namespace vesper {

// `left` beside `right` may become `result`; all three are ids.
struct Merge {
  int left;
  int right;
  int result;
  std::uint32_t rank;
};

struct BpeOptions {
  bool bytes = false;          // words begin as bytes, not as characters
  bool ignore_merges = false;  // a word that is a piece is that piece, whatever the merges say
  bool byte_fallback = false;  // a character without a piece becomes the pieces <0xNN> of its bytes
  bool fuse_unk = false;       // neighbours without a piece become one unknown token together
  int unk_id = -1;             // what else becomes of characters without a piece; -1: a text with one is refused
};

class Bpe {
 public:
  // Ids of `merges` lie in the vocabulary; where a pair occurs twice, the last one counts.
  Bpe(Vocabulary vocabulary, const std::vector<Merge>& merges, const BpeOptions& options);

  // Appends the ids of `word`, valid UTF-8 of less than 2^31 bytes (any bytes where words begin as bytes). Throws an
  // input error for a character without a piece where nothing else may become of it.
  void encode(std::string_view word, std::vector<std::int32_t>& ids) const;
  [[nodiscard]] const Vocabulary& vocabulary() const { return vocabulary_; }
  [[nodiscard]] const BpeOptions& options() const { return options_; }

 private:
  // A flat table by the ids of the two, as Vocabulary's: 300 thousand rules are made for each run.
  struct MergeRule {
    int left = -1;  // -1: an empty slot
    int right = -1;
    int result = -1;
    std::uint32_t rank = 0;
  };
  [[nodiscard]] std::size_t slot_of(int left, int right) const;
  [[nodiscard]] const MergeRule* find_rule(int left, int right) const;
  [[nodiscard]] std::vector<std::int32_t> initial_symbols(std::string_view word) const;
  void merge_all(std::vector<std::int32_t>& symbols) const;

  Vocabulary vocabulary_;
  std::vector<MergeRule> rules_;
  std::vector<int> byte_ids_;  // of single bytes, or of <0xNN>; -1: none
  BpeOptions options_;
};

// The merges that tiktoken's rule comes to, for a vocabulary in the order of its ranks: any two pieces that stand side
// by side may become the piece that they spell, the lowest id first (tiktoken 0.7, byte_pair_merge).
std::vector<Merge> merges_of_ranks(const Vocabulary& vocabulary);

}  // namespace vesper
