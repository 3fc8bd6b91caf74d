#include "engine/core/json.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "engine/core/error.h"
#include "engine/core/mapped_file.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

std::string refusal(std::string_view text) {
  try {
    (void)parse_json(text, "x.json");
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput);
    return error.what();
  }
  return "";
}

TEST(Json, ParsesADocument) {
  EXPECT_EQ(parse_json(R"({"a": [1, {"b": 2, "a": 3}]})", "x.json")["a"][1]["a"], 3);
}

TEST(Json, RefusesADuplicateKey) {
  EXPECT_NE(refusal(R"({"a": 1, "b": {"c": 1, "c": 2}})").find("\"c\" twice"), std::string::npos);
  EXPECT_EQ(refusal(R"({"a": {"c": 1}, "b": {"c": 2}})"), "");
}

TEST(Json, RefusesTenThousandLevels) {
  EXPECT_NE(refusal(std::string(10000, '[') + std::string(10000, ']')).find("nested deeper"), std::string::npos);
  std::string objects;
  for (int i = 0; i < 10000; ++i) objects += "{\"a\":";
  EXPECT_NE(refusal(objects).find("nested deeper"), std::string::npos);
}

TEST(Json, RefusesWhatIsNotOneUtf8Document) {
  EXPECT_NE(refusal("{\"a\": \"\xff\"}"), "");
  EXPECT_NE(refusal("{} {}"), "");
  EXPECT_NE(refusal("{\"a\": 1"), "");
  EXPECT_NE(refusal(""), "");
}

TEST(Json, NamesAMissingFile) {
  try {
    (void)read_json_file("/nonexistent/config.json");
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("/nonexistent/config.json"), std::string::npos);
  }
}

TEST(Json, NamesWhatIsNoFile) {
  const auto refusal_of = [](const std::string& path) -> std::string {
    try {
      (void)read_json_file(path);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal_of("/").find("reading /: found a folder"), 0U);
  const TempFolder folder;
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_NE(refusal_of(folder / "pipe").find("no regular file"), std::string::npos);  // and does not wait
  EXPECT_THROW(MappedFile(folder / "pipe"), Error);
}

TEST(Json, QuotesNamesSafely) {
  EXPECT_EQ(in_quotes("model.norm.weight"), "\"model.norm.weight\"");
  EXPECT_EQ(in_quotes("a\x1b[2J\n\"b"), "\"a\\u001b[2J\\n\\\"b\"");
  EXPECT_EQ(in_quotes("\xff"), "\"\\ufffd\"");
  EXPECT_EQ(in_quotes(std::string(1000, 'x')), "\"" + std::string(100, 'x') + "...\"");
}

}  // namespace
}  // namespace vesper
