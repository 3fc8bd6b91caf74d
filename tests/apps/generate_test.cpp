// vesper generate: text on stdout and nothing else, figures on stderr, JSON documents, reproducible draws.
#include <array>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>

#include "tests/apps/run_vesper.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

const std::string kPrompt = "It was a dark and stormy night, and the old house upon the moor";

std::vector<std::string> generate(const std::string& model, const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {"generate", "--model", model, "--device", "cpu"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

Json document_of(const RunResult& result) {
  return Json::parse(result.out, nullptr, /*allow_exceptions=*/false);
}

// The document of a greedy or drawn answer of 24 tokens to kPrompt.
Json answer(std::vector<std::string> more) {
  more.insert(more.end(), {"--prompt", kPrompt, "--max-tokens", "24", "--json"});
  return document_of(run_well(generate(demo_model(), more)));
}

void expect_figures(const Json& document, int prompt_tokens, int tokens) {
  ASSERT_TRUE(document.is_object()) << document;
  EXPECT_EQ(document.at("prompt_tokens"), prompt_tokens);
  EXPECT_EQ(document.at("ids").size(), static_cast<std::size_t>(tokens));
  const Json& timings = document.at("timings");
  EXPECT_EQ(timings.at("tokens"), tokens);
  for (const char* name : {"ttft_ms", "prefill_tokens_per_s", "tpot_mean_ms", "tpot_p50_ms", "tpot_p99_ms",
                           "bytes_per_token", "gbytes_per_s"}) {
    EXPECT_GT(timings.at(name).get<double>(), 0.0) << name;
  }
  EXPECT_LE(timings.at("tpot_p50_ms").get<double>(), timings.at("tpot_p99_ms").get<double>());
  EXPECT_GT(document.at("peak_memory_bytes").get<std::int64_t>(), 1000000);
}

// The two lines of figures, as docs/cli.md gives them.
void expect_statistics(const std::string& err, const std::string& finish) {
  const std::regex lines("prompt \\d+ tokens \\| TTFT [\\d.]+ ms \\| prefill \\d+ tokens/s\n\\d+ tokens \\(" + finish +
                         "\\) \\| TPOT [\\d.]+ ms \\(p50 [\\d.]+, p99 [\\d.]+\\) \\| [\\d.]+ [KMG]?B read a token, "
                         "[\\d.]+ GB/s \\| peak memory [\\d.]+ [KMG]B\n");
  EXPECT_TRUE(std::regex_search(err, lines)) << err;
}

TEST(Generate, TextGoesToStdoutAndFiguresToStderr) {
  const Json document = answer({});
  expect_figures(document, document.at("prompt_tokens"), 24);
  EXPECT_EQ(document.at("finish_reason"), "length");
  const auto text = document.at("text").get<std::string>();
  EXPECT_FALSE(text.empty());

  const RunResult streamed = run_well(generate(demo_model(), {"--prompt", kPrompt, "--max-tokens", "24"}));
  EXPECT_EQ(streamed.out, text + "\n");
  expect_statistics(streamed.err, "length");
  EXPECT_EQ(streamed.err.find(text), std::string::npos);

  const RunResult quiet =
      run_well(generate(demo_model(), {"--prompt", kPrompt, "--max-tokens", "24", "--log-level", "warn"}));
  EXPECT_EQ(quiet.out, streamed.out);
  EXPECT_TRUE(quiet.err.starts_with("prompt ")) << quiet.err;
}

TEST(Generate, EverySourceOfAPromptGivesTheSameText) {
  const auto text = answer({}).at("text").get<std::string>();
  const std::vector<std::string> arguments = generate(demo_model(), {"--max-tokens", "24"});
  EXPECT_EQ(run_well(arguments, {.input = kPrompt}).out, text + "\n");
  const TempFolder folder;
  write_file(folder / "prompt", kPrompt);
  EXPECT_EQ(run_well(generate(demo_model(), {"--max-tokens", "24", "--prompt-file", folder / "prompt"})).out,
            text + "\n");
  const std::string ids = run_well({"tokenize", "--model", demo_model(), "--text", kPrompt, "--bos"}).out;
  const RunResult from_ids = run_well(generate(demo_model(), {"--max-tokens", "24", "--ids", ids}));
  const Json expected_ids = answer({}).at("ids");
  std::string expected;
  for (const Json& id : expected_ids) expected += id.dump() + ' ';
  expected.back() = '\n';
  EXPECT_EQ(from_ids.out, expected);
  EXPECT_EQ(run_well({"tokenize", "--model", demo_model(), "--decode", ids + from_ids.out}).out, kPrompt + text);
}

TEST(Generate, AnEmptyPromptStartsFromBos) {
  const auto empty = document_of(run_well(generate(demo_model(), {"--prompt", "", "--max-tokens", "8", "--json"})));
  EXPECT_EQ(empty.at("prompt_tokens"), 1);
  const auto bos = document_of(run_well(generate(demo_model(), {"--ids", "1", "--max-tokens", "8", "--json"})));
  EXPECT_EQ(empty.at("ids"), bos.at("ids"));
  EXPECT_EQ(document_of(run_well(generate(demo_model(), {"--max-tokens", "8", "--json"}))).at("ids"), bos.at("ids"))
      << "an empty stdin";
}

TEST(Generate, OneTokenHasNoTimePerToken) {
  const RunResult result = run_well(generate(demo_model(), {"--prompt", kPrompt, "--max-tokens", "1"}));
  EXPECT_NE(result.err.find("\n1 token (length) | peak memory"), std::string::npos) << result.err;
  const Json document =
      document_of(run_well(generate(demo_model(), {"--prompt", kPrompt, "--max-tokens", "1", "--json"})));
  EXPECT_EQ(document.at("ids"), Json::array({answer({}).at("ids")[0]}));
  EXPECT_EQ(document.at("timings").at("tpot_mean_ms"), 0.0);
}

TEST(Generate, GreedyIdsAreTheSameByChunksPagesAndDecode) {
  const Json ids = answer({}).at("ids");
  EXPECT_EQ(answer({"--prefill-chunk", "3"}).at("ids"), ids);
  EXPECT_EQ(answer({"--page-tokens", "64"}).at("ids"), ids);
  EXPECT_EQ(answer({"--decode-last", "5"}).at("ids"), ids);
  EXPECT_EQ(answer({"--decode-last", "100000"}).at("ids"), ids);
  EXPECT_EQ(answer({"--max-context", "64"}).at("ids"), ids);
}

TEST(Generate, DrawsFollowTheSeed) {
  const Json first = answer({"--temperature", "0.9", "--top-p", "0.95", "--top-k", "50", "--seed", "7"}).at("ids");
  EXPECT_EQ(answer({"--temperature", "0.9", "--top-p", "0.95", "--top-k", "50", "--seed", "7"}).at("ids"), first);
  EXPECT_NE(answer({"--temperature", "0.9", "--top-p", "0.95", "--top-k", "50", "--seed", "8"}).at("ids"), first);
  EXPECT_NE(answer({}).at("ids"), first);
  EXPECT_EQ(answer({"--temperature", "5", "--top-k", "1", "--seed", "9"}).at("ids"), answer({}).at("ids"));
}

TEST(Generate, EndsBeforeAStopText) {
  const auto text = answer({}).at("text").get<std::string>();
  ASSERT_GT(text.size(), 20U);
  const std::string stop = text.substr(10, 5);
  const std::string expected = text.substr(0, text.find(stop));
  const Json stopped = answer({"--stop", "[no, such]", "--stop", stop});
  EXPECT_EQ(stopped.at("text"), expected);
  EXPECT_EQ(stopped.at("finish_reason"), "stop");
  const RunResult streamed =
      run_well(generate(demo_model(), {"--prompt", kPrompt, "--max-tokens", "24", "--stop", stop}));
  EXPECT_EQ(streamed.out, expected + "\n");
  expect_statistics(streamed.err, "stop");
}

TEST(Generate, ABatchPrintsALineForEachPromptAsItFinishes) {
  const TempFolder folder;
  const std::vector<std::string> prompts = {kPrompt, "", "The ghost of \"Mr. X\"\n", "A"};
  std::string lines;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    lines += (i % 2 == 0 ? Json(prompts[i]) : Json{{"prompt", prompts[i]}}).dump() + (i == 1 ? "\n\n" : "\n");
  }
  write_file(folder / "prompts.jsonl", lines);
  const std::vector<std::string> batch = generate(
      demo_model(), {"--prompts-jsonl", folder / "prompts.jsonl", "--max-tokens", "24", "--max-context", "128"});

  std::vector<std::string> with_json = batch;
  with_json.emplace_back("--json");
  const Json all = document_of(run_well(with_json));
  ASSERT_TRUE(all.is_array());
  ASSERT_EQ(all.size(), prompts.size());
  EXPECT_EQ(all[0].at("ids"), answer({}).at("ids")) << "a batch changes no answer";
  EXPECT_EQ(all[1].at("prompt_tokens"), 1);

  const RunResult result = run_well(batch);
  EXPECT_TRUE(std::regex_search(
      result.err, std::regex("4 prompts \\| \\d+ tokens in [\\d.]+ s, [\\d.]+ tokens/s \\| peak memory [\\d.]+ MB\n$")))
      << result.err;
  std::istringstream out(result.out);
  std::size_t seen = 0;
  for (std::string line; std::getline(out, line); ++seen) {
    const Json document = Json::parse(line, nullptr, false);
    ASSERT_TRUE(document.is_object()) << line;
    EXPECT_EQ(document.at("text"), all.at(document.at("prompt").get<std::size_t>()).at("text"));
    expect_figures(document, document.at("prompt_tokens"), static_cast<int>(document.at("ids").size()));
  }
  EXPECT_EQ(seen, prompts.size());
}

TEST(Generate, AFileOfOnePromptIsABatchToo) {
  const TempFolder folder;
  write_file(folder / "prompts.jsonl", Json(kPrompt).dump());
  const std::vector<std::string> batch =
      generate(demo_model(), {"--prompts-jsonl", folder / "prompts.jsonl", "--max-tokens", "24"});
  EXPECT_EQ(document_of(run_well(batch)).at("prompt"), 0);
  std::vector<std::string> with_json = batch;
  with_json.emplace_back("--json");
  const Json all = document_of(run_well(with_json));
  ASSERT_TRUE(all.is_array() && all.size() == 1) << all;
  EXPECT_EQ(all[0].at("text"), answer({}).at("text"));
}

TEST(Generate, SyntheticModelsAnswerIdsWithIds) {
  const std::vector<std::string> arguments =
      generate("synthetic:tiny", {"--random-ids", "20", "--max-tokens", "6", "--ignore-eos"});
  const RunResult result = run_well(arguments);
  EXPECT_TRUE(std::regex_match(result.out, std::regex("(\\d+ ){5}\\d+\n"))) << result.out;
  EXPECT_NE(result.err.find("prompt 20 tokens"), std::string::npos) << result.err;
  EXPECT_EQ(run_well(arguments).out, result.out);
  std::vector<std::string> other = arguments;
  other.insert(other.end(), {"--seed", "3"});
  EXPECT_NE(run_well(other).out, result.out);
  EXPECT_EQ(run_well(generate("synthetic:tiny", {"--ids", "1 2 3", "--max-tokens", "1"})).exit_code, 0);
}

TEST(Generate, CtrlCEndsCleanly) {
  const std::vector<std::string> arguments =
      generate(demo_model(), {"--prompt", kPrompt, "--max-tokens", "15000", "--ignore-eos"});
  const RunResult result = run_well(arguments, {.interrupt_after = 40});
  EXPECT_GE(result.out.size(), 40U);
  EXPECT_TRUE(result.out.ends_with('\n'));
  expect_statistics(result.err, "interrupted");
  const RunResult begun = run_well(generate(demo_model(), {"--prompt", kPrompt, "--max-tokens", "8"}));
  EXPECT_TRUE(result.out.starts_with(begun.out.substr(0, begun.out.size() - 1))) << result.out;
}

TEST(Generate, TinyStoriesFromIds) {
  const char* assets = std::getenv("VESPER_ASSETS");
  if (assets == nullptr || *assets == '\0') {
    GTEST_SKIP() << "VESPER_ASSETS is not set: a folder with models/TinyStories-656K-bf16";
  }
  const RunResult result = run_well(generate(std::string(assets) + "/models/TinyStories-656K-bf16",
                                             {"--ids", "1", "--temperature", "0", "--max-tokens", "16"}));
  EXPECT_TRUE(result.out.starts_with("147 201 282 215 286 598 1662 356 499 826 ")) << result.out;
}

// Its folder has a tokenizer.json and no other vocabulary.
TEST(Generate, TinyStoriesFromItsOwnTokenizer) {
  const char* assets = std::getenv("VESPER_ASSETS");
  if (assets == nullptr || *assets == '\0') {
    GTEST_SKIP() << "VESPER_ASSETS is not set: a folder with models/TinyStories-656K-bf16";
  }
  const std::string model = std::string(assets) + "/models/TinyStories-656K-bf16";
  const RunResult result = run_well(generate(model, {"--prompt", "", "--temperature", "0", "--max-tokens", "40"}));
  EXPECT_TRUE(
      result.out.starts_with("Once upon a time, there was a little girl named Lily. "
                             "She had a toy car that she loved very much."))
      << result.out;
  // As `tokenizers` 0.23.3 encodes it, without BOS.
  EXPECT_EQ(run_well({"tokenize", "--model", model, "--text", "Once upon a time, there was a little girl"}).out,
            "80 147 201 282 215 286 1890\n");
}

}  // namespace
}  // namespace vesper
