#include "attention/config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

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

TEST(AttentionConfig, NamesAMissingFile) {
  EXPECT_THROW((void)parse_attention("nonexistent.json", 4), Error);
  EXPECT_THROW((void)parse_attention("/nonexistent/dense", 4), Error);
}

}  // namespace
}  // namespace vesper
