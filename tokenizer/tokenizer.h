// Text to token ids and back.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vesper {

// Thread-compatible: const calls may run side by side.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Ids of `text`, which must be valid UTF-8 (an input error names the byte offset of the first fault). No BOS.
  [[nodiscard]] virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;
  // Bytes that one token stands for inside running text, perhaps only a part of a character; control tokens stand for
  // nothing. An id outside the vocabulary is an input error.
  [[nodiscard]] virtual std::string token_bytes(std::int32_t id) const = 0;
  // The same at the beginning of a text: without the space that the encoder puts there.
  [[nodiscard]] virtual std::string first_token_bytes(std::int32_t id) const { return token_bytes(id); }
  // Whole text of a sequence, always valid UTF-8: what a StreamingDecoder gives out from the first id to the last.
  [[nodiscard]] std::string decode(std::span<const std::int32_t> ids) const;

  [[nodiscard]] virtual int vocab() const = 0;
  [[nodiscard]] virtual int bos_id() const = 0;  // -1: none
  [[nodiscard]] virtual int eos_id() const = 0;  // -1: none
  // What was loaded, for a line of `vesper info`: "SentencePiece, FOLDER/tokenizer.model, 32000 pieces".
  [[nodiscard]] virtual std::string description() const = 0;
};

// Whether the folder holds a file that load_tokenizer would read.
bool has_tokenizer(const std::string& folder);

// The tokenizer of a model folder. Throws an input error that lists the files looked for where there is none.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& folder);

// Turns a stream of ids into text without ever giving out half a UTF-8 character: bytes of an unfinished character wait
// for the next token; bytes that can no longer become one come out as U+FFFD.
class StreamingDecoder {
 public:
  // `tokenizer` must outlive this. `continues` says that the text continues a prompt, so that a leading space is kept.
  StreamingDecoder(const Tokenizer& tokenizer, bool continues);
  // Whole characters that `id` completes; may be empty.
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
