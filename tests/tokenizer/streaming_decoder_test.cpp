#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

// Ids 0 to 255 are bytes, 256 is a control token, 257 is " a" with the encoder's own space in front.
class ByteTokenizer final : public Tokenizer {
 public:
  std::string token_bytes(std::int32_t id) const override {
    if (id == 256) return "";
    return id == 257 ? " a" : std::string(1, static_cast<char>(id));
  }
  std::string first_token_bytes(std::int32_t id) const override { return id == 257 ? "a" : token_bytes(id); }
  int vocab() const override { return 258; }
  int bos_id() const override { return 256; }
  int eos_id() const override { return -1; }
  int id_of(std::string_view /*token*/) const override { return -1; }
  bool adds_bos() const override { return false; }
  std::string description() const override { return "bytes"; }

 protected:
  std::vector<std::int32_t> encode_checked(std::string_view /*text*/,
                                           std::span<const TextRange> /*plain*/) const override {
    return {};
  }
};

const ByteTokenizer kBytes;

std::string streamed(const std::vector<std::int32_t>& ids, bool continues = false) {
  StreamingDecoder decoder(kBytes, continues);
  std::string text;
  for (const std::int32_t id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

TEST(StreamingDecoder, HoldsBackUnfinishedCharacters) {
  StreamingDecoder decoder(kBytes, false);
  EXPECT_EQ(decoder.push(0xF0), "");
  EXPECT_EQ(decoder.push(0x9F), "");
  EXPECT_EQ(decoder.push(0xA6), "");
  EXPECT_EQ(decoder.push(0x99), "\xF0\x9F\xA6\x99");
  EXPECT_EQ(decoder.push('a'), "a");
  EXPECT_EQ(decoder.finish(), "");
}

TEST(StreamingDecoder, GivesOutTheReplacementAsSoonAsNoCharacterCanFollow) {
  StreamingDecoder decoder(kBytes, false);
  EXPECT_EQ(decoder.push(0xFF), "\uFFFD");
  EXPECT_EQ(decoder.push(0xE2), "");
  EXPECT_EQ(decoder.push('('), "\uFFFD(");
  EXPECT_EQ(decoder.push(0xED), "");
  EXPECT_EQ(decoder.push(0xA0), "\uFFFD\uFFFD");  // would be a surrogate
  EXPECT_EQ(decoder.push(0xE2), "");
  EXPECT_EQ(decoder.push(0x82), "");
  EXPECT_EQ(decoder.push(0xC3), "\uFFFD");  // C3 itself may still become a character
  EXPECT_EQ(decoder.push(0xA9), "\u00E9");
}

// The Unicode standard 15.0, tables 3-8 to 3-11.
TEST(StreamingDecoder, ReplacesEachMaximalSubpartOnce) {
  const auto text = [](std::string_view bytes) {
    std::vector<std::int32_t> ids;
    for (const char c : bytes) ids.push_back(static_cast<unsigned char>(c));
    return streamed(ids);
  };
  EXPECT_EQ(text("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"), "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(text("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"), "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(text("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"), "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA\uFFFD\uFFFDB");
  EXPECT_EQ(text("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), "\uFFFD\uFFFD\uFFFD\uFFFDA");
}

TEST(StreamingDecoder, EndsAnUnfinishedCharacterWithOneReplacement) {
  EXPECT_EQ(streamed({'a', 0xF0, 0x9F, 0xA6}), "a\uFFFD");
  EXPECT_EQ(streamed({}), "");
}

TEST(StreamingDecoder, TakesTheEncodersSpaceOffTheBeginningOnly) {
  EXPECT_EQ(streamed({257, 257}), "a a");
  EXPECT_EQ(streamed({256, 257, 256, 257}), "a a");  // control tokens leave the text at its start
  EXPECT_EQ(streamed({'x', 257}), "x a");
  EXPECT_EQ(streamed({0xC3, 257}), "\uFFFD a");
  EXPECT_EQ(streamed({257, 257}, /*continues=*/true), " a a");
}

TEST(StreamingDecoder, IdsOfAPaddedVocabularyStandForNothing) {
  EXPECT_EQ(streamed({'a', 258, 0xC3, 1000000, 0xA9}), "a\u00E9");
}

TEST(Decode, IsTheStreamToItsEnd) {
  const std::vector<std::int32_t> ids = {256, 257, 0xE2, 0x82, 0xAC, 0xC3};
  EXPECT_EQ(kBytes.decode(ids), "a\u20AC\uFFFD");
}

}  // namespace
}  // namespace vesper
