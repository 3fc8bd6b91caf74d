#include "tokenizer/bpe_tokenizer.h"

#include <algorithm>
#include <map>
#include <utility>

#include "engine/core/error.h"

namespace vesper {
namespace {

// The parts of `ranges` that lie in [begin, end), counted from there.
std::vector<TextRange> ranges_within(std::span<const TextRange> ranges, std::size_t begin, std::size_t end) {
  std::vector<TextRange> within;
  for (const TextRange& range : ranges) {
    const TextRange part = {std::max(range.begin, begin), std::min(range.end, end)};
    if (part.begin < part.end) within.push_back({part.begin - begin, part.end - begin});
  }
  return within;
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

// The byte that "<0x0A>" names, or -1.
int named_byte(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return -1;
  const int high = hex_digit(piece[3]);
  const int low = hex_digit(piece[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(Bpe bpe, BpeTokenizerParts parts) : bpe_(std::move(bpe)), parts_(std::move(parts)) {
    std::vector<AddedToken> raw;
    std::vector<AddedToken> normalized;
    vocab_ = bpe_.vocabulary().size();
    for (const AddedToken& token : parts_.added) {
      vocab_ = std::max(vocab_, token.id + 1);
      added_.emplace(token.id, token);
      (token.normalized ? normalized : raw).push_back(token);
    }
    for (AddedToken& token : normalized) token.content = normalize(parts_.normalizer, {token.content, {}}).text;
    raw_finder_ = AddedTokenFinder(std::move(raw));
    normalized_finder_ = AddedTokenFinder(std::move(normalized));
  }

  std::string token_bytes(std::int32_t id) const override {
    if (id < 0 || id >= vocab_) {
      refuse({"decoding token ids", "the id " + std::to_string(id), "0 to " + std::to_string(vocab_ - 1),
              "use the tokenizer that made the ids"});
    }
    const auto added = added_.find(id);
    if (added != added_.end() && added->second.special) return "";
    const std::string& piece = added != added_.end() ? added->second.content : bpe_.vocabulary().piece(id);
    if (parts_.decode_byte_pieces) {
      if (const int byte = named_byte(piece); byte >= 0) return {static_cast<char>(byte)};
    }
    return parts_.replace.empty() ? piece : normalize(parts_.replace, {piece, {}}).text;
  }

  std::string first_token_bytes(std::int32_t id) const override {
    std::string bytes = token_bytes(id);
    if (parts_.strip_first_space && bytes.starts_with(' ')) bytes.erase(0, 1);
    return bytes;
  }

  int vocab() const override { return vocab_; }
  int bos_id() const override { return parts_.bos_id; }
  int eos_id() const override { return parts_.eos_id; }
  bool adds_bos() const override { return parts_.adds_bos; }
  int id_of(std::string_view token) const override {
    for (const AddedToken& added : parts_.added) {
      if (added.content == token) return added.id;
    }
    return bpe_.vocabulary().find(token);
  }
  std::string description() const override {
    return parts_.format + ", " + parts_.path + ", " + std::to_string(vocab_) + " pieces" + parts_.unread;
  }

 protected:
  std::vector<std::int32_t> encode_checked(std::string_view text, std::span<const TextRange> plain) const override {
    std::vector<std::int32_t> ids;
    for (const Section& section : raw_finder_.split(text, plain)) {
      if (section.id >= 0) {
        ids.push_back(section.id);
        continue;
      }
      const MarkedText normalized =
          normalize(parts_.normalizer, {std::string(text.substr(section.begin, section.end - section.begin)),
                                        ranges_within(plain, section.begin, section.end)});
      for (const Section& part : normalized_finder_.split(normalized.text, normalized.plain)) {
        if (part.id >= 0) {
          ids.push_back(part.id);
        } else {
          const std::string_view words = std::string_view(normalized.text).substr(part.begin, part.end - part.begin);
          encode_words(words, section.begin == 0 && part.begin == 0, ids);
        }
      }
    }
    return ids;
  }

 private:
  void encode_words(std::string_view text, bool at_start, std::vector<std::int32_t>& ids) const {
    std::string marked;  // holds what `words` point into
    std::vector<std::string_view> words = {text};
    if (!parts_.metaspace.mark.empty()) {
      marked = with_marks(text, at_start);
      words = {marked};
      if (parts_.metaspace.split) words = cut_before(marked, parts_.metaspace.mark);
    }
    for (const SplitPattern& pattern : parts_.splits) words = pattern.split(words);
    for (const std::string_view word : words) bpe_.encode(word, ids);
  }

  std::string with_marks(std::string_view text, bool at_start) const {
    const Metaspace& metaspace = parts_.metaspace;
    std::string marked;
    for (const char c : text) {
      if (c == ' ') {
        marked += metaspace.mark;
      } else {
        marked += c;
      }
    }
    const bool wants_mark = metaspace.prepend == Metaspace::Prepend::kAlways ||
                            (metaspace.prepend == Metaspace::Prepend::kFirst && at_start);
    if (wants_mark && !marked.starts_with(metaspace.mark)) marked.insert(0, metaspace.mark);
    return marked;
  }

  static std::vector<std::string_view> cut_before(std::string_view text, std::string_view mark) {
    std::vector<std::string_view> words;
    while (!text.empty()) {
      const std::size_t next = std::min(text.find(mark, 1), text.size());
      words.push_back(text.substr(0, next));
      text.remove_prefix(next);
    }
    return words;
  }

  Bpe bpe_;
  BpeTokenizerParts parts_;
  std::map<int, AddedToken> added_;
  AddedTokenFinder raw_finder_;
  AddedTokenFinder normalized_finder_;
  int vocab_ = 0;
};

}  // namespace

std::unique_ptr<Tokenizer> make_bpe_tokenizer(Bpe bpe, BpeTokenizerParts parts) {
  return std::make_unique<BpeTokenizer>(std::move(bpe), std::move(parts));
}

}  // namespace vesper
