#include "tokenizer/added_tokens.h"

#include <algorithm>
#include <utility>

#include "tokenizer/utf8.h"

namespace vesper {
namespace {

// Where the white space that ends at `end` begins, at `least` or behind it.
std::size_t white_space_begin(std::string_view text, std::size_t least, std::size_t end) {
  while (end > least) {
    std::size_t begin = end - 1;
    while (begin > least && (static_cast<unsigned char>(text[begin]) & 0xC0U) == 0x80) --begin;
    if (!is_white_space(utf8_code(text.substr(begin, end - begin)))) break;
    end = begin;
  }
  return end;
}

std::size_t white_space_end(std::string_view text, std::size_t begin) {
  while (begin < text.size()) {
    const std::size_t bytes = utf8_step(text, begin).bytes;
    if (!is_white_space(utf8_code(text.substr(begin, bytes)))) break;
    begin += bytes;
  }
  return begin;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::erase_if(tokens_, [](const AddedToken& token) { return token.content.empty(); });
  std::sort(tokens_.begin(), tokens_.end(), [](const auto& a, const auto& b) { return a.content < b.content; });
  for (const AddedToken& token : tokens_) begins_[static_cast<unsigned char>(token.content[0])] = true;
}

// Narrows the sorted tokens down to those that agree with the text so far, byte by byte.
const AddedToken* AddedTokenFinder::longest_at(std::string_view text) const {
  const AddedToken* longest = nullptr;
  auto low = tokens_.begin();
  auto high = tokens_.end();
  for (std::size_t depth = 0; low != high; ++depth) {
    for (; low != high && low->content.size() == depth; ++low) longest = &*low;
    if (depth == text.size()) break;
    const auto byte = static_cast<unsigned char>(text[depth]);
    const auto at_depth = [depth](const AddedToken& token) { return static_cast<unsigned char>(token.content[depth]); };
    low = std::partition_point(low, high, [&](const AddedToken& token) { return at_depth(token) < byte; });
    high = std::partition_point(low, high, [&](const AddedToken& token) { return at_depth(token) == byte; });
  }
  return longest;
}

std::vector<Section> AddedTokenFinder::split(std::string_view text, std::span<const TextRange> plain) const {
  std::vector<Section> sections;
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const AddedToken* token = begins_[static_cast<unsigned char>(text[at])] ? longest_at(text.substr(at)) : nullptr;
    if (token == nullptr) {
      ++at;
      continue;
    }
    std::size_t begin = at;
    std::size_t end = at + token->content.size();
    if (token->special) {
      while (!plain.empty() && plain.front().end <= begin) plain = plain.subspan(1);
      if (!plain.empty() && plain.front().begin < end) {
        // Wholly inside, all of it is text; else what lies beyond the range may begin another token.
        at = plain.front().begin <= begin && end <= plain.front().end ? end : at + 1;
        continue;
      }
    }
    if (token->lstrip) begin = white_space_begin(text, done, begin);
    if (token->rstrip) end = white_space_end(text, end);
    if (begin > done) sections.push_back({-1, done, begin});
    sections.push_back({token->id, begin, end});
    done = at = end;
  }
  if (done < text.size()) sections.push_back({-1, done, text.size()});
  return sections;
}

}  // namespace vesper
