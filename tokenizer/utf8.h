// One step through UTF-8 that may be broken or cut short, and what a character is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace vesper {

enum class Utf8Kind : std::uint8_t {
  kCharacter,   // a whole character
  kInvalid,     // bytes that no further byte can turn into a character: one "maximal subpart", one U+FFFD
  kUnfinished,  // the text ends inside what may become a character
};

struct Utf8Step {
  Utf8Kind kind;
  std::size_t bytes;
};

// What starts at `text[at]`, for at < text.size(). RFC 3629: shortest form, no surrogates, at most U+10FFFF.
Utf8Step utf8_step(std::string_view text, std::size_t at);

// The code point of one whole character.
std::uint32_t utf8_code(std::string_view character);

// Whether the character is Unicode White_Space (PropList.txt; closed since Unicode 6.3).
bool is_white_space(std::uint32_t code);

}  // namespace vesper
