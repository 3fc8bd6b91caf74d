#include "attention/config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "attention/attention.h"
#include "engine/core/error.h"

namespace vesper {
namespace {

// Writes `text` to a file of its own and reads it for a model of four layers.
AttentionConfig read(const std::string& text) {
  const std::string path = testing::TempDir() + "attention_config_test.json";
  std::ofstream(path) << text;
  return parse_attention(path, 4);
}

std::string refusal(const std::string& text) {
  try {
    (void)read(text);
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput);
    return error.what();
  }
  return "";
}

void expect_refused(const std::string& text, const std::string& names) {
  const std::string message = refusal(text);
  EXPECT_NE(message.find(names), std::string::npos) << "for " << text << " the message is: " << message;
}

TEST(AttentionConfig, ShorthandCoversEveryLayer) {
  EXPECT_EQ(parse_attention("dense", 3).layers.size(), 3U);
  try {
    (void)parse_attention("quset", 3);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("\"quset\", expected one of: dense, quest"), std::string::npos)
        << error.what();
  }
}

TEST(AttentionConfig, ReadsRulesByRange) {
  EXPECT_EQ(read(R"({"attention": [{"layers": "all", "backend": "dense"}]})").layers.size(), 4U);
  EXPECT_EQ(read(R"({"attention": [{"layers": "0,1", "backend": "dense"}, {"layers": "2-", "backend": "dense"}]})")
                .layers.size(),
            4U);
  EXPECT_EQ(read(R"({"attention": [{"layers": "0-2,3", "backend": "dense"}]})").layers.size(), 4U);
}

TEST(AttentionConfig, RefusesWhatItDoesNotKnow) {
  expect_refused(R"({"attention": [{"layers": "all", "backend": "dens"}]})", "\"dens\"");
  expect_refused(R"({"attention": [{"layers": "all", "backend": "dense", "budget": 3}]})", "the key \"budget\"");
  expect_refused(R"({"attention": [{"layers": "0-2", "backend": "dense"}]})", "no rule for layer 3");
  expect_refused(R"({"attention": [{"layers": "0-4", "backend": "dense"}]})", "within 0-3");
  expect_refused(R"({"attention": [{"layers": "2-1", "backend": "dense"}]})", "\"2-1\"");
  expect_refused(R"({"attention": [{"layers": "", "backend": "dense"}]})", "\"layers\": \"\"");
  expect_refused(R"({"attention": [{"layers": "-", "backend": "dense"}]})", "\"-\"");
  expect_refused(R"({"attention": [{"layers": "1,", "backend": "dense"}]})", "\"1,\"");
  expect_refused(R"({"attention": [{"layers": 1, "backend": "dense"}]})", "expected a string");
  expect_refused(R"({"attention": [{"backend": "dense"}]})", "no \"layers\"");
  expect_refused(R"({"attention": [{"layers": "all"}]})", "no \"backend\"");
  expect_refused(R"({"attention": [3]})", "rule 1");
  expect_refused(R"({"attention": {}})", "a list of rules");
  expect_refused(R"({"attention": [], "more": 1})", "the key \"more\", expected one of: attention");
  expect_refused(R"([])", "one key \"attention\"");
  expect_refused(R"({"attention": [{"layers": "all", "layers": "0", "backend": "dense"}]})", "\"layers\" twice");
}

TEST(AttentionConfig, ReadsBoundsWhereBoundsAreRead) {
  const auto last = [](const std::string& spec) { return parse_attention(spec, 4).layers.back(); };
  EXPECT_EQ(last("quest:bounds=exact"), last("quest"));
  EXPECT_EQ(std::get<QuestConfig>(last("quest:bounds=int8").settings).page_score, PageScore::kMinMaxInt8);
  EXPECT_EQ(std::get<TwilightConfig>(last("twilight:bounds=int8").settings).page_score, PageScore::kMinMaxInt8);
  EXPECT_EQ(std::get<VAttentionConfig>(last("vattention:bounds=int8").settings).page_score, PageScore::kMinMaxInt8);
  EXPECT_EQ(describe(last("quest:bounds=int8")),
            "quest token_budget=2048 page_score=min_max bounds=int8 group=max sink_tokens=0 window_tokens=0");
  const auto expect_spec_refused = [&](const std::string& spec, const std::string& names) {
    try {
      (void)last(spec);
      ADD_FAILURE() << spec << " was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::kInput);
      EXPECT_NE(std::string(error.what()).find(names), std::string::npos) << error.what();
    }
  };
  expect_spec_refused("quest:bounds=int4", "expected one of: exact, int8");
  expect_spec_refused("quest:bounds=8", "expected one of: exact, int8");
  expect_spec_refused("quest:bounds=int8,page_score=mean_std", "\"page_score\": \"mean_std\"");
  expect_spec_refused("twilight:bounds=int8,base=dense", "\"base\": \"dense\"");
  expect_spec_refused("twilight:bounds=int8,page_score=mean_std", "\"page_score\": \"mean_std\"");
  expect_spec_refused("vattention:bounds=int8,top_k_by=oracle", "\"top_k_by\": \"oracle\"");
  expect_spec_refused("dense:bounds=int8", "the key \"bounds\"");
}

TEST(AttentionConfig, ReadsWhetherQuestsKernelsAreFused) {
  const auto last = [](const std::string& spec) { return parse_attention(spec, 4).layers.back(); };
  EXPECT_EQ(last("quest:kernels=fused"), last("quest"));
  EXPECT_EQ(std::get<QuestConfig>(last("quest:kernels=separate").settings).kernels, Kernels::kSeparate);
  EXPECT_EQ(describe(last("quest:kernels=separate")),
            "quest token_budget=2048 page_score=min_max bounds=exact group=max sink_tokens=0 window_tokens=0 "
            "kernels=separate");
}

// What each layer's backend makes the cache keep, over all arms that share it.
TEST(AttentionConfig, PlansTheBoundsThatArmsRead) {
  const std::vector<AttentionConfig> arms = {parse_attention("quest:bounds=int8", 3), parse_attention("vattention", 3)};
  const std::vector<SideTables> first = ModelAttention::side_tables({arms.data(), 1});
  const std::vector<SideTables> both = ModelAttention::side_tables(arms);
  EXPECT_EQ(first[0], SideTables{});
  EXPECT_EQ(first[2], SideTables{.int8_bounds = true});
  const SideTables either{.page_bounds = true, .int8_bounds = true};
  EXPECT_EQ(both[2], either);
  const KvShape shape{.layers = 1, .kv_heads = 32, .head_dim = 128, .page_tokens = 16, .dtype = DType::kBf16};
  EXPECT_EQ(shape.side_table_bytes(first[2]), 32 * (2 * 128 + 2 * 4 * 2));
  EXPECT_EQ(shape.side_table_bytes(both[2]) - shape.side_table_bytes(first[2]), 32 * 2 * 128 * 2);
}

TEST(AttentionConfig, NamesAMissingFile) {
  EXPECT_THROW((void)parse_attention("nonexistent.json", 4), Error);
  EXPECT_THROW((void)parse_attention("/nonexistent/dense", 4), Error);
}

}  // namespace
}  // namespace vesper
