#include "tokenizer/bpe.h"

#include <bit>
#include <functional>
#include <queue>
#include <string>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "tokenizer/utf8.h"

namespace vesper {
namespace {

// What SentencePiece calls the piece of a byte: <0x0A>.
std::string byte_piece(unsigned byte) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  return {'<', '0', 'x', kDigits[byte >> 4U], kDigits[byte & 15U], '>'};
}

// A pair that may be merged; `result` tells later whether the pair at `at` is still one that becomes it.
struct Candidate {
  std::uint32_t rank;
  std::int32_t at;
  std::int32_t result;
  bool operator>(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
};

}  // namespace

Bpe::Bpe(Vocabulary vocabulary, const std::vector<Merge>& merges, const BpeOptions& options)
    : vocabulary_(std::move(vocabulary)), options_(options) {
  rules_.resize(std::bit_ceil(merges.size() * 2 + 1));
  for (const Merge& merge : merges) {
    rules_[slot_of(merge.left, merge.right)] = {merge.left, merge.right, merge.result, merge.rank};
  }
  for (unsigned byte = 0; byte < 256; ++byte) {
    byte_ids_.push_back(vocabulary_.find(options_.bytes ? std::string(1, static_cast<char>(byte)) : byte_piece(byte)));
  }
}

std::size_t Bpe::slot_of(int left, int right) const {
  const std::uint64_t pair = std::uint64_t{static_cast<std::uint32_t>(left)} << 32U | static_cast<std::uint32_t>(right);
  std::size_t at = (pair * 0x9E3779B97F4A7C15U >> 32U) & (rules_.size() - 1);  // 2^64 / the golden ratio
  while (rules_[at].left >= 0 && (rules_[at].left != left || rules_[at].right != right)) {
    at = (at + 1) & (rules_.size() - 1);
  }
  return at;
}

const Bpe::MergeRule* Bpe::find_rule(int left, int right) const {
  const MergeRule& rule = rules_[slot_of(left, right)];
  return rule.left < 0 ? nullptr : &rule;
}

void Bpe::encode(std::string_view word, std::vector<std::int32_t>& ids) const {
  if (options_.ignore_merges) {
    if (const int whole = vocabulary_.find(word); whole >= 0) {
      ids.push_back(whole);
      return;
    }
  }
  std::vector<std::int32_t> symbols = initial_symbols(word);
  if (symbols.size() > 1) merge_all(symbols);
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

std::vector<std::int32_t> Bpe::initial_symbols(std::string_view word) const {
  std::vector<std::int32_t> symbols;
  symbols.reserve(word.size());
  bool unknown = false;  // an unknown token is due; it is put down by what follows it, so that neighbours can join it
  const auto put_unknown = [&] {
    if (unknown) symbols.push_back(options_.unk_id);
    unknown = false;
  };
  for (std::size_t at = 0; at < word.size();) {
    const std::string_view symbol = word.substr(at, options_.bytes ? 1 : utf8_step(word, at).bytes);
    at += symbol.size();
    const int id = options_.bytes ? byte_ids_[static_cast<unsigned char>(symbol[0])] : vocabulary_.find(symbol);
    if (id >= 0) {
      put_unknown();
      symbols.push_back(id);
      continue;
    }
    if (options_.byte_fallback && !options_.bytes) {
      std::vector<std::int32_t> bytes;
      for (const char c : symbol) {
        const int byte_id = byte_ids_[static_cast<unsigned char>(c)];
        if (byte_id >= 0) bytes.push_back(byte_id);
      }
      if (bytes.size() == symbol.size()) {
        symbols.insert(symbols.end(), bytes.begin(), bytes.end());  // before an unknown token that is due, as there
        continue;
      }
    }
    if (options_.unk_id < 0) {
      const std::string what = options_.bytes ? "the byte " + byte_piece(static_cast<unsigned char>(symbol[0]))
                                              : "the character " + in_quotes(symbol);
      refuse({"encoding a text", what + ", which the tokenizer has no piece for", "what its vocabulary can spell",
              "leave it out"});
    }
    if (!options_.fuse_unk) put_unknown();
    unknown = true;
  }
  put_unknown();
  return symbols;
}

void Bpe::merge_all(std::vector<std::int32_t>& symbols) const {
  const auto count = static_cast<std::int32_t>(symbols.size());
  std::vector<std::int32_t> before(symbols.size());  // neighbours of the symbols that are left
  std::vector<std::int32_t> after(symbols.size());
  std::vector<Candidate> first;
  first.reserve(symbols.size());
  const auto symbol = [&](std::int32_t at) -> std::int32_t& { return symbols[static_cast<std::size_t>(at)]; };
  for (std::int32_t at = 0; at < count; ++at) {
    before[static_cast<std::size_t>(at)] = at - 1;
    after[static_cast<std::size_t>(at)] = at + 1;
    if (at + 1 == count) break;
    if (const MergeRule* rule = find_rule(symbol(at), symbol(at + 1))) first.push_back({rule->rank, at, rule->result});
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates(std::greater<>(), std::move(first));

  constexpr std::int32_t kGone = -1;
  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    if (symbol(best.at) == kGone) continue;
    const std::int32_t right = after[static_cast<std::size_t>(best.at)];
    if (right == count) continue;
    const MergeRule* rule = find_rule(symbol(best.at), symbol(right));
    if (rule == nullptr || rule->result != best.result) continue;  // one of the two has changed since

    symbol(best.at) = best.result;
    symbol(right) = kGone;
    const std::int32_t next = after[static_cast<std::size_t>(right)];
    after[static_cast<std::size_t>(best.at)] = next;
    if (next != count) before[static_cast<std::size_t>(next)] = best.at;
    const std::int32_t previous = before[static_cast<std::size_t>(best.at)];
    if (previous >= 0) {
      if (const MergeRule* left_rule = find_rule(symbol(previous), best.result)) {
        candidates.push({left_rule->rank, previous, left_rule->result});
      }
    }
    if (next != count) {
      if (const MergeRule* right_rule = find_rule(best.result, symbol(next))) {
        candidates.push({right_rule->rank, best.at, right_rule->result});
      }
    }
  }
  std::erase(symbols, kGone);
}

std::vector<Merge> merges_of_ranks(const Vocabulary& vocabulary) {
  std::vector<Merge> merges;
  for (int id = 0; id < vocabulary.size(); ++id) {
    const std::string_view piece = vocabulary.piece(id);
    for (std::size_t cut = 1; cut < piece.size(); ++cut) {
      const int left = vocabulary.find(piece.substr(0, cut));
      const int right = left < 0 ? -1 : vocabulary.find(piece.substr(cut));
      if (right >= 0) merges.push_back({left, right, id, static_cast<std::uint32_t>(id)});
    }
  }
  return merges;
}

}  // namespace vesper
