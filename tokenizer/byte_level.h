// The alphabet in which byte-level vocabularies are written (GPT-2's encoder.py, bytes_to_unicode): a printable
// character for each byte. Printable Latin-1 stands for itself; the other bytes, in order, are U+0100 and up.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace vesper {

// The bytes that `piece` spells; nothing where one of its characters is not of the alphabet, as in names of tokens.
std::optional<std::string> bytes_of_piece(std::string_view piece);

}  // namespace vesper
