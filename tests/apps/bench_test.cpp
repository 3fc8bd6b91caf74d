// vesper bench through the binary: its columns, what it saves, what it refuses.
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/apps/run_vesper.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

std::vector<std::string> bench(const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {"bench",        "--model", "synthetic:tiny", "--device", "cpu",
                                        "--max-tokens", "2",       "--repeats",      "2"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

std::vector<std::string> kernels(const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {"bench", "--model", "synthetic:tiny", "--device", "cpu", "--kernels"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string first_line(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

constexpr const char* kHead =
    "engine,model,device,weights,fill,attention,context,batch,max_tokens,repeats,ttft_ms,prefill_tflop_per_s,prefill_"
    "share,"
    "tpot_ms,tpot_p50_ms,tpot_p99_ms,device_ms,device_p50_ms,device_p99_ms,tokens_per_s,tokens_per_s_sd,"
    "weight_bytes,kv_bytes,metadata_bytes,gb_per_s,roof_gb_per_s,roof_share,attention_us,"
    "kept_tokens,kept_tokens_p99,kept_mass,sigma,speedup,speedup_low,speedup_high,ceiling,peak_memory_bytes";

TEST(BenchCommand, JsonCsvAndSavedFilesHaveTheSameRows) {
  const TempFolder folder;
  const RunResult run = run_well(bench({"--context", "64,128", "--batch", "2", "--attention", "dense",
                                        "quest:token_budget=32", "--json", "--save", folder / "run.csv"}));
  const Json document = Json::parse(run.out);
  ASSERT_EQ(document.at("rows").size(), 4U);
  EXPECT_EQ(document.at("baseline"), "dense");
  EXPECT_GT(document.at("roof").at("read_gb_per_s").get<double>(), 0.0);
  EXPECT_GT(document.at("roof").at("matrix_tflop_per_s").get<double>(), 0.0);
  EXPECT_TRUE(document.at("clocks").at("before").is_null());
  const Json& quest = document.at("rows")[3];
  EXPECT_EQ(quest.at("attention"), "quest:token_budget=32");
  EXPECT_EQ(quest.at("context"), 128);
  EXPECT_EQ(quest.at("fill"), "prefill");
  EXPECT_GT(quest.at("ttft_ms").get<double>(), 0.0);
  EXPECT_NEAR(
      quest.at("prefill_share").get<double>(),
      quest.at("prefill_tflop_per_s").get<double>() / document.at("roof").at("matrix_tflop_per_s").get<double>(), 1e-9);
  EXPECT_GT(quest.at("tpot_ms").get<double>(), quest.at("device_ms").get<double>());
  EXPECT_DOUBLE_EQ(quest.at("kept_tokens").get<double>(), 31.5);  // two pages, the newest with 15 and 16 tokens
  EXPECT_TRUE(quest.at("roof_share").is_null());                  // a tiny model's bytes never leave the cache
  EXPECT_GT(quest.at("ceiling").get<double>(), 1.0);

  const std::string csv = text_of(folder / "run.csv");
  EXPECT_EQ(first_line(csv), kHead);
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 5);
  for (const auto& [name, value] : quest.items()) {
    if (name == "sigma_range") continue;
    EXPECT_NE(first_line(csv).find(name), std::string::npos) << name;
  }
}

TEST(BenchCommand, MarkdownNamesScoresRoofAndDevice) {
  const std::string text = run_well(bench({"--context", "128", "--fill", "synthetic", "--sigma", "1:3"})).out;
  for (const char* part : {"| bf16 | dense | 128 | 1 | - |", "Keys and values are drawn", ": sigma ",
                           "Roof, probed in this run: reads ", "On a CPU sparsity is shown, not speed"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << '\n' << text;
  }
}

TEST(BenchCommand, WeightFormatsAreMeasuredOneAfterTheOther) {
  const Json rows =
      Json::parse(run_well(bench({"--context", "64", "--weights", "stored", "int4", "--json"})).out).at("rows");
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0].at("weights"), "bf16");
  EXPECT_EQ(rows[1].at("weights"), "int4");
  EXPECT_LT(rows[1].at("weight_bytes").get<double>(), 0.5 * rows[0].at("weight_bytes").get<double>());
  EXPECT_EQ(rows[1].at("speedup"), 1.0);
}

TEST(BenchCommand, KernelsAreCheckedAgainstTheCpu) {
  const Json document = Json::parse(run_well(kernels({"--context", "1k", "--json"})).out);
  std::vector<std::string> stages;
  for (const Json& row : document.at("kernels")) {
    stages.push_back(row.at("stage"));
    EXPECT_TRUE(row.at("checked").get<std::string>().starts_with("CPU, ")) << row.dump();
    EXPECT_GT(row.at("us").get<double>(), 0.0);
    EXPECT_GT(row.at("bound_us").get<double>(), 0.0);
  }
  for (const char* stage :
       {"linear", "norm", "activate", "draw", "append", "score", "select", "prune", "sample", "attend", "prefill"}) {
    EXPECT_NE(std::find(stages.begin(), stages.end(), stage), stages.end()) << stage;
  }
}

TEST(BenchCommand, OnlyTheFamiliesAskedForAreMeasured) {
  const Json document = Json::parse(run_well(kernels({"--context", "1k", "--only", "dense", "--json"})).out);
  ASSERT_EQ(document.at("kernels").size(), 1U);
  EXPECT_EQ(document.at("kernels")[0].at("kernel"), "dense");
  EXPECT_NE(refused(kernels({"--context", "1k", "--only", "dance"})).find("expected one of products, append"),
            std::string::npos);
  EXPECT_NE(refused(bench({"--context", "1k", "--only", "dense"})).find("--kernels"), std::string::npos);
}

TEST(BenchCommand, StagesStandBesideTheReport) {
  const std::vector<std::string> run = {"--context", "128", "--attention", "dense", "quest:token_budget=32",
                                        "--stages"};
  const std::string text = run_well(bench(run)).out;
  EXPECT_NE(text.find("| quest | 1 | score+select | "), std::string::npos) << text;
  std::vector<std::string> as_json = run;
  as_json.emplace_back("--json");
  const Json stages = Json::parse(run_well(bench(as_json)).out).at("rows")[1].at("stages");
  EXPECT_EQ(stages[0].at("stage"), "all");
  EXPECT_GT(stages[0].at("us").get<double>(), 0.0);
  EXPECT_GT(stages[0].at("bound_us").get<double>(), 0.0);
}

TEST(BenchCommand, ACrossoverIsALineOfConfigurationOrASentence) {
  const std::string text = run_well(bench({"--context", "64,512", "--attention", "dense", "quest:token_budget=32",
                                           "--fill", "synthetic", "--crossover"}))
                               .out;
  const bool found = text.find("--attention quest:token_budget=32,dense_below=") != std::string::npos;
  EXPECT_TRUE(found || text.find("Not faster up to 512 tokens") != std::string::npos) << text;
}

TEST(BenchCommand, PeersWriteTheSameColumns) {
  const std::string peers = source_dir() + "/apps/peers/common.py";
  if (!std::ifstream(peers)) GTEST_SKIP() << "the peers are not on this machine";
  std::string columns;  // of the string literals, joined
  std::istringstream lines(text_of(peers));
  bool inside = false;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("COLUMNS")) inside = true;
    const std::size_t begin = line.find('"');
    if (inside && begin != std::string::npos && line.find("split") == std::string::npos) {
      columns += line.substr(begin + 1, line.rfind('"') - begin - 1);
    }
    if (line.find("split") != std::string::npos) break;
  }
  EXPECT_EQ(columns, kHead);
}

TEST(BenchCommand, WhatCannotBeMeasuredIsRefused) {
  EXPECT_EQ(
      refused(bench({"--context", "2"})),
      "error: planning the bench: found --context 2 with --max-tokens 2, expected a context of more tokens than are "
      "decoded in it; raise --context or lower --max-tokens");
  EXPECT_EQ(
      refused(bench({"--context", "1k,2x"})),
      "error: reading --context: found \"2x\", expected whole numbers from 1 to 16777216, separated by commas, as in "
      "1k,8k (k is 1024)");
  EXPECT_EQ(refused(bench({"--context", "64", "--attention", "dense", "quest", "--baseline", "twilight"})),
            "error: reading --baseline: found \"twilight\", expected one of --attention: dense, quest");
  EXPECT_NE(refused(bench({"--context", "64", "--attention", "dense", "nearest"})).find("nearest"), std::string::npos);
  EXPECT_NE(refused(bench({"--context", "64", "--fill", "synthetic", "--sigma", "5:1"})).find("the lesser first"),
            std::string::npos);
  EXPECT_NE(refused(bench({"--context", "64", "--sigma", "4"})).find("add --fill synthetic"), std::string::npos);
  EXPECT_NE(refused(bench({"--context", "64", "--locality", "0"})).find("add --fill synthetic"), std::string::npos);
  for (const char* flag : {"--attention", "--weights", "--fill", "--max-tokens"}) {
    const char* value = std::string(flag) == "--weights" ? "int4" : std::string(flag) == "--fill" ? "synthetic" : "2";
    EXPECT_NE(refused(kernels({flag, value})).find("expected only one of them"), std::string::npos) << flag;
  }
  EXPECT_NE(refused(bench({"--context", "64", "--save", "figures.txt"})).find(".md, .csv or .json"), std::string::npos);
  EXPECT_NE(refused(bench({"--context", "64", "--json", "--csv"})).find("expected only one of them"),
            std::string::npos);
  EXPECT_NE(refused(kernels({"--context", "64"})).find("at least 1024"), std::string::npos);
  EXPECT_NE(refused(bench({"--context", "64", "--stages", "--csv"})).find("Markdown or JSON"), std::string::npos);
  EXPECT_NE(refused(bench({"--context", "64", "--crossover"})).find("the least and the largest"), std::string::npos);
  EXPECT_NE(refused(bench({"--context", "64,128", "--crossover"})).find("dense alone"), std::string::npos);
  EXPECT_NE(refused(bench({"--context", "64,128", "--crossover", "--attention", "dense",
                           "quest:token_budget=32,dense_below=64"}))
                .find("it is what is looked for"),
            std::string::npos);
  EXPECT_NE(refused(bench({"--context", "16777216", "--batch", "4096"})).find("does not fit: it needs"),
            std::string::npos);
}

}  // namespace
}  // namespace vesper
