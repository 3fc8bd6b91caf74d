// The tokenizer that tokenizer.json, vocab.json with merges.txt, and tiktoken's text all describe: find added tokens,
// normalise, cut into words, encode each word by byte pairs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/split_pattern.h"
#include "tokenizer/tokenizer.h"

namespace vesper {

// How SentencePiece's marks for spaces come into a text that has no byte-level alphabet (`pre_tokenizers/metaspace.rs`
// of Hugging Face's `tokenizers`; "mark" is its "replacement").
struct Metaspace {
  enum class Prepend { kAlways, kFirst, kNever };
  std::string mark;   // instead of each space; empty: spaces stay
  Prepend prepend{};  // where a mark is put before a part of the text that begins with none: kFirst is the text's start
  bool split = false;  // whether a mark begins a new word
};

struct BpeTokenizerParts {
  std::string format;  // "byte-level BPE"; for the description
  std::string path;
  std::string unread;             // end of the description: TokenizerFolder::unread
  std::vector<AddedToken> added;  // as place_added_tokens gives them
  std::vector<NormalizerStep> normalizer;
  std::vector<SplitPattern> splits;  // each cuts what the one before it left
  Metaspace metaspace;
  // Decoding. `replace` applies to pieces that are no bytes: {"▁", " "}.
  std::vector<NormalizerStep> replace;
  bool decode_byte_pieces = false;  // <0x0A> stands for a byte
  bool strip_first_space = false;   // one space at the beginning of a text is the encoder's
  int bos_id = -1;
  int eos_id = -1;
  bool adds_bos = false;
};

std::unique_ptr<Tokenizer> make_bpe_tokenizer(Bpe bpe, BpeTokenizerParts parts);

}  // namespace vesper
