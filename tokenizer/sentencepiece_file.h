// The check that a SentencePiece model file passes before libsentencepiece sees it.
#pragma once

#include <string>
#include <string_view>

namespace vesper {

// libsentencepiece 0.1.97 trusts parts of its model: a broken normalisation trie makes it read outside its memory, a
// file cut between two fields loads with defaults. `bytes` is the whole file. Throws an input error that names `path`
// on a broken field, a missing part, a piece that is empty, overlong or no text, or a trie that leads outside itself.
void check_sentencepiece_file(std::string_view bytes, const std::string& path);

}  // namespace vesper
