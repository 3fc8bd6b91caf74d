// Texts that no tokenizer was made for.
#pragma once

#include <cstdint>
#include <random>
#include <string>

namespace vesper {

// A text of `characters` random characters; U+2581 left out, which stands for a space.
inline std::string random_text(std::mt19937& random, int characters) {
  const auto draw = [&](std::uint32_t low, std::uint32_t high) {
    return std::uniform_int_distribution<std::uint32_t>(low, high)(random);
  };
  std::string text;
  for (int i = 0; i < characters; ++i) {
    std::uint32_t code = 0;
    switch (draw(0, 7)) {
      case 0:
        code = draw(0, 0x7F);
        break;
      case 1:
        code = draw(0x80, 0x7FF);
        break;
      case 2:
        code = draw(0x800, 0xD7FF);
        break;
      case 3:
        code = draw(0x10000, 0x10FFFF);
        break;
      case 4:
        code = ' ';
        break;
      default:
        code = draw('a', 'z');
    }
    if (code == 0x2581) continue;
    if (code < 0x80) {
      text += static_cast<char>(code);
      continue;
    }
    if (code < 0x800) {
      text += static_cast<char>(0xC0U | code >> 6U);
    } else if (code < 0x10000) {
      text += static_cast<char>(0xE0U | code >> 12U);
    } else {
      text += static_cast<char>(0xF0U | code >> 18U);
      text += static_cast<char>(0x80U | (code >> 12U & 0x3FU));
    }
    if (code >= 0x800) text += static_cast<char>(0x80U | (code >> 6U & 0x3FU));
    text += static_cast<char>(0x80U | (code & 0x3FU));
  }
  return text;
}

}  // namespace vesper
