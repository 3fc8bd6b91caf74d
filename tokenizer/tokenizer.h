// Text to token ids and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vesper {

// The bytes [begin, end) of a text.
struct TextRange {
  std::size_t begin = 0;
  std::size_t end = 0;
};

// Thread-compatible: const calls may run side by side.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Ids of `text`, which must be valid UTF-8 (an input error names the byte offset of the first fault). No BOS. The
  // names of special tokens are text like any other; what a folder adds to its vocabulary without calling it special
  // ("<tool_call>" of Qwen2.5) becomes one id here too, as in the reference implementations.
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text) const;
  // The same for what a chat template writes: the names of special tokens become their ids, except where one touches a
  // range of `plain` (ascending, apart from each other): what users wrote stays text. No BOS but one that is named.
  [[nodiscard]] std::vector<std::int32_t> encode_with_special(std::string_view text,
                                                              std::span<const TextRange> plain = {}) const;
  // What a model is given for a text: BOS where the tokenizer adds it to texts, then encode(text).
  [[nodiscard]] std::vector<std::int32_t> encode_prompt(std::string_view text) const;

  // Bytes that one token stands for inside running text, perhaps only a part of a character; special tokens stand for
  // nothing. An id outside the vocabulary is an input error.
  [[nodiscard]] virtual std::string token_bytes(std::int32_t id) const = 0;
  // The same at the beginning of a text: without the space that the encoder puts there.
  [[nodiscard]] virtual std::string first_token_bytes(std::int32_t id) const { return token_bytes(id); }
  // Whole text of a sequence, always valid UTF-8: what a StreamingDecoder gives out from the first id to the last. An
  // id outside the vocabulary is an input error.
  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids) const;

  [[nodiscard]] virtual int vocab() const = 0;
  // The token that is written so, special or not ("<|eot_id|>"); -1: none.
  [[nodiscard]] virtual int id_of(std::string_view token) const = 0;
  [[nodiscard]] virtual int bos_id() const = 0;  // -1: none
  [[nodiscard]] virtual int eos_id() const = 0;  // -1: none
  // Whether a plain text begins with BOS, as transformers has it: add_bos_token of tokenizer_config.json, else the
  // post-processor of tokenizer.json, else the habit of the format.
  [[nodiscard]] virtual bool adds_bos() const = 0;
  // What was loaded, for a line of `vesper info`: "SentencePiece, FOLDER/tokenizer.model, 32000 pieces".
  [[nodiscard]] virtual std::string description() const = 0;

 protected:
  // `text` is valid UTF-8 of at most 64 MiB.
  [[nodiscard]] virtual std::vector<std::int32_t> encode_checked(std::string_view text,
                                                                 std::span<const TextRange> plain) const = 0;
};

// Whether the folder holds files that load_tokenizer would read.
bool has_tokenizer(const std::string& folder);

// The tokenizer of a model folder: of tokenizer.json, else tokenizer.model (SentencePiece or tiktoken's text, told
// apart by content), else vocab.json with merges.txt; settings from tokenizer_config.json and special_tokens_map.json.
// The first of these that is there is taken, whatever else is. Throws an input error where none is, where a file is
// broken, and for a feature that is not supported, by its name.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder);

// Turns a stream of ids into text without ever giving out half a UTF-8 character: bytes of an unfinished character wait
// for the next token; bytes that can no longer become one come out as U+FFFD.
class StreamingDecoder {
 public:
  // `tokenizer` must outlive this. `continues` says that the text continues a prompt, so that a leading space is kept.
  StreamingDecoder(const Tokenizer& tokenizer, bool continues);
  // Whole characters that `id` completes; may be empty. An id from vocab() on stands for nothing: models pad their
  // vocabulary, and may draw what no piece belongs to.
  std::string push(std::int32_t id);
  // What is left at the end of the stream (U+FFFD for an unfinished character).
  std::string finish();

 private:
  std::string take_whole_characters();

  const Tokenizer* tokenizer_;
  bool at_start_;
  std::string pending_;
};

// Byte offset of the first byte that is not part of valid UTF-8 (RFC 3629: shortest form, no surrogates, at most
// U+10FFFF), or -1.
std::int64_t find_invalid_utf8(std::string_view text);

}  // namespace vesper
