#include "tokenizer/sentencepiece.h"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <exception>
#include <map>
#include <utility>

#include "engine/core/error.h"
#include "tokenizer/sentencepiece_file.h"
#include "tokenizer/vocab_and_merges.h"

// Exported by the library, declared only in a header that it does not install.
namespace sentencepiece::logging {
void SetMinLogLevel(int level);  // NOLINT(readability-identifier-naming)
}  // namespace sentencepiece::logging

namespace vesper {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, which stands for a space inside pieces
// Behind a whole model: its field normalizer_spec (3) once more, with add_dummy_prefix (3) false. Protobuf merges what
// a message holds twice, the later value counts (protobuf.dev/programming-guides/encoding#last-one-wins).
constexpr std::string_view kNoDummyPrefix("\x1A\x02\x18\x00", 4);

std::string spaces_of(std::string_view piece) {
  std::string text;
  while (!piece.empty()) {
    const bool space = piece.starts_with(kSpace);
    text += space ? ' ' : piece[0];
    piece.remove_prefix(space ? kSpace.size() : 1);
  }
  return text;
}

void load_model(sentencepiece::SentencePieceProcessor& model, std::string_view bytes, const std::string& path) {
  std::string fault;
  try {
    const auto status = model.LoadFromSerializedProto(bytes);
    if (!status.ok()) fault = status.error_message();
  } catch (const std::exception& error) {
    fault = error.what();
  }
  if (!fault.empty()) {
    refuse({"reading " + path, "a SentencePiece model that libsentencepiece refuses (" + fault + ")",
            "a whole SentencePiece model", "copy or download the file again"});
  }
}

class SentencePiece final : public Tokenizer {
 public:
  SentencePiece(std::string path, const TokenizerFolder& folder) : path_(std::move(path)), unread_(folder.unread) {
    const std::string bytes = read_tokenizer_file(path_);
    check_sentencepiece_file(bytes, path_);
    sentencepiece::logging::SetMinLogLevel(3);  // fatal: what it logs below that, it also returns
    load_model(model_, bytes, path_);
    if (!folder.legacy) {
      without_prefix_ = std::make_unique<sentencepiece::SentencePieceProcessor>();
      load_model(*without_prefix_, bytes + std::string(kNoDummyPrefix), path_);
    }
    place_tokens(folder);
    const std::vector<std::int32_t> ids = encode("a");
    adds_leading_space_ = !ids.empty() && model_.IdToPiece(ids[0]).starts_with(kSpace);
  }

  std::string token_bytes(std::int32_t id) const override { return surface(id, /*at_start=*/false); }
  std::string first_token_bytes(std::int32_t id) const override { return surface(id, adds_leading_space_); }

  int vocab() const override { return vocab_; }
  int bos_id() const override { return bos_id_; }
  int eos_id() const override { return eos_id_; }
  bool adds_bos() const override { return adds_bos_; }
  int id_of(std::string_view token) const override {
    for (const auto& [id, added] : added_) {
      if (added.content == token) return id;
    }
    const int id = model_.PieceToId(token);  // that of the unknown token, where there is none
    return id >= 0 && id < model_.GetPieceSize() && model_.IdToPiece(id) == token ? id : -1;
  }
  std::string description() const override {
    return "SentencePiece, " + path_ + ", " + std::to_string(vocab()) + " pieces" + unread_;
  }

 protected:
  std::vector<std::int32_t> encode_checked(std::string_view text, std::span<const TextRange> plain) const override {
    std::vector<std::int32_t> ids;
    for (const Section& section : finder_.split(text, plain)) {
      if (section.id >= 0) {
        ids.push_back(section.id);
        continue;
      }
      const bool prefix = section.begin == 0 || without_prefix_ == nullptr;
      encode_section(prefix ? model_ : *without_prefix_, text.substr(section.begin, section.end - section.begin), ids);
    }
    return ids;
  }

 private:
  // Control pieces are special whatever the folder says of them, and so is the unknown one.
  void place_tokens(const TokenizerFolder& folder) {
    std::vector<std::string> pieces;
    std::vector<AddedToken> own;
    for (int id = 0; id < model_.GetPieceSize(); ++id) {
      pieces.push_back(model_.IdToPiece(id));
      if (!model_.IsControl(id) && !model_.IsUnknown(id)) continue;
      AddedToken token;
      token.id = id;
      token.content = pieces.back();
      token.special = true;
      own.push_back(std::move(token));
    }
    const Vocabulary vocabulary(std::move(pieces), path_);
    const std::vector<AddedToken> added = place_added_tokens(std::move(own), vocabulary, folder, path_);
    vocab_ = vocabulary.size();
    for (const AddedToken& token : added) {
      vocab_ = std::max(vocab_, token.id + 1);
      added_.emplace(token.id, token);
    }
    finder_ = AddedTokenFinder(added);
    bos_id_ = folder.bos.empty() ? model_.bos_id() : named_token(folder.bos, "bos_token", vocabulary, added, folder);
    eos_id_ = folder.eos.empty() ? model_.eos_id() : named_token(folder.eos, "eos_token", vocabulary, added, folder);
    adds_bos_ = folder.adds_bos.value_or(true) && bos_id_ >= 0;
  }

  static void encode_section(const sentencepiece::SentencePieceProcessor& model, std::string_view text,
                             std::vector<std::int32_t>& ids) {
    std::vector<std::int32_t> section;
    std::string fault;
    try {
      const auto status = model.Encode(text, &section);
      if (!status.ok()) fault = status.error_message();
    } catch (const std::exception& error) {
      fault = error.what();
    }
    if (!fault.empty()) fail({"encoding a text of " + std::to_string(text.size()) + " bytes", fault, "token ids", ""});
    ids.insert(ids.end(), section.begin(), section.end());
  }

  std::string surface(std::int32_t id, bool at_start) const {
    if (id < 0 || id >= vocab()) {
      refuse({"decoding token ids", "the id " + std::to_string(id), "0 to " + std::to_string(vocab() - 1),
              "use the tokenizer that made the ids"});
    }
    const bool is_piece = id < model_.GetPieceSize();
    if (is_piece && model_.IsUnknown(id)) {
      std::string text;
      model_.Decode(std::vector<int>{id}, &text).IgnoreError();  // " ⁇ ", unless the model names its own
      return text;
    }
    const auto added = added_.find(id);
    if (added != added_.end() && added->second.special) return "";
    if (!is_piece) return added->second.content;
    std::string_view piece = model_.IdToPiece(id);
    if (model_.IsByte(id)) {  // "<0xNN>"; the library has checked the form
      return {static_cast<char>(std::stoi(std::string(piece.substr(3, 2)), nullptr, 16))};
    }
    if (at_start && piece.starts_with(kSpace)) piece.remove_prefix(kSpace.size());
    return spaces_of(piece);
  }

  std::string path_;
  std::string unread_;
  sentencepiece::SentencePieceProcessor model_;
  std::unique_ptr<sentencepiece::SentencePieceProcessor> without_prefix_;  // for sections behind a token; null: model_
  std::map<int, AddedToken> added_;
  AddedTokenFinder finder_;
  int vocab_ = 0;
  int bos_id_ = -1;
  int eos_id_ = -1;
  bool adds_bos_ = false;
  bool adds_leading_space_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> load_sentencepiece(const std::string& path, const TokenizerFolder& folder) {
  return std::make_unique<SentencePiece>(path, folder);
}

}  // namespace vesper
