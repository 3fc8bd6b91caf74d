#include "tokenizer/sentencepiece.h"

#include <sentencepiece_processor.h>

#include <exception>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/mapped_file.h"
#include "tokenizer/sentencepiece_file.h"

// Exported by the library, declared only in a header that it does not install.
namespace sentencepiece::logging {
void SetMinLogLevel(int level);  // NOLINT(readability-identifier-naming)
}  // namespace sentencepiece::logging

namespace vesper {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, which stands for a space inside pieces
// The library counts in int, and its normalised text may be several times as long.
constexpr std::size_t kMaxTextBytes = std::size_t{64} << 20;
constexpr std::size_t kMaxModelBytes = std::size_t{256} << 20;

std::string spaces_of(std::string_view piece) {
  std::string text;
  while (!piece.empty()) {
    const bool space = piece.starts_with(kSpace);
    text += space ? ' ' : piece[0];
    piece.remove_prefix(space ? kSpace.size() : 1);
  }
  return text;
}

std::string hex_byte(unsigned char byte) {
  return {'0', 'x', "0123456789abcdef"[byte >> 4U], "0123456789abcdef"[byte & 15U]};
}

class SentencePiece final : public Tokenizer {
 public:
  explicit SentencePiece(std::string path) : path_(std::move(path)) {
    const MappedFile file(path_);
    const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
    if (bytes.size() > kMaxModelBytes) {
      refuse({"reading " + path_, std::to_string(bytes.size()) + " bytes", "at most " + std::to_string(kMaxModelBytes),
              ""});
    }
    check_sentencepiece_file(bytes, path_);
    sentencepiece::logging::SetMinLogLevel(3);  // fatal: what it logs below that, it also returns
    std::string fault;
    try {
      const auto status = model_.LoadFromSerializedProto(bytes);
      if (!status.ok()) fault = status.error_message();
    } catch (const std::exception& error) {
      fault = error.what();
    }
    if (!fault.empty()) {
      refuse({"reading " + path_, "a SentencePiece model that libsentencepiece refuses (" + fault + ")",
              "a whole SentencePiece model", "copy or download the file again"});
    }
    const std::vector<std::int32_t> ids = encode("a");
    adds_leading_space_ = !ids.empty() && model_.IdToPiece(ids[0]).starts_with(kSpace);
  }

  std::vector<std::int32_t> encode(std::string_view text) const override {
    if (const std::int64_t at = find_invalid_utf8(text); at >= 0) {
      const auto byte = static_cast<unsigned char>(text[static_cast<std::size_t>(at)]);
      refuse({"encoding a text", "the byte " + hex_byte(byte) + " at byte offset " + std::to_string(at), "valid UTF-8",
              "convert the text to UTF-8"});
    }
    if (text.size() > kMaxTextBytes) {
      refuse({"encoding a text", std::to_string(text.size()) + " bytes", "at most " + std::to_string(kMaxTextBytes),
              "encode it in parts"});
    }
    std::vector<std::int32_t> ids;
    std::string fault;
    try {
      const auto status = model_.Encode(text, &ids);
      if (!status.ok()) fault = status.error_message();
    } catch (const std::exception& error) {
      fault = error.what();
    }
    if (!fault.empty()) fail({"encoding a text of " + std::to_string(text.size()) + " bytes", fault, "token ids", ""});
    return ids;
  }

  std::string token_bytes(std::int32_t id) const override { return surface(id, /*at_start=*/false); }
  std::string first_token_bytes(std::int32_t id) const override { return surface(id, adds_leading_space_); }

  int vocab() const override { return model_.GetPieceSize(); }
  int bos_id() const override { return model_.bos_id(); }
  int eos_id() const override { return model_.eos_id(); }
  std::string description() const override {
    return "SentencePiece, " + path_ + ", " + std::to_string(vocab()) + " pieces";
  }

 private:
  std::string surface(std::int32_t id, bool at_start) const {
    if (id < 0 || id >= vocab()) {
      refuse({"decoding token ids", "the id " + std::to_string(id), "0 to " + std::to_string(vocab() - 1),
              "use the tokenizer that made the ids"});
    }
    if (model_.IsControl(id)) return "";
    if (model_.IsUnknown(id)) {
      std::string text;
      model_.Decode(std::vector<int>{id}, &text).IgnoreError();  // " ⁇ ", unless the model names its own
      return text;
    }
    std::string_view piece = model_.IdToPiece(id);
    if (model_.IsByte(id)) {  // "<0xNN>"; the library has checked the form
      return {static_cast<char>(std::stoi(std::string(piece.substr(3, 2)), nullptr, 16))};
    }
    if (at_start && piece.starts_with(kSpace)) piece.remove_prefix(kSpace.size());
    return spaces_of(piece);
  }

  std::string path_;
  sentencepiece::SentencePieceProcessor model_;
  bool adds_leading_space_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> load_sentencepiece(const std::string& path) {
  return std::make_unique<SentencePiece>(path);
}

}  // namespace vesper
