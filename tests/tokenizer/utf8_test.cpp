#include "tokenizer/utf8.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

// Bits of `code` in the form of `length` bytes, shortest or not.
std::string utf8_form(std::uint32_t code, int length) {
  if (length == 1) return {static_cast<char>(code)};
  std::string bytes(static_cast<std::size_t>(length), '\0');
  for (int i = length - 1; i > 0; --i) {
    bytes[static_cast<std::size_t>(i)] = static_cast<char>(0x80U | (code & 0x3FU));
    code >>= 6U;
  }
  const std::uint32_t marks[] = {0, 0, 0xC0, 0xE0, 0xF0};
  bytes[0] = static_cast<char>(marks[length] | code);
  return bytes;
}

int shortest_length(std::uint32_t code) {
  if (code < 0x80) return 1;
  if (code < 0x800) return 2;
  return code < 0x10000 ? 3 : 4;
}

TEST(Utf8, KnowsEveryCodePointInEveryForm) {
  for (std::uint32_t code = 0; code < 0x200000; ++code) {
    for (int length = shortest_length(code); length <= 4; ++length) {
      const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
      const bool valid = length == shortest_length(code) && !surrogate && code <= 0x10FFFF;
      ASSERT_EQ(find_invalid_utf8(utf8_form(code, length)), valid ? -1 : 0) << "code " << code << ", length " << length;
    }
  }
}

TEST(Utf8, NamesTheOffsetOfTheFirstFault) {
  EXPECT_EQ(find_invalid_utf8(""), -1);
  EXPECT_EQ(find_invalid_utf8("a\xC3\xA9z"), -1);
  EXPECT_EQ(find_invalid_utf8("a\xC3\xA9\xFFz"), 3);
  EXPECT_EQ(find_invalid_utf8("ab\xE2\x82"), 2);
  EXPECT_EQ(find_invalid_utf8("ab\x80"), 2);
}

TEST(Utf8, TellsUnfinishedFromInvalid) {
  struct Case {
    std::string text;
    Utf8Kind kind;
    std::size_t bytes;
  };
  const std::vector<Case> cases = {
      {"a\xFF", Utf8Kind::kCharacter, 1},
      {"\xE2\x82\xAC", Utf8Kind::kCharacter, 3},
      {"\xC3", Utf8Kind::kUnfinished, 1},
      {"\xE2\x82", Utf8Kind::kUnfinished, 2},
      {"\xF0\x9F\xA6", Utf8Kind::kUnfinished, 3},
      {"\xC0", Utf8Kind::kInvalid, 1},
      {"\xF5", Utf8Kind::kInvalid, 1},
      {"\xE0\x80", Utf8Kind::kInvalid, 1},   // overlong as soon as the second byte is seen
      {"\xED\xA0", Utf8Kind::kInvalid, 1},   // a surrogate as soon as the second byte is seen
      {"\xF4\x90", Utf8Kind::kInvalid, 1},   // over U+10FFFF as soon as the second byte is seen
      {"\xF0\x9F(", Utf8Kind::kInvalid, 2},  // one maximal subpart of two bytes
      {"\xF1\x80\x80z", Utf8Kind::kInvalid, 3},
  };
  for (const Case& c : cases) {
    const Utf8Step step = utf8_step(c.text, 0);
    EXPECT_EQ(step.kind, c.kind) << testing::PrintToString(c.text);
    EXPECT_EQ(step.bytes, c.bytes) << testing::PrintToString(c.text);
  }
}

}  // namespace
}  // namespace vesper
