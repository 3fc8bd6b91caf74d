// SentencePiece models (Llama 2, Mistral, TinyLlama, the demo model) through libsentencepiece.
#pragma once

#include <memory>
#include <string>

#include "tokenizer/tokenizer.h"
#include "tokenizer/tokenizer_folder.h"

namespace vesper {

// Throws an input error that names `path` where it is no sound SentencePiece model.
std::unique_ptr<Tokenizer> load_sentencepiece(const std::string& path, const TokenizerFolder& folder);

}  // namespace vesper
