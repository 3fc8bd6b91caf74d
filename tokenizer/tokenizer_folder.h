// What tokenizer_config.json and special_tokens_map.json say of a folder's tokenizer, whatever file holds its
// vocabulary.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/vocabulary.h"

namespace vesper {

struct TokenizerFolder {
  std::string settings;         // the file that the rest comes from, for messages
  std::string tokenizer_class;  // empty: not said
  std::string bos;              // text of the token; empty: not said
  std::string eos;
  std::optional<bool> adds_bos;   // add_bos_token
  bool legacy = true;             // SentencePiece: a text behind a special token gets the encoder's space too
  std::vector<AddedToken> added;  // added_tokens_decoder, then named special tokens without an id
  std::string unread;             // " (also there, not read: tokenizer.model)", or empty
};

// Both files may be missing. Throws an input error where one of them is broken or wants what is not supported.
TokenizerFolder read_tokenizer_folder(const std::string& path);

// One entry of added_tokens (tokenizer.json) or added_tokens_decoder (tokenizer_config.json), without its id.
AddedToken read_added_token(const nlohmann::json& entry, const std::string& source);

// `own`, the tokens of the vocabulary's file, and those that the folder adds. Where both have one, the folder's flags
// count, as in transformers; a named special token (bos_token and its like) that is only a piece becomes a special
// token. Throws an input error where a token's id is another's, or would leave a hole behind the vocabulary's.
std::vector<AddedToken> place_added_tokens(std::vector<AddedToken> own, const Vocabulary& vocabulary,
                                           const TokenizerFolder& folder, const std::string& source);

// The id of the token that `setting` ("bos_token") names; -1 for an empty name. Throws an input error where there is
// none.
int named_token(const std::string& name, const char* setting, const Vocabulary& vocabulary,
                const std::vector<AddedToken>& added, const TokenizerFolder& folder);

}  // namespace vesper
