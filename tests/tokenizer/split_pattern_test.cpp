// Split patterns: what they cut, what of their syntax is taken, and what they may cost.
#include "tokenizer/split_pattern.h"

#include <gtest/gtest.h>

#include <chrono>
#include <numeric>
#include <string>
#include <vector>

#include "tests/tokenizer/small_tokenizers.h"

namespace vesper {
namespace {

using Words = std::vector<std::string>;

Words words_of(const SplitPattern& pattern, const std::string& text) {
  const std::vector<std::string_view> words = pattern.split({text});
  return {words.begin(), words.end()};
}

std::string refusal_of_pattern(const std::string& pattern) {
  return refusal_of([&] { const SplitPattern compiled(pattern, "x.json"); });
}

TEST(SplitPattern, CutsAsGpt2) {
  const SplitPattern gpt2(kGpt2Pattern, "x");
  EXPECT_EQ(words_of(gpt2, "Hello you're 123  x!\n"), (Words{"Hello", " you", "'re", " 123", " ", " x", "!", "\n"}));
  EXPECT_EQ(words_of(gpt2, ""), Words{});
}

TEST(SplitPattern, CutsAsLlama3) {
  const SplitPattern llama3(kLlama3Pattern, "x");
  EXPECT_EQ(words_of(llama3, "You'RE 12345 $5.\r\n\n  a\tb"),
            (Words{"You", "'RE", " ", "123", "45", " $", "5", ".\r\n\n", " ", " a", "\tb"}));
  EXPECT_EQ(words_of(llama3, "it'\u017F"), (Words{"it", "'\u017F"}));  // a long s is an s where case is ignored
}

TEST(SplitPattern, CutsAsQwen2) {
  const SplitPattern qwen2(kQwen2Pattern, "x");
  EXPECT_EQ(words_of(qwen2, "a 12\u0663"), (Words{"a", " ", "1", "2", "\u0663"}));
}

TEST(SplitPattern, WhiteSpaceIsUnicodes) {
  const SplitPattern white(R"(\s+)", "x");
  EXPECT_EQ(words_of(white, "a\u0085\u00A0\u1680\u2003\u2028\u3000b"),
            (Words{"a", "\u0085\u00A0\u1680\u2003\u2028\u3000", "b"}));
  EXPECT_EQ(words_of(white, "a\u180E\u200B\uFEFFb"), (Words{"a\u180E\u200B\uFEFFb"}));  // PCRE2's \s has U+180E
  EXPECT_EQ(words_of(SplitPattern(R"([^\s]+)", "x"), "ab\u180E c"), (Words{"ab\u180E", " ", "c"}));
  EXPECT_EQ(words_of(SplitPattern(R"(\S+)", "x"), "ab\u180E c"), (Words{"ab\u180E", " ", "c"}));
  EXPECT_EQ(words_of(SplitPattern(R"(\d)", "x"), "a1\u0663"), (Words{"a", "1", "\u0663"}));
}

TEST(SplitPattern, CategoriesAreThoseOfUnicode16) {
  const SplitPattern letters(R"(\p{L}+)", "x");
  EXPECT_EQ(words_of(letters, "-a\u00E9\U00031350\U0002EBF0-"), (Words{"-", "a\u00E9\U00031350\U0002EBF0", "-"}));
  EXPECT_EQ(words_of(SplitPattern(R"(\P{N}+)", "x"), "a1\U0001D2C0b"), (Words{"a", "1\U0001D2C0", "b"}));
  EXPECT_EQ(words_of(SplitPattern(R"([^\s\p{L}\p{N}]+)", "x"), "!\U0001D2C0!\U00010D4A!"),
            (Words{"!", "\U0001D2C0", "!", "\U00010D4A", "!"}));
  EXPECT_EQ(words_of(SplitPattern(R"(\p{Lu})", "x"), "\uA7DA\uA7DB"), (Words{"\uA7DA", "\uA7DB"}));
}

TEST(SplitPattern, ALiteralIsNoPattern) {
  EXPECT_EQ(words_of(SplitPattern::literal(".", "x"), "a.b."), (Words{"a", ".", "b", "."}));
}

TEST(SplitPattern, AnEmptyMatchPartsWords) {
  EXPECT_EQ(words_of(SplitPattern("(?=b)", "x"), "ab\u00E9b"), (Words{"a", "b\u00E9", "b"}));
  EXPECT_EQ(words_of(SplitPattern("a*", "x"), "\u00E9\u00E9aa"), (Words{"\u00E9", "\u00E9", "aa"}));
}

TEST(SplitPattern, RefusesWhatMeansSomethingElseInPcre2) {
  const std::vector<std::string> constructs = {
      R"(\w+)",  R"(\bx)", R"(\h)",    R"(\p{Han}+)", R"(\p{^L})", R"(\pL)",     R"([\S])",   "[a[b]]",
      "[a&&b]",  "[]a]",   "a.b",      "^a",          "a$",        "(?>a)",      "(?<n>a)",   "(?#c)",
      "(?m:a)",  "a{2}+",  "a{,2}",    "a{x}",        R"(\x{41})", R"(\1)",      R"(\K)",     R"(\)",
      "(*UCP)a", "(?R)",   R"(\Qa\E)", R"(\G)",       R"(\p{Cn})", R"([\P{L}])", R"(\u0041)", R"([[:alpha:]])"};
  for (const std::string& pattern : constructs) {
    const std::string message = refusal_of_pattern(pattern);
    EXPECT_NE(message.find("x.json"), std::string::npos) << pattern << ": " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
}

TEST(SplitPattern, RefusesWhatIsNoPattern) {
  for (const std::string pattern : {"", "(a", "[a", "a)", "*", "[z-a]", "a{99999999}"}) {
    EXPECT_NE(refusal_of_pattern(pattern).find("x.json"), std::string::npos) << pattern;
  }
  EXPECT_NE(refusal_of_pattern(std::string(5000, 'a')).find("a split pattern of 5000 bytes"), std::string::npos);
  EXPECT_NE(refusal_of_pattern("\xFF").find("UTF-8"), std::string::npos);
  EXPECT_NE(refusal_of_pattern(std::string(2000, '(') + std::string(2000, ')')), "");
}

TEST(SplitPattern, LongRunsAreCutInSeconds) {
  const auto start = std::chrono::steady_clock::now();
  for (const char* source : {kGpt2Pattern, kLlama3Pattern, kQwen2Pattern}) {
    const SplitPattern pattern(source, "x");
    for (const std::string unit : {" ", "a", "1", "!", "\n", "\u00E9", " \u4E2D", "\u3000", "a ", "'s"}) {
      std::string text;
      while (text.size() < std::size_t{1} << 20U) text += unit;
      text += "x";
      std::size_t bytes = 0;
      for (const std::string_view word : pattern.split({text})) bytes += word.size();
      EXPECT_EQ(bytes, text.size()) << source << " on " << unit;
    }
  }
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 60.0);
}

TEST(SplitPattern, AHostilePatternEndsInASentence) {
  const auto start = std::chrono::steady_clock::now();
  for (const std::string pattern : {"(a+)+[bc]", "(a|a)*[bc]", "(?:a*)*(?:a*)*(?:a*)*[bc]", "((a|b)*(a|b)*)*[cd]",
                                    "a*a*a*a*a*a*[bc]", "(?:(a)|b)*[cd]"}) {
    const SplitPattern compiled(pattern, "x");
    const std::string message = refusal_of([&] { (void)words_of(compiled, std::string(200000, 'a')); });
    EXPECT_NE(message.find("a split pattern that gives up at byte 0"), std::string::npos) << pattern << ": " << message;
  }
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 60.0);
}

}  // namespace
}  // namespace vesper
