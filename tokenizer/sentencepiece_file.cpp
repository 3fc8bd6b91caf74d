// The file is one protobuf message. Wire format: protobuf.dev/programming-guides/encoding. Field numbers:
// sentencepiece_model.proto of SentencePiece 0.1.97. Trie: a double array of darts-clone (units of 32 bits, darts.h).
#include "tokenizer/sentencepiece_file.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "engine/core/error.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/vocabulary.h"

namespace vesper {
namespace {

// Longest sequences that libsentencepiece has room for (Normalizer::kMaxTrieResultsSize, PrefixMatcher's kResultSize).
constexpr int kMaxNestedRules = 32;
constexpr std::size_t kMaxNestedSymbols = 64;
// Ours: real pieces and rules have a few dozen bytes; the library and the walk below recurse as deep as these.
constexpr int kMaxRuleBytes = 256;

[[noreturn]] void refuse_file(const std::string& path, const std::string& found) {
  refuse({"reading " + path, found, "a whole SentencePiece model", "copy or download the file again"});
}

constexpr std::uint64_t kUserDefined = 4;  // ModelProto.SentencePiece.Type

// One field: `value` of a varint, `bytes` of a length-delimited one.
struct Field {
  std::uint64_t number = 0;
  bool delimited = false;
  std::uint64_t value = 0;
  std::string_view bytes;
};

// Walks over the fields of one message, which must end where its last field ends.
class FieldReader {
 public:
  FieldReader(std::string_view message, std::string_view file, const std::string& path)
      : rest_(message), file_(file), path_(path) {}

  bool next(Field& field) {
    if (rest_.empty()) return false;
    const std::uint64_t tag = varint();
    field = {tag >> 3, (tag & 7U) == 2, 0, {}};
    if (field.number == 0) broken("field number 0");
    switch (tag & 7U) {
      case 0:
        field.value = varint();
        return true;
      case 1:
        take(8);
        return true;
      case 2:
        field.bytes = take(varint());
        return true;
      case 5:
        take(4);
        return true;
      default:
        broken("wire type " + std::to_string(tag & 7U));
    }
  }

 private:
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<std::uint64_t>(byte & 0x7FU) << shift;
      if (byte < 0x80) return value;
    }
    broken("a number of more than 64 bits");
  }

  std::string_view take(std::uint64_t bytes) {
    if (bytes > rest_.size()) {
      broken("a field of " + std::to_string(bytes) + " bytes with " + std::to_string(rest_.size()) + " left");
    }
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return taken;
  }

  [[noreturn]] void broken(const std::string& what) {
    refuse_file(path_, what + " before byte " + std::to_string(rest_.data() - file_.data()));
  }

  std::string_view rest_;
  std::string_view file_;
  const std::string& path_;
};

// The rules that rewrite characters before pieces are sought: 4 bytes of trie size, the trie, then the replacements,
// each ended by NUL and addressed by the values of the trie.
class NormalisationRules {
 public:
  NormalisationRules(std::string_view blob, const std::string& path) : path_(path) {
    std::uint32_t trie_bytes = 0;
    if (blob.size() < sizeof trie_bytes) refuse_file(path_, "normalisation rules of " + size_of(blob));
    std::memcpy(&trie_bytes, blob.data(), sizeof trie_bytes);  // little endian, as this machine
    blob.remove_prefix(sizeof trie_bytes);
    if (trie_bytes % 4 != 0 || trie_bytes >= blob.size() || blob.back() != '\0') {
      refuse_file(path_, "a normalisation trie of " + std::to_string(trie_bytes) + " in " + size_of(blob));
    }
    units_.resize(trie_bytes / 4);
    std::memcpy(units_.data(), blob.data(), trie_bytes);
    replacement_bytes_ = blob.size() - trie_bytes;
    longest_.assign(units_.size(), -1);
  }

  // Every walk that any text can cause stays inside the trie, ends, and meets at most kMaxNestedRules rules.
  void check() {
    if (units_.empty()) outside();
    if (nested_rules(step(0), 0) > kMaxNestedRules) {
      refuse_file(path_, "more than " + std::to_string(kMaxNestedRules) + " normalisation rules that begin alike");
    }
  }

 private:
  static std::string size_of(std::string_view blob) { return std::to_string(blob.size()) + " bytes"; }
  [[noreturn]] void outside() const { refuse_file(path_, "a normalisation trie that leads outside itself"); }

  // Where the children of the node at `unit` lie: child c at this XOR c.
  std::size_t step(std::size_t unit) const {
    const std::uint32_t bits = units_[unit];
    const std::size_t base = unit ^ (std::size_t{bits >> 10} << ((bits & 0x200U) >> 6));
    if ((base | 0xFFU) >= units_.size()) outside();
    return base;
  }

  // Rules met on the longest walk from the children at `base`.
  int nested_rules(std::size_t base, int depth) {
    if (longest_[base] >= 0) return longest_[base];
    if (depth > kMaxRuleBytes) refuse_file(path_, "a normalisation rule of more than 256 bytes");  // or a loop
    int longest = 0;
    for (std::uint32_t c = 0; c < 256; ++c) {
      const std::uint32_t bits = units_[base ^ c];
      if ((bits & 0x800000FFU) != c) continue;  // no child by this byte
      const std::size_t child = step(base ^ c);
      const bool is_rule = (bits & 0x100U) != 0;
      if (is_rule && (units_[child] & 0x7FFFFFFFU) >= replacement_bytes_) outside();
      longest = std::max(longest, (is_rule ? 1 : 0) + nested_rules(child, depth + 1));
    }
    return longest_[base] = longest;
  }

  const std::string& path_;
  std::vector<std::uint32_t> units_;
  std::size_t replacement_bytes_ = 0;
  std::vector<int> longest_;  // by base; -1: not walked yet
};

void check_normalizer_spec(std::string_view message, std::string_view file, const std::string& path) {
  FieldReader reader(message, file, path);
  for (Field field; reader.next(field);) {
    if (field.number == 2 && field.delimited && !field.bytes.empty()) NormalisationRules(field.bytes, path).check();
  }
}

// Adds the piece to `symbols` where the model wants it matched before anything else.
void check_piece(std::string_view message, std::string_view file, const std::string& path,
                 std::vector<std::string_view>& symbols) {
  std::string_view piece;
  std::uint64_t type = 0;
  FieldReader reader(message, file, path);
  for (Field field; reader.next(field);) {
    if (field.number == 1 && field.delimited) piece = field.bytes;
    if (field.number == 3 && !field.delimited) type = field.value;
  }
  if (piece.empty() || piece.size() > kMaxPieceBytes) {
    refuse_file(path, "a piece of " + std::to_string(piece.size()) + " bytes");
  }
  if (find_invalid_utf8(piece) >= 0 || piece.find('\0') != std::string_view::npos) {
    refuse_file(path, "a piece that is no text before byte " + std::to_string(piece.data() - file.data()));
  }
  if (type == kUserDefined) symbols.push_back(piece);
}

void check_nesting(std::vector<std::string_view> symbols, const std::string& path) {
  std::sort(symbols.begin(), symbols.end());  // a prefix comes right before what it begins
  std::vector<std::string_view> nested;
  for (const std::string_view symbol : symbols) {
    while (!nested.empty() && !symbol.starts_with(nested.back())) nested.pop_back();
    nested.push_back(symbol);
    if (nested.size() > kMaxNestedSymbols) {
      refuse_file(path, "more than " + std::to_string(kMaxNestedSymbols) + " user-defined pieces that begin alike");
    }
  }
}

}  // namespace

void check_sentencepiece_file(std::string_view bytes, const std::string& path) {
  std::vector<std::string_view> symbols;
  bool has_trainer_spec = false;
  bool has_normalizer_spec = false;
  FieldReader reader(bytes, bytes, path);
  for (Field field; reader.next(field);) {
    if (!field.delimited) continue;
    if (field.number == 1) check_piece(field.bytes, bytes, path, symbols);
    if (field.number == 2) has_trainer_spec = true;
    if (field.number == 3 || field.number == 5) check_normalizer_spec(field.bytes, bytes, path);
    if (field.number == 3) has_normalizer_spec = true;
  }
  check_nesting(std::move(symbols), path);
  // Written after the pieces, so a file cut between two pieces lacks them, and the library would take its defaults.
  if (!has_trainer_spec || !has_normalizer_spec) {
    refuse_file(path, "an end of file before the trainer's or the normaliser's settings");
  }
}

}  // namespace vesper
