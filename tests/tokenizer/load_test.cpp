// Which of a folder's files is read, and what tokenizer_config.json and special_tokens_map.json add to it.
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "tests/source_dir.h"
#include "tests/tokenizer/small_tokenizers.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

using nlohmann::json;

class LoadTokenizer : public testing::Test {
 protected:
  std::unique_ptr<Tokenizer> load() const { return load_tokenizer(folder_.path()); }
  std::string refusal() const {
    return refusal_of([this] { (void)load(); });
  }
  void expect_refusal(const std::string& reason) const {
    const std::string message = refusal();
    EXPECT_NE(message.find(reason), std::string::npos) << "expected " << reason << " in: " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  void write_json() const { folder_.write("tokenizer.json", marked_json().dump()); }
  void write_model() const {
    std::filesystem::copy(source_dir() + "/configs/demo/tokenizer.model", folder_.path() + "/tokenizer.model",
                          std::filesystem::copy_options::overwrite_existing);
  }
  void write_vocab() const {
    const json document = byte_level_json();
    folder_.write("vocab.json", document["model"]["vocab"].dump());
    std::string merges = "#version: 0.2\n";
    for (const json& merge : document["model"]["merges"]) merges += merge.get<std::string>() + "\n";
    folder_.write("merges.txt", merges);
  }
  void write_config(const json& config) const { folder_.write("tokenizer_config.json", config.dump()); }

  const ScratchFolder folder_;
};

TEST_F(LoadTokenizer, ListsWhatItLookedFor) {
  EXPECT_FALSE(has_tokenizer(folder_.path()));
  expect_refusal(folder_.path());
  expect_refusal("tokenizer.json, tokenizer.model, or vocab.json with merges.txt");
  folder_.write("vocab.json", "{}");
  EXPECT_FALSE(has_tokenizer(folder_.path()));
  folder_.write("merges.txt", "");
  EXPECT_TRUE(has_tokenizer(folder_.path()));
}

TEST_F(LoadTokenizer, TakesTheFirstInAFixedOrderAndNamesTheOthers) {
  write_vocab();
  write_config({{"tokenizer_class", "GPT2Tokenizer"}});
  EXPECT_EQ(load()->description(), "byte-level BPE, " + folder_.path() + "/vocab.json, 263 pieces");
  write_model();
  EXPECT_EQ(load()->description(),
            "SentencePiece, " + folder_.path() + "/tokenizer.model, 4096 pieces (not read: vocab.json)");
  write_json();
  EXPECT_EQ(load()->description(), "SentencePiece-style BPE, " + folder_.path() +
                                       "/tokenizer.json, 14 pieces (not read: tokenizer.model, vocab.json)");
}

TEST_F(LoadTokenizer, TellsTiktokenFromSentencePieceByContent) {
  folder_.write("tokenizer.model", tiktoken_text());
  const std::unique_ptr<Tokenizer> tokenizer = load();
  EXPECT_EQ(tokenizer->description(), "tiktoken BPE, " + folder_.path() + "/tokenizer.model, 128256 pieces");
  EXPECT_EQ(tokenizer->bos_id(), 128000);
  EXPECT_EQ(tokenizer->eos_id(), 128001);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->id_of("<|eot_id|>"), 128009);
  EXPECT_EQ(tokenizer->id_of("<|reserved_special_token_4|>"), 128008);
  EXPECT_EQ(tokenizer->id_of("<|reserved_special_token_250|>"), 128255);
  EXPECT_EQ(tokenizer->id_of("<|reserved_special_token_251|>"), -1);
  folder_.write("tokenizer.model", "no model");
  expect_refusal("SentencePiece");
}

TEST_F(LoadTokenizer, TakesTiktokensSpecialTokensFromTheFolderWhereItListsThem) {
  folder_.write("tokenizer.model", tiktoken_text());
  json config = {{"bos_token", "<s>"}, {"eos_token", "<e>"}};
  config["added_tokens_decoder"] = {{"128000", {{"content", "<s>"}, {"special", true}}},
                                    {"128001", {{"content", "<e>"}, {"special", true}}}};
  write_config(config);
  const std::unique_ptr<Tokenizer> tokenizer = load();
  EXPECT_EQ(tokenizer->vocab(), 128002);
  EXPECT_EQ(tokenizer->eos_id(), 128001);
  config["added_tokens_decoder"]["128003"] = {{"content", "<f>"}, {"special", true}};
  write_config(config);
  expect_refusal("the id 128003 for the added token \"<f>\", expected the next free id, 128002");
}

TEST_F(LoadTokenizer, RefusesATiktokenVocabularyOfAnotherModel) {
  folder_.write("tokenizer.model", "IQ== 0\nIg== 1\n");
  expect_refusal("a tiktoken vocabulary of 2 pieces, expected 128000");
}

TEST_F(LoadTokenizer, SplitsVocabAndMergesByTheTokenizersClass) {
  write_vocab();
  expect_refusal("no tokenizer_class");
  write_config({{"tokenizer_class", "PreTrainedTokenizerFast"}});
  expect_refusal("\"PreTrainedTokenizerFast\", expected GPT2Tokenizer or Qwen2Tokenizer");
  write_config({{"tokenizer_class", "GPT2Tokenizer"}});
  EXPECT_EQ(load()->encode("e\u0301").size(), 3U);
  EXPECT_FALSE(load()->adds_bos());
  write_config({{"tokenizer_class", "Qwen2TokenizerFast"}});
  EXPECT_EQ(load()->decode(load()->encode("e\u0301")), "\u00E9");
}

TEST_F(LoadTokenizer, NamesOfTokensComeFromTheConfigThenTheMap) {
  write_json();
  EXPECT_EQ(load()->eos_id(), -1);
  folder_.write("special_tokens_map.json", R"({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})");
  EXPECT_EQ(load()->bos_id(), 1);
  EXPECT_EQ(load()->eos_id(), 2);
  write_config({{"eos_token", "<unk>"}, {"bos_token", nullptr}});
  EXPECT_EQ(load()->eos_id(), 0);
  EXPECT_EQ(load()->bos_id(), 1);
  write_config({{"eos_token", "<none>"}});
  expect_refusal("the eos_token \"<none>\", which is no token");
}

TEST_F(LoadTokenizer, TheConfigDecidesOnBosThenTheTemplate) {
  write_json();
  EXPECT_TRUE(load()->adds_bos());
  EXPECT_EQ(load()->bos_id(), 1);
  EXPECT_EQ(load()->encode_prompt("ab"), (std::vector<std::int32_t>{1, 11}));
  EXPECT_EQ(load()->encode("ab"), (std::vector<std::int32_t>{11}));
  write_config({{"add_bos_token", false}, {"bos_token", "<s>"}});
  EXPECT_FALSE(load()->adds_bos());
  EXPECT_EQ(load()->encode_prompt("ab"), (std::vector<std::int32_t>{11}));
  write_config({{"add_bos_token", true}, {"bos_token", "</s>"}});
  EXPECT_EQ(load()->encode_prompt("ab"), (std::vector<std::int32_t>{2, 11}));
  write_config({{"add_eos_token", true}});
  expect_refusal("add_eos_token true");
  write_config({{"bos_token", "</s>"}});
  expect_refusal("a template that puts the token 1 before the text, expected bos_token, 2");
}

TEST_F(LoadTokenizer, SentencePieceAddsBosUnlessToldOtherwise) {
  write_model();
  EXPECT_TRUE(load()->adds_bos());
  write_config({{"add_bos_token", false}});
  EXPECT_FALSE(load()->adds_bos());
  EXPECT_EQ(load()->bos_id(), 1);
}

TEST_F(LoadTokenizer, SentencePieceParsesSpecialTokensOnRequest) {
  write_model();
  json config = {{"added_tokens_decoder", {{"4096", {{"content", "<|im_end|>"}, {"special", true}}}}}};
  write_config(config);
  std::unique_ptr<Tokenizer> tokenizer = load();
  EXPECT_EQ(tokenizer->vocab(), 4097);
  EXPECT_EQ(tokenizer->id_of("<|im_end|>"), 4096);
  EXPECT_EQ(tokenizer->id_of("</s>"), 2);
  EXPECT_EQ(tokenizer->id_of("no such piece"), -1);
  EXPECT_EQ(tokenizer->token_bytes(4096), "");
  const std::int32_t the = tokenizer->encode("the")[0];
  EXPECT_EQ(tokenizer->encode_with_special("<s>the</s>the<|im_end|>"),
            (std::vector<std::int32_t>{1, the, 2, the, 4096}));
  const TextRange user = {6, 10};
  const std::vector<std::int32_t> plain = tokenizer->encode_with_special("<s>the</s><|im_end|>", {&user, 1});
  EXPECT_EQ(plain.front(), 1);
  EXPECT_EQ(plain.back(), 4096);
  EXPECT_EQ(tokenizer->decode(plain), "the</s>");
  // Behind a token, the space of the encoder is a habit of older models.
  config["legacy"] = false;
  write_config(config);
  tokenizer = load();
  const std::vector<std::int32_t> glued = tokenizer->encode_with_special("the</s>the");
  EXPECT_EQ(glued[0], the);
  EXPECT_EQ(glued[1], 2);
  EXPECT_NE(glued[2], the);
  StreamingDecoder decoder(*tokenizer, true);
  std::string text;
  for (const std::int32_t id : std::span(glued).subspan(2)) text += decoder.push(id);
  EXPECT_EQ(text, "the");
}

TEST_F(LoadTokenizer, RefusesBrokenSettings) {
  write_json();
  folder_.write("tokenizer_config.json", "[]");
  expect_refusal("JSON that is no object");
  write_config({{"add_bos_token", "yes"}});
  expect_refusal("for add_bos_token");
  for (const char* id : {"-1", "x", "99999999999", "5000000"}) {
    write_config({{"added_tokens_decoder", {{id, {{"content", "<x>"}}}}}});
    expect_refusal(std::string("the id \"") + id + "\"");
  }
  write_config({{"added_tokens_decoder", {{"3", {{"content", "<x>"}}}}}});
  expect_refusal("the id 3 for the added token \"<x>\"");
  write_config({{"added_tokens_decoder", {{"2", {{"content", "<s>"}}}}}});
  expect_refusal("the id 2 for the added token \"<s>\", expected 1");
  write_config({{"added_tokens_decoder", {{"14", {{"content", ""}}}}}});
  expect_refusal("an added token of 0 bytes");
  write_config({{"added_tokens_decoder", {{"14", {{"content", "<x>"}, {"single_word", true}}}}}});
  expect_refusal("single_word of the added token \"<x>\"");
}

}  // namespace
}  // namespace vesper
