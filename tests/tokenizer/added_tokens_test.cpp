// Added tokens in texts, and normalisation before the rest is encoded.
#include "tokenizer/added_tokens.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <vector>

#include "tokenizer/normalizer.h"

namespace vesper {
namespace {

AddedToken token(int id, const std::string& content, bool special = true) {
  AddedToken added;
  added.id = id;
  added.content = content;
  added.special = special;
  return added;
}

// "a[7]b": texts as they are, tokens as their ids in brackets.
std::string sections_of(const AddedTokenFinder& finder, const std::string& text,
                        const std::vector<TextRange>& plain = {}) {
  std::string shown;
  for (const Section& section : finder.split(text, plain)) {
    const std::string part = text.substr(section.begin, section.end - section.begin);
    shown.append(section.id < 0 ? "(" : "[").append(section.id < 0 ? part : std::to_string(section.id));
    shown.append(section.id < 0 ? ")" : "]");
  }
  return shown;
}

TEST(AddedTokens, AreFoundLeftmostAndLongest) {
  const AddedTokenFinder finder({token(0, "<s>"), token(1, "<s><s>"), token(2, "<"), token(3, "\u00E9")});
  EXPECT_EQ(sections_of(finder, ""), "");
  EXPECT_EQ(sections_of(finder, "abc"), "(abc)");
  EXPECT_EQ(sections_of(finder, "a<s>b"), "(a)[0](b)");
  EXPECT_EQ(sections_of(finder, "<s><s><s>"), "[1][0]");
  EXPECT_EQ(sections_of(finder, "<s\u00E9<s"), "[2](s)[3][2](s)");
  EXPECT_EQ(sections_of(AddedTokenFinder(), "<s>"), "(<s>)");
}

TEST(AddedTokens, SpecialOnesAreTextWhereTheyTouchAPlainRange) {
  const AddedTokenFinder finder({token(0, "<s>"), token(1, "<t>", false), token(2, "x<s>")});
  const std::string text = "<s><s><t><s>";
  EXPECT_EQ(sections_of(finder, text, {{0, 12}}), "(<s><s>)[1](<s>)");
  EXPECT_EQ(sections_of(finder, text, {{3, 6}}), "[0](<s>)[1][0]");
  EXPECT_EQ(sections_of(finder, text, {{5, 6}}), "[0](<s>)[1][0]");
  EXPECT_EQ(sections_of(finder, text, {{0, 1}, {11, 12}}), "(<s>)[0][1](<s>)");
  // A user's "x" in front of a template's token must not swallow it.
  EXPECT_EQ(sections_of(finder, "x<s>", {{0, 1}}), "(x)[0]");
  EXPECT_EQ(sections_of(finder, "x<s>"), "[2]");
}

TEST(AddedTokens, TakeWhiteSpaceAlong) {
  AddedToken left = token(0, "<l>");
  left.lstrip = true;
  AddedToken right = token(1, "<r>");
  right.rstrip = true;
  const AddedTokenFinder finder({left, right});
  EXPECT_EQ(sections_of(finder, "a \u3000<l> b"), "(a)[0]( b)");
  EXPECT_EQ(sections_of(finder, "a <r> \n\u00A0b"), "(a )[1](b)");
  EXPECT_EQ(sections_of(finder, " <r>  <l> "), "( )[1][0]( )");
  EXPECT_EQ(sections_of(finder, " <l> <r> "), "[0]( )[1]");
}

TEST(AddedTokens, ThatAlreadyFoundAreFoundOnce) {
  const AddedTokenFinder finder({token(0, "ab"), token(0, "ab"), token(1, "")});
  EXPECT_EQ(sections_of(finder, std::string("ab\0ab", 5)), std::string("[0](\0)[0]", 9));
}

TEST(Normalizer, ComposesToFormC) {
  EXPECT_EQ(to_nfc("plain"), "plain");
  EXPECT_EQ(to_nfc("e\u0301"), "\u00E9");
  EXPECT_EQ(to_nfc("\u1112\u1161\u11AB"), "\uD55C");
  EXPECT_EQ(to_nfc("q\u0307\u0323"), "q\u0323\u0307");  // in canonical order
  EXPECT_EQ(to_nfc("\u212B\u2126"), "\u00C5\u03A9");    // singletons
  EXPECT_EQ(to_nfc("\u0958"), "\u0915\u093C");          // an excluded composition
  EXPECT_EQ(to_nfc("\uFB01"), "\uFB01");                // compatibility forms stay
  EXPECT_EQ(to_nfc("\U0001D15E"), "\U0001D157\U0001D165");
}

// The reference has the tables of Unicode 9.0: a mark of Unicode 14 has no place in the order and parts what it stands
// in.
TEST(Normalizer, DoesNotKnowMarksNewerThanTheReferences) {
  EXPECT_EQ(to_nfc("c\u1AC2\u0327"), "c\u1AC2\u0327");
  EXPECT_EQ(to_nfc("\u1DFA\u0327e\u0301"), "\u1DFA\u0327\u00E9");
  EXPECT_EQ(to_nfc("\U00011935\U00011930"), "\U00011935\U00011930");
  EXPECT_EQ(to_nfc("\U00011938"), "\U00011938");
}

TEST(Normalizer, AMegabyteOfMarksIsNotQuadratic) {
  std::string text = "a";
  while (text.size() < std::size_t{1} << 20U) text += "\u0301\u0323\u0345\u0334";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_FALSE(to_nfc(text).empty());
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 20.0);
}

TEST(Normalizer, KeepsRangesInTheirPlaces) {
  using Kind = NormalizerStep::Kind;
  const std::vector<NormalizerStep> steps = {
      {Kind::kPrepend, "", "\u2581"}, {Kind::kReplace, " ", "\u2581"}, {Kind::kNfc, "", ""}};
  const MarkedText done = normalize(steps, {"a b e\u0301 c", {{2, 3}, {4, 7}}});
  EXPECT_EQ(done.text, "\u2581a\u2581b\u2581\u00E9\u2581c");
  ASSERT_EQ(done.plain.size(), 2U);
  EXPECT_EQ(done.text.substr(done.plain[0].begin, done.plain[0].end - done.plain[0].begin), "b");
  EXPECT_EQ(done.text.substr(done.plain[1].begin, done.plain[1].end - done.plain[1].begin), "\u00E9");
  EXPECT_EQ(normalize(steps, {"", {}}).text, "");
}

}  // namespace
}  // namespace vesper
