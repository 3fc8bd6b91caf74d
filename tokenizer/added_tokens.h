// Tokens that are found in a text before anything else happens to it: those that a folder adds to its vocabulary, and
// the special ones among them. Rules as in Hugging Face's `tokenizers`, tokenizer/added_vocabulary.rs.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace vesper {

struct AddedToken {
  int id = -1;
  std::string content;
  bool special = false;     // stands for nothing when decoded; found in a text only where the caller asks for it
  bool normalized = false;  // sought in the normalised text, itself normalised
  bool lstrip = false;      // takes the white space before it
  bool rstrip = false;      // takes the white space behind it
};

// A part of a text: a token that was found, or (id -1) what lies between two of them.
struct Section {
  int id;
  std::size_t begin;
  std::size_t end;
};

// Finds tokens in texts: the leftmost first, of those that begin alike the longest.
class AddedTokenFinder {
 public:
  AddedTokenFinder() = default;
  // `tokens[i].content` is what is sought; empty, as a normaliser may leave it, it is never found.
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);

  // `text` in sections. A special token that touches a range of `plain` (ascending, apart) is text.
  [[nodiscard]] std::vector<Section> split(std::string_view text, std::span<const TextRange> plain) const;

 private:
  [[nodiscard]] const AddedToken* longest_at(std::string_view text) const;  // that `text` begins with; null: none

  std::vector<AddedToken> tokens_;  // by content
  std::array<bool, 256> begins_{};  // whether one begins with the byte
};

}  // namespace vesper
