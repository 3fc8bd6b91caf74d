// tokenizer.json of Hugging Face's `tokenizers`: byte pair encoding, byte-level (Llama 3, Qwen2, GPT-2) or in the
// manner of SentencePiece (Llama 2, Mistral). The format is that of the library's serialisation; taken are the parts
// below, any other model, normaliser, pre-tokeniser, post-processor or decoder is refused by its name.
//
//   normalizer      NFC, Prepend, Replace (of a string), Sequence
//   pre_tokenizer   Split (Isolated, not inverted), ByteLevel (without add_prefix_space), Metaspace, Sequence
//   model           BPE without dropout, prefix and suffix; byte_fallback, fuse_unk, ignore_merges
//   post_processor  TemplateProcessing that puts one token, BOS, before the text; ByteLevel; Sequence
//   decoder         ByteLevel, Replace, ByteFallback, Fuse, Strip (one space at the start), Metaspace, Sequence
#pragma once

#include <memory>
#include <string>

#include "tokenizer/tokenizer.h"
#include "tokenizer/tokenizer_folder.h"

namespace vesper {

// Throws an input error that names `path` where it is broken or wants what is not supported.
std::unique_ptr<Tokenizer> load_tokenizer_json(const std::string& path, const TokenizerFolder& folder);

// The same of a document's text.
std::unique_ptr<Tokenizer> parse_tokenizer_json(std::string_view text, const std::string& path,
                                                const TokenizerFolder& folder);

}  // namespace vesper
