#include "tokenizer/tokenizer.h"

#include "engine/core/error.h"

namespace vesper {
namespace {

// Positions inside are 32-bit, here and in libsentencepiece, whose normalised text may be several times as long.
constexpr std::size_t kMaxTextBytes = std::size_t{64} << 20U;

void check_text(std::string_view text) {
  if (const std::int64_t at = find_invalid_utf8(text); at >= 0) {
    constexpr std::string_view kDigits = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(text[static_cast<std::size_t>(at)]);
    const std::string hex = {'0', 'x', kDigits[byte >> 4U], kDigits[byte & 15U]};
    refuse({"encoding a text", "the byte " + hex + " at byte offset " + std::to_string(at), "valid UTF-8",
            "convert the text to UTF-8"});
  }
  if (text.size() > kMaxTextBytes) {
    refuse({"encoding a text", std::to_string(text.size()) + " bytes", "at most " + std::to_string(kMaxTextBytes),
            "encode it in parts"});
  }
}

}  // namespace

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  check_text(text);
  const TextRange all = {0, text.size()};
  return encode_checked(text, {&all, 1});
}

std::vector<std::int32_t> Tokenizer::encode_with_special(std::string_view text,
                                                         std::span<const TextRange> plain) const {
  check_text(text);
  return encode_checked(text, plain);
}

std::vector<std::int32_t> Tokenizer::encode_prompt(std::string_view text) const {
  std::vector<std::int32_t> ids = encode(text);
  if (adds_bos()) ids.insert(ids.begin(), bos_id());
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids) const {
  StreamingDecoder decoder(*this, /*continues=*/false);
  std::string text;
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= vocab()) {
      refuse({"decoding token ids", "the id " + std::to_string(id), "0 to " + std::to_string(vocab() - 1),
              "use the tokenizer that made the ids"});
    }
    text += decoder.push(id);
  }
  return text + decoder.finish();
}

}  // namespace vesper
