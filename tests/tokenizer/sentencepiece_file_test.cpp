// Models that are broken, cut short or hostile: one refusal that names the file, nothing on stderr, no crash.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/core/error.h"
#include "tests/source_dir.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

constexpr int kUnknown = 2;
constexpr int kUserDefined = 4;

std::string varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7U) bytes += static_cast<char>(0x80U | (value & 0x7FU));
  return bytes + static_cast<char>(value);
}
std::string number_field(std::uint64_t number, std::uint64_t value) {
  return varint(number << 3U) + varint(value);
}
std::string bytes_field(std::uint64_t number, const std::string& bytes) {
  return varint(number << 3U | 2U) + varint(bytes.size()) + bytes;
}
std::string piece(const std::string& text, int type = 1) {
  return bytes_field(1, bytes_field(1, text) + number_field(3, static_cast<std::uint64_t>(type)));
}
const std::string kTrainerSpec = bytes_field(2, number_field(3, 2));  // BPE
std::string normalizer_spec(const std::string& rules) {
  return bytes_field(3, bytes_field(1, "test") + bytes_field(2, rules));
}
std::string model(const std::string& pieces, const std::string& rules = "") {
  return piece("<unk>", kUnknown) + pieces + kTrainerSpec + normalizer_spec(rules);
}
const std::string kLetters = piece("\u2581") + piece("a") + piece("b");

// Normalisation rules "A" -> "a" and "AB" -> "b", in the double array of darts-clone: a unit holds the child's byte,
// bit 8 where a rule ends, and in bits 10 and up what leads to its own children by XOR (bit 9: 256 times as far).
class Rules {
 public:
  Rules() : units_(512, kNoChild) {
    units_[0] = kFar;                        // children of the root at 256
    units_[256 ^ 'A'] = kFar | kRule | 'A';  // its children at 65
    units_[65] = kNoChild | 0;               // value: the replacement at byte 0
    units_[65 ^ 'B'] = kFar | kRule | 'B';   // its children at 259
    units_[259] = kNoChild | 2;              // value: the replacement at byte 2
  }
  std::uint32_t& operator[](std::size_t unit) { return units_[unit]; }
  std::string blob() const {
    const auto trie_bytes = static_cast<std::uint32_t>(units_.size() * 4);
    std::string bytes(4 + trie_bytes, '\0');
    std::memcpy(bytes.data(), &trie_bytes, 4);
    std::memcpy(bytes.data() + 4, units_.data(), trie_bytes);
    return bytes + std::string("a\0b\0", 4);
  }

  static constexpr std::uint32_t kNoChild = 0x80000000U;
  static constexpr std::uint32_t kFar = 1U << 10U | 0x200U;  // XOR 256
  static constexpr std::uint32_t kRule = 0x100U;

 private:
  std::vector<std::uint32_t> units_;
};

class SentencePieceFile : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }

  std::unique_ptr<Tokenizer> load(const std::string& bytes) {
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << bytes;
    return load_sentencepiece(path_, {});
  }

  // The message of the refusal; "" where the model loads, after it has been used.
  std::string refusal(const std::string& bytes) {
    testing::internal::CaptureStderr();
    std::string message;
    try {
      const std::unique_ptr<Tokenizer> tokenizer = load(bytes);
      for (const std::string text : {"It was the best of times.", "AB A\u00E9 \u0000\n\u4E2D", "aaab"}) {
        EXPECT_EQ(find_invalid_utf8(tokenizer->decode(tokenizer->encode(text))), -1);
      }
    } catch (const Error& error) {
      message = error.what();
      EXPECT_EQ(error.fault(), Fault::kInput) << message;
      EXPECT_NE(message.find(path_), std::string::npos) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    }
    EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
    return message;
  }

  void expect_refusal(const std::string& bytes, const std::string& reason) {
    const std::string message = refusal(bytes);
    EXPECT_NE(message.find(reason), std::string::npos) << "expected \"" << reason << "\" in \"" << message << "\"";
  }

  const std::string path_ = testing::TempDir() + "vesper_sentencepiece_file_test.model";
};

std::string demo_file() {
  std::ifstream file(source_dir() + "/configs/demo/tokenizer.model", std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST_F(SentencePieceFile, LoadsAModelMadeByHand) {
  const std::unique_ptr<Tokenizer> tokenizer = load(model(kLetters, Rules().blob()));
  EXPECT_EQ(tokenizer->encode("aABb"), (std::vector<std::int32_t>{1, 2, 3, 3}));
  EXPECT_EQ(tokenizer->encode("A B"), (std::vector<std::int32_t>{1, 2, 1, 0}));
  EXPECT_EQ(tokenizer->decode(std::vector<std::int32_t>{1, 2, 1, 3}), "a b");
  EXPECT_EQ(tokenizer->bos_id(), -1);
  EXPECT_EQ(tokenizer->eos_id(), -1);
}

TEST_F(SentencePieceFile, RefusesWhatIsNoModel) {
  expect_refusal("", "an end of file before the trainer's");
  expect_refusal("{\"version\": \"1.0\"}", "before byte");
  expect_refusal(std::string(100, '\0'), "field number 0");
  expect_refusal(std::string(100, '\xFF'), "a number of more than 64 bits");
}

TEST_F(SentencePieceFile, RefusesAFileCutAnywhere) {
  const std::string whole = demo_file();
  for (std::size_t bytes = 0; bytes < whole.size() - 20; bytes += bytes < 2000 ? 1 : 97) {
    ASSERT_NE(refusal(whole.substr(0, bytes)), "") << "cut at " << bytes;
  }
}

TEST_F(SentencePieceFile, RefusesPiecesThatAreNoText) {
  expect_refusal(model(piece("")), "a piece of 0 bytes");
  expect_refusal(model(piece(std::string(5000, 'a'))), "a piece of 5000 bytes");
  expect_refusal(model(piece("\xFF")), "a piece that is no text before byte");
  expect_refusal(model(piece(std::string("a\0b", 3))), "a piece that is no text before byte");
}

TEST_F(SentencePieceFile, PassesOnWhatTheLibraryRefuses) {
  expect_refusal(model(piece("a") + piece("a")), "a is already defined");
  expect_refusal(kLetters + kTrainerSpec + normalizer_spec(""), "unk is not defined");
  expect_refusal(model(piece("<0x41>", 6)), "byte_fallback");
}

TEST_F(SentencePieceFile, RefusesTooManyNestedSymbols) {
  std::string pieces = kLetters;
  for (std::size_t length = 2; length <= 65; ++length) pieces += piece(std::string(length, 'a'), kUserDefined);
  EXPECT_EQ(refusal(model(pieces)), "");
  pieces += piece(std::string(66, 'a'), kUserDefined);
  expect_refusal(model(pieces), "more than 64 user-defined pieces");
}

TEST_F(SentencePieceFile, RefusesRulesThatLeaveTheirMemory) {
  const std::string blob = Rules().blob();
  expect_refusal(model(kLetters, "ab"), "normalisation rules of 2 bytes");
  expect_refusal(model(kLetters, std::string(4, '\0') + "a"), "a normalisation trie of 0");
  expect_refusal(model(kLetters, blob.substr(0, blob.size() - 1)), "a normalisation trie of 2048");
  expect_refusal(model(kLetters, "\xFF\xFF\xFF\x7F" + blob.substr(4)), "a normalisation trie of 2147483647");
  Rules outside;
  outside[0] = 2U << 10U | 0x200U;
  expect_refusal(model(kLetters, outside.blob()), "leads outside itself");
  Rules beyond_the_replacements;
  beyond_the_replacements[65] = Rules::kNoChild | 4U;
  expect_refusal(model(kLetters, beyond_the_replacements.blob()), "leads outside itself");
  Rules loop;
  loop[256 ^ 'A'] = 65U << 10U | Rules::kRule | 'A';  // its children at 256, where it is one itself
  loop[256] = Rules::kNoChild;
  expect_refusal(model(kLetters, loop.blob()), "a normalisation rule of more than 256 bytes");
}

TEST_F(SentencePieceFile, SurvivesRandomDamage) {
  std::mt19937 random(3);
  int refused = 0;
  const auto damage = [&](std::string bytes, std::size_t begin, std::size_t end) {
    const int flips = std::uniform_int_distribution<int>(1, 4)(random);
    for (int i = 0; i < flips; ++i) {
      const std::size_t at = std::uniform_int_distribution<std::size_t>(begin, end - 1)(random);
      bytes[at] = static_cast<char>(random());
    }
    refused += refusal(bytes).empty() ? 0 : 1;
  };
  const std::string whole = demo_file();
  for (int round = 0; round < 300; ++round) damage(whole, 0, whole.size());
  const std::string small = model(kLetters, Rules().blob());
  for (int round = 0; round < 3000; ++round) damage(small, 0, small.size());
  // Damage to the few units that are in use.
  const std::size_t trie = small.size() - Rules().blob().size() + 4;
  for (int round = 0; round < 3000; ++round) {
    std::string bytes = small;
    for (const std::size_t unit : {0, 256 ^ 'A', 65, 65 ^ 'B', 259}) {
      if (random() % 2 == 0) bytes[trie + 4 * unit + random() % 4] = static_cast<char>(1U << random() % 8);
    }
    refused += refusal(bytes).empty() ? 0 : 1;
  }
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace vesper
