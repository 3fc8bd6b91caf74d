// tokenizer.model of Llama 3's own release: the text format of OpenAI's tiktoken. A line is a piece in base64 (RFC
// 4648), a space and its rank, which is its id (tiktoken, load.py). The split pattern and the special tokens are not in
// the file; they are those of meta-llama/llama3, llama/tokenizer.py.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "tokenizer/tokenizer.h"
#include "tokenizer/tokenizer_folder.h"

namespace vesper {

// Whether a file looks like this format: base64, a space and a digit on its first line. SentencePiece's begins with a
// protobuf tag, which no base64 does.
bool is_tiktoken_text(std::string_view bytes);

// Pieces in the order of their ranks, as bytes. Throws an input error that names `source`.
Vocabulary read_tiktoken_ranks(std::string_view text, const std::string& source);

// Special tokens are those of the folder's tokenizer_config.json where it lists some, else Llama 3's. Throws an input
// error where the file is broken or is not Llama 3's, whose vocabulary has 128000 pieces.
std::unique_ptr<Tokenizer> load_tiktoken(const std::string& path, const TokenizerFolder& folder);

}  // namespace vesper
