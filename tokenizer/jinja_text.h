// Python's ideas of text (str.strip, str.split, str.title, ...) over UTF-8. All texts here are valid UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/chat_text.h"

namespace vesper::jinja {

// Bytes of whitespace (str.isspace: Unicode's too) at the beginning and at the end.
std::size_t leading_space(std::string_view text);
std::size_t trailing_space(std::string_view text);

// Empty where `code` is no character: a surrogate, or beyond U+10FFFF.
std::string utf8_of(std::uint32_t code);

std::int64_t characters(std::string_view text);
// Where each character begins, and where the last one ends: characters(text) + 1 numbers.
std::vector<std::size_t> character_offsets(std::string_view text);

bool is_ascii(std::string_view text);

enum class Ends : std::uint8_t { kBoth, kLeft, kRight };
// str.strip, lstrip, rstrip; `set` holds the characters to strip, null for whitespace.
ChatText stripped(const ChatText& text, const std::string* set, Ends ends);

// str.split: at runs of whitespace where `separator` is null, and at most `most` times (-1: always). `separator` is not
// empty.
std::vector<ChatText> split(const ChatText& text, const std::string* separator, std::int64_t most);

// Of ASCII letters; the caller refuses other texts.
std::string upper(std::string text);
std::string lower(std::string text);
std::string capitalized(std::string text);
// The first letter of each word in upper case, the others in lower case; a word begins after a character that
// `separates` says yes to.
std::string titled(std::string text, const std::function<bool(char)>& separates);

}  // namespace vesper::jinja
