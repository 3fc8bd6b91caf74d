#include "tokenizer/jinja_text.h"

#include <algorithm>

#include "tokenizer/utf8.h"

namespace vesper::jinja {
namespace {

bool continues_character(char byte) {
  return (static_cast<unsigned char>(byte) & 0xC0U) == 0x80;
}

// Of the character that begins at `at`.
std::uint32_t code_at(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<std::uint32_t>(static_cast<unsigned char>(text[at + i])); };
  const std::size_t bytes = utf8_step(text, at).bytes;
  if (bytes == 1) return byte(0);
  std::uint32_t code = byte(0) & (0xFFU >> (bytes + 1));
  for (std::size_t i = 1; i < bytes; ++i) code = code << 6U | (byte(i) & 0x3FU);
  return code;
}

// str.isspace: bidirectional class WS, B or S, or category Zs (Unicode 15).
bool is_space(std::uint32_t code) {
  return (code >= 0x09 && code <= 0x0D) || (code >= 0x1C && code <= 0x20) || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F ||
         code == 0x205F || code == 0x3000;
}

std::size_t previous_character(std::string_view text, std::size_t at) {
  do {
    --at;
  } while (at > 0 && continues_character(text[at]));
  return at;
}

template <typename Belongs>
std::size_t leading(std::string_view text, const Belongs& belongs) {
  std::size_t at = 0;
  while (at < text.size() && belongs(code_at(text, at))) at += utf8_step(text, at).bytes;
  return at;
}

template <typename Belongs>
std::size_t trailing(std::string_view text, const Belongs& belongs) {
  std::size_t end = text.size();
  while (end > 0 && belongs(code_at(text, previous_character(text, end)))) end = previous_character(text, end);
  return text.size() - end;
}

char upper_of(char c) {
  return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
}

char lower_of(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

std::vector<ChatText> split_at_space(const ChatText& text, std::int64_t most) {
  const std::string_view bytes = text.bytes();
  std::vector<ChatText> parts;
  std::size_t at = leading_space(bytes);
  while (at < bytes.size()) {
    if (most >= 0 && static_cast<std::int64_t>(parts.size()) == most) {
      parts.push_back(text.part(at, bytes.size()));
      break;
    }
    const std::size_t word = leading(bytes.substr(at), [](std::uint32_t code) { return !is_space(code); });
    parts.push_back(text.part(at, at + word));
    at += word;
    at += leading_space(bytes.substr(at));
  }
  return parts;
}

}  // namespace

std::size_t leading_space(std::string_view text) {
  return leading(text, is_space);
}

std::size_t trailing_space(std::string_view text) {
  return trailing(text, is_space);
}

std::string utf8_of(std::uint32_t code) {
  const auto tail = [&](unsigned shift) { return static_cast<char>(0x80U | ((code >> shift) & 0x3FU)); };
  const auto head = [&](unsigned mark, unsigned shift) { return static_cast<char>(mark | (code >> shift)); };
  if (code < 0x80) return {head(0, 0)};
  if (code < 0x800) return {head(0xC0, 6), tail(0)};
  if ((code >= 0xD800 && code < 0xE000) || code > 0x10FFFF) return "";
  if (code < 0x10000) return {head(0xE0, 12), tail(6), tail(0)};
  return {head(0xF0, 18), tail(12), tail(6), tail(0)};
}

std::int64_t characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char byte) { return !continues_character(byte); });
}

std::vector<std::size_t> character_offsets(std::string_view text) {
  std::vector<std::size_t> offsets;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (!continues_character(text[at])) offsets.push_back(at);
  }
  offsets.push_back(text.size());
  return offsets;
}

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

ChatText stripped(const ChatText& text, const std::string* set, Ends ends) {
  std::vector<std::uint32_t> wanted;
  for (std::size_t at = 0; set != nullptr && at < set->size(); at += utf8_step(*set, at).bytes) {
    wanted.push_back(code_at(*set, at));
  }
  std::sort(wanted.begin(), wanted.end());
  const auto belongs = [&](std::uint32_t code) {
    return set == nullptr ? is_space(code) : std::binary_search(wanted.begin(), wanted.end(), code);
  };
  std::string_view bytes = text.bytes();
  const std::size_t begin = ends == Ends::kRight ? 0 : leading(bytes, belongs);
  bytes.remove_prefix(begin);
  const std::size_t end = begin + bytes.size() - (ends == Ends::kLeft ? 0 : trailing(bytes, belongs));
  return text.part(begin, end);
}

std::vector<ChatText> split(const ChatText& text, const std::string* separator, std::int64_t most) {
  if (separator == nullptr) return split_at_space(text, most);
  std::vector<ChatText> parts;
  std::size_t begin = 0;
  while (most < 0 || static_cast<std::int64_t>(parts.size()) < most) {
    const std::size_t found = text.bytes().find(*separator, begin);
    if (found == std::string::npos) break;
    parts.push_back(text.part(begin, found));
    begin = found + separator->size();
  }
  parts.push_back(text.part(begin, text.size()));
  return parts;
}

std::string upper(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), upper_of);
  return text;
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), lower_of);
  return text;
}

std::string capitalized(std::string text) {
  text = lower(std::move(text));
  if (!text.empty()) text[0] = upper_of(text[0]);
  return text;
}

std::string titled(std::string text, const std::function<bool(char)>& separates) {
  bool begins = true;
  for (char& c : text) {
    const char old = c;
    c = begins ? upper_of(c) : lower_of(c);
    begins = separates(old);
  }
  return text;
}

}  // namespace vesper::jinja
