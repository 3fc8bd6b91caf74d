// vesper tokenize: text to ids to text, byte for byte.
#include <array>

#include "tests/apps/run_vesper.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

std::string ids_of(const std::string& text) {
  const RunResult result = run_well({"tokenize", "--model", demo_model(), "--text", text});
  EXPECT_EQ(result.err, "");
  EXPECT_TRUE(result.out.ends_with('\n')) << result.out;
  EXPECT_EQ(result.out.find('\n'), result.out.size() - 1) << "more than one line: " << result.out;
  return result.out.substr(0, result.out.size() - 1);
}

TEST(Tokenize, IdsDecodeToTheTextTheyCameFrom) {
  const std::array<std::string, 6> texts = {
      "It was a dark and stormy night.",
      "two\nlines\tand a tab",
      "na\xC3\xAFve \xE2\x82\xAC 5, \xF0\x9F\x8C\x99",  // naive with diaeresis, euro, moon
      "--help",
      "[a, b]",
      "{\"x\": \"%d\\n\"}"};
  for (const std::string& text : texts) {
    const std::string ids = ids_of(text);
    EXPECT_EQ(ids.find_first_not_of("0123456789 "), std::string::npos) << ids;
    const RunResult decoded = run_well({"tokenize", "--model", demo_model(), "--decode", ids});
    EXPECT_EQ(decoded.out, text) << "no newline is added";
    EXPECT_EQ(decoded.err, "");
  }
}

TEST(Tokenize, BosComesFirstWhenAskedFor) {
  const RunResult result = run_well({"tokenize", "--model", demo_model(), "--text", "night", "--bos"});
  EXPECT_EQ(result.out, "1 " + ids_of("night") + "\n");
  EXPECT_EQ(run_well({"tokenize", "--model", demo_model(), "--text", "", "--bos"}).out, "1\n");
  EXPECT_EQ(run_well({"tokenize", "--model", demo_model(), "--text", ""}).out, "\n");
}

TEST(Tokenize, StdinAndFileGiveTheSameIds) {
  const std::string text = "A long night.\nAnd a day\n";
  const std::string ids = ids_of(text);
  EXPECT_EQ(run_well({"tokenize", "--model", demo_model()}, {.input = text}).out, ids + "\n");
  const TempFolder folder;
  write_file(folder / "text", text);
  EXPECT_EQ(run_well({"tokenize", "--model", demo_model(), "--file", folder / "text"}).out, ids + "\n");
}

TEST(Tokenize, EachLineOfAJsonlFileGivesALineOfIds) {
  const TempFolder folder;
  write_file(folder / "texts.jsonl", "\"night\"\n\"\"\n\"two\\nlines \\u20ac\"\n");
  EXPECT_EQ(run_well({"tokenize", "--model", demo_model(), "--jsonl", folder / "texts.jsonl"}).out,
            ids_of("night") + "\n\n" + ids_of("two\nlines \xE2\x82\xAC") + "\n");
  write_file(folder / "texts.jsonl", "\"night\"\n3\n");
  const std::string message = refused({"tokenize", "--model", demo_model(), "--jsonl", folder / "texts.jsonl"});
  EXPECT_NE(message.find("line 2"), std::string::npos) << message;
}

TEST(Tokenize, NamesOfSpecialTokensAreIdsOnRequest) {
  EXPECT_EQ(run_well({"tokenize", "--model", demo_model(), "--special", "--text", "<s>night</s>"}).out,
            "1 " + ids_of("night") + " 2\n");
  const RunResult decoded = run_well({"tokenize", "--model", demo_model(), "--decode", ids_of("<s>night</s>")});
  EXPECT_EQ(decoded.out, "<s>night</s>");
}

TEST(Tokenize, NeedsOnlyTheTokenizersFile) {
  const TempFolder folder;
  std::filesystem::copy(demo_model() + "/tokenizer.model", folder / "tokenizer.model");
  EXPECT_EQ(run_well({"tokenize", "--model", folder.path(), "--text", "night"}).out, ids_of("night") + "\n");
}

}  // namespace
}  // namespace vesper
