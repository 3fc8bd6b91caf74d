#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/source_dir.h"
#include "tests/tokenizer/random_text.h"
#include "tests/tokenizer/small_tokenizers.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

const Tokenizer& demo() {
  static const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(source_dir() + "/configs/demo");
  return *tokenizer;
}

TEST(SentencePiece, KnowsTheDemoModel) {
  EXPECT_EQ(demo().vocab(), 4096);
  EXPECT_EQ(demo().bos_id(), 1);
  EXPECT_EQ(demo().eos_id(), 2);
  EXPECT_EQ(demo().description(), "SentencePiece, " + source_dir() + "/configs/demo/tokenizer.model, 4096 pieces");
}

TEST(SentencePiece, GivesTheBytesOfEachKindOfToken) {
  EXPECT_EQ(demo().token_bytes(0), " \u2047 ");  // <unk>, as the library shows it
  EXPECT_EQ(demo().token_bytes(1), "");          // <s>
  EXPECT_EQ(demo().token_bytes(2), "");          // </s>
  for (int byte = 0; byte < 256; ++byte) {       // <0x00> to <0xFF> follow the three
    EXPECT_EQ(demo().token_bytes(3 + byte), std::string(1, static_cast<char>(byte)));
    EXPECT_EQ(demo().first_token_bytes(3 + byte), std::string(1, static_cast<char>(byte)));
  }
  const std::int32_t the = demo().encode("the")[0];
  EXPECT_EQ(demo().token_bytes(the), " the");
  EXPECT_EQ(demo().first_token_bytes(the), "the");
}

TEST(SentencePiece, TreatsTheNamesOfTokensAsText) {
  for (const std::string text : {"<s>", "</s>", "<unk>", "<0x41>", "a <s> b"}) {
    const std::vector<std::int32_t> ids = demo().encode(text);
    for (const std::int32_t id : ids) EXPECT_GE(id, 3) << text;
    EXPECT_EQ(demo().decode(ids), text);
  }
}

TEST(SentencePiece, FallsBackToBytes) {
  const std::vector<std::int32_t> ids = demo().encode("\U0001F999");
  const std::vector<std::int32_t> tail(ids.end() - 4, ids.end());
  EXPECT_EQ(tail, (std::vector<std::int32_t>{3 + 0xF0, 3 + 0x9F, 3 + 0xA6, 3 + 0x99}));
  EXPECT_EQ(demo().decode(ids), "\U0001F999");
}

TEST(SentencePiece, EncodesNothingToNothing) {
  EXPECT_TRUE(demo().encode("").empty());
  EXPECT_EQ(demo().decode({}), "");
}

TEST(SentencePiece, KeepsSpacesAndLines) {
  for (const std::string text : {" ", "  ", " a", "  a  b ", "a\n b\n", "\n", "\t"}) {
    EXPECT_EQ(demo().decode(demo().encode(text)), text) << testing::PrintToString(text);
  }
}

TEST(SentencePiece, RandomTextsSurviveWholeAndStreamed) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    const std::string text = random_text(random, round % 60);
    const std::vector<std::int32_t> ids = demo().encode(text);
    ASSERT_EQ(demo().decode(ids), text) << "round " << round;
    StreamingDecoder decoder(demo(), false);
    std::string streamed;
    for (const std::int32_t id : ids) {
      const std::string characters = decoder.push(id);
      ASSERT_EQ(find_invalid_utf8(characters), -1) << "round " << round;
      streamed += characters;
    }
    ASSERT_EQ(streamed + decoder.finish(), text) << "round " << round;
  }
}

TEST(SentencePiece, RandomIdsGiveValidTextWholeAndStreamed) {
  std::mt19937 random(2);
  for (int round = 0; round < 2000; ++round) {
    // Three of four rounds dwell on the byte tokens, which rarely make characters.
    std::uniform_int_distribution<std::int32_t> draw(0, round % 4 == 0 ? demo().vocab() - 1 : 300);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(round % 50));
    for (std::int32_t& id : ids) id = draw(random);
    StreamingDecoder decoder(demo(), false);
    std::string streamed;
    for (const std::int32_t id : ids) {
      streamed += decoder.push(id);
      ASSERT_EQ(find_invalid_utf8(streamed), -1) << "round " << round;
    }
    streamed += decoder.finish();
    ASSERT_EQ(find_invalid_utf8(streamed), -1) << "round " << round;
    ASSERT_EQ(streamed, demo().decode(ids)) << "round " << round;
  }
}

TEST(SentencePiece, AContinuedTextKeepsItsSpace) {
  const std::vector<std::int32_t> ids = demo().encode("and so");
  StreamingDecoder decoder(demo(), true);
  std::string text;
  for (const std::int32_t id : ids) text += decoder.push(id);
  EXPECT_EQ(text, " and so");
}

TEST(SentencePiece, RefusesInvalidUtf8ByOffset) {
  const std::string message = refusal_of([] { (void)demo().encode("abc\xFFz"); });
  EXPECT_NE(message.find("0xff at byte offset 3"), std::string::npos) << message;
}

TEST(SentencePiece, RefusesIdsOutsideTheVocabulary) {
  for (const std::int32_t id : {-1, 4096}) {
    const std::string message = refusal_of([id] { (void)demo().token_bytes(id); });
    EXPECT_NE(message.find(std::to_string(id)), std::string::npos) << message;
    EXPECT_NE(message.find("0 to 4095"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace vesper
