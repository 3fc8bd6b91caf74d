#include "tokenizer/byte_level.h"

#include <array>
#include <cstdint>

#include "tokenizer/utf8.h"

namespace vesper {
namespace {

constexpr std::uint32_t kAlphabetEnd = 0x100 + 68;  // 68 bytes are not printable Latin-1

bool is_printable(std::uint32_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

// The byte of each code point below kAlphabetEnd, -1: none.
std::array<int, kAlphabetEnd> make_alphabet() {
  std::array<int, kAlphabetEnd> bytes;
  bytes.fill(-1);
  std::uint32_t next = 0x100;
  for (std::uint32_t byte = 0; byte < 0x100; ++byte) {
    bytes[is_printable(byte) ? byte : next++] = static_cast<int>(byte);
  }
  return bytes;
}

}  // namespace

std::optional<std::string> bytes_of_piece(std::string_view piece) {
  static const std::array<int, kAlphabetEnd> alphabet = make_alphabet();
  std::string bytes;
  for (std::size_t at = 0; at < piece.size();) {
    const Utf8Step step = utf8_step(piece, at);
    if (step.kind != Utf8Kind::kCharacter) return std::nullopt;
    const std::uint32_t code = utf8_code(piece.substr(at, step.bytes));
    if (code >= kAlphabetEnd || alphabet[code] < 0) return std::nullopt;
    bytes += static_cast<char>(alphabet[code]);
    at += step.bytes;
  }
  return bytes;
}

}  // namespace vesper
