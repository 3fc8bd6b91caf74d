// What happens to a text before it is cut into words.
#pragma once

#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace vesper {

struct NormalizerStep {
  enum class Kind { kNfc, kPrepend, kReplace };
  Kind kind = Kind::kNfc;
  std::string from;  // of kReplace; not empty
  std::string to;    // of kReplace, or what is prepended to a text that is not empty
};

// A text, and the ranges of it in which special tokens are text; ascending, apart from each other.
struct MarkedText {
  std::string text;
  std::vector<TextRange> plain;
};

// The steps in their order. What lies inside and what lies outside of ranges is normalised apart, so that ranges keep
// their ends: only characters that would compose across such an end come out otherwise than without ranges. Throws an
// input error where the text would become several times as long.
MarkedText normalize(const std::vector<NormalizerStep>& steps, MarkedText text);

// Unicode normalisation form C (UAX #15) of valid UTF-8, in O(n log n) whatever the text, by the tables of Unicode 9.0:
// the reference, Hugging Face's `tokenizers`, has these (crate unicode-normalization-alignments, measured with 0.23.3),
// so what later versions say of the order of their new marks must not count here either.
std::string to_nfc(const std::string& text);

}  // namespace vesper
