// Published tokenizers against the test vectors of llama.cpp: texts between lines of a mark, one line of ids for each
// text. They lie outside of the tree: VESPER_ASSETS names a folder with tokenizers/ and vectors/.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "tests/tokenizer/random_text.h"
#include "tests/tokenizer/small_tokenizers.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

// Copies `files` of an asset folder to one of their own, so that each format is met.
struct Published {
  const char* name;
  const char* folder;
  std::vector<std::pair<const char*, const char*>> files;  // (as published, as the folder shall have it)
  const char* vectors;
};

std::string assets() {
  const char* folder = std::getenv("VESPER_ASSETS");
  return folder == nullptr ? "" : folder;
}

std::vector<Published> published() {
  return {
      {"Llama2Json", "llama2", {{"tokenizer.json", "tokenizer.json"}}, "llama-spm"},
      {"Llama2Model", "llama2", {{"tokenizer.model", "tokenizer.model"}}, "llama-spm"},
      {"Llama3Tiktoken", "llama3", {{"tokenizer.model", "tokenizer.model"}}, "llama-bpe"},
      {"Qwen2",
       "qwen2.5",
       {{"vocab.json", "vocab.json"}, {"merges.txt", "merges.txt"}, {"tokenizer_config.json", "tokenizer_config.json"}},
       "qwen2"},
      {"Gpt2",
       "gpt-2",
       {{"vocab.json", "vocab.json"}, {"merges.txt", "merges.txt"}, {"tokenizer_config.json", "tokenizer_config.json"}},
       "gpt-2"},
      {"MistralV3", "mistral7b", {{"v3.model", "tokenizer.model"}}, nullptr}};
}

class PublishedTokenizer : public testing::TestWithParam<Published> {
 protected:
  // Null, with the test skipped, where the files are not at hand.
  std::unique_ptr<Tokenizer> load() {
    std::vector<std::string> missing;
    if (assets().empty()) {
      missing.push_back("VESPER_ASSETS, which would name a folder with tokenizers/ and vectors/");
    } else {
      for (const auto& [file, name] : GetParam().files) {
        const std::string path = assets() + "/tokenizers/" + GetParam().folder + "/" + file;
        if (!std::filesystem::exists(path)) {
          missing.push_back(path);
          continue;
        }
        std::filesystem::copy(path, folder_.path() + "/" + name);
        std::filesystem::permissions(folder_.path() + "/" + name, std::filesystem::perms::owner_all);
      }
    }
    if (!missing.empty()) {
      [&] { GTEST_SKIP() << "not at hand: " << missing[0]; }();
      return nullptr;
    }
    return load_tokenizer(folder_.path());
  }

  const ScratchFolder folder_;
};

std::string whole_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST_P(PublishedTokenizer, AgreesWithTheVectors) {
  if (GetParam().vectors == nullptr) GTEST_SKIP() << "there are no vectors for " << GetParam().folder;
  const std::unique_ptr<Tokenizer> tokenizer = load();
  if (tokenizer == nullptr) return;
  const std::string vectors = assets() + "/vectors/" + GetParam().vectors;
  std::string texts = whole_file(vectors + ".inp");
  std::istringstream lines(whole_file(vectors + ".out"));
  const std::string mark = "\n__ggml_vocab_test__\n";
  ASSERT_TRUE(texts.ends_with(mark));
  int compared = 0;
  while (!texts.empty()) {
    const std::size_t end = texts.find(mark);
    const std::string text = texts.substr(0, end);
    texts.erase(0, end + mark.size());
    std::string line;
    ASSERT_TRUE(std::getline(lines, line));
    std::istringstream numbers(line);
    const std::vector<std::int32_t> expected{std::istream_iterator<std::int32_t>(numbers), {}};
    EXPECT_EQ(tokenizer->encode(text), expected) << testing::PrintToString(text);
    EXPECT_EQ(tokenizer->decode(expected), text);
    ++compared;
  }
  EXPECT_GT(compared, 40);
}

TEST_P(PublishedTokenizer, RandomTextsSurviveWholeAndStreamed) {
  const std::unique_ptr<Tokenizer> tokenizer = load();
  if (tokenizer == nullptr) return;
  const bool composes = std::string(GetParam().folder) == "qwen2.5";  // it normalises, so only what is normal survives
  std::mt19937 random(1);
  for (int round = 0; round < 1000; ++round) {
    std::string text = random_text(random, round % 60);
    if (composes) text = to_nfc(text);
    const std::vector<std::int32_t> ids = tokenizer->encode(text);
    ASSERT_EQ(tokenizer->decode(ids), text) << "round " << round;
    StreamingDecoder decoder(*tokenizer, false);
    std::string streamed;
    for (const std::int32_t id : ids) {
      const std::string characters = decoder.push(id);
      ASSERT_EQ(find_invalid_utf8(characters), -1) << "round " << round;
      streamed += characters;
    }
    ASSERT_EQ(streamed + decoder.finish(), text) << "round " << round;
  }
}

TEST_P(PublishedTokenizer, ItsSpecialTokensAreFoundOnlyWhenAskedFor) {
  const std::unique_ptr<Tokenizer> tokenizer = load();
  if (tokenizer == nullptr) return;
  const std::string name = std::string(GetParam().folder) == "qwen2.5"  ? "<|im_end|>"
                           : std::string(GetParam().folder) == "llama3" ? "<|eot_id|>"
                                                                        : "</s>";
  const int id = tokenizer->id_of(name);
  ASSERT_GE(id, 0);
  const std::vector<std::int32_t> plain = tokenizer->encode("a " + name);
  EXPECT_EQ(std::count(plain.begin(), plain.end(), id), 0);
  EXPECT_EQ(tokenizer->decode(plain), "a " + name);
  const std::vector<std::int32_t> parsed = tokenizer->encode_with_special("a " + name);
  EXPECT_EQ(parsed.back(), id);
}

INSTANTIATE_TEST_SUITE_P(Assets, PublishedTokenizer, testing::ValuesIn(published()),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace vesper
