// vesper repro through the binary: what it lists, writes, takes up again and refuses.
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/apps/run_vesper.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> fig9(const std::string& folder, const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments = {"repro",    "quest-fig9", "--quick", "--model", "synthetic:tiny",
                                        "--device", "cpu",        "--out",   folder};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

TEST(ReproCommand, ListsWhatThereIs) {
  const std::string text = run_well({"repro", "list"}).out;
  for (const char* name : {"quest-fig9 ", "quest-fig10 ", "twilight-fig7 ", "vattention-speed "}) {
    EXPECT_NE(text.find(name), std::string::npos) << text;
  }
}

TEST(ReproCommand, WritesTablesAndTakesFinishedCellsUpAgain) {
  const TempFolder folder;
  const std::string first = run_well(fig9(folder.path())).out;
  EXPECT_EQ(text_of(folder / "quest-fig9.md"), first);
  EXPECT_NE(first.find("| 32768 | Quest, budget 2048 | 87.2 | "), std::string::npos) << first;
  EXPECT_NE(first.find(" | 7.03 | "), std::string::npos) << first;
  EXPECT_NE(first.find("On a CPU this shows sparsity"), std::string::npos) << first;
  const Json document = Json::parse(text_of(folder / "quest-fig9.json"));
  ASSERT_EQ(document.at("rows").size(), 16U);
  const Json& quest = document.at("rows")[6];
  EXPECT_EQ(quest.at("attention"), "quest:token_budget=2048");
  EXPECT_EQ(quest.at("verdict"), "unjudged");
  EXPECT_EQ(quest.at("kept_tokens"), 2048.0);
  EXPECT_GT(quest.at("ours").get<double>(), 0.0);
  const std::string csv = text_of(folder / "quest-fig9.csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 17);
  EXPECT_TRUE(csv.starts_with("panel,source,paper_gpu,label,attention,stages,measure,model,")) << csv;

  // A saved cell is taken as it is where all is equal, and measured anew where something is not.
  const std::string cells = folder / "cells.json";
  Json saved = Json::parse(text_of(cells));
  ASSERT_EQ(saved.size(), 1U);
  for (Json& arm : saved[0]["result"]["arms"]) arm["seconds"] = {0.123456};
  write_file(cells, saved.dump());
  const std::string peers = folder / "peers.csv";
  write_file(peers, "engine,model,attention,context,batch,attention_us\nother,synthetic:tiny,dense,32768,1,5000\n");
  const std::string again = run_well(fig9(folder.path(), {"--resume", "--peer-csv", peers})).out;
  EXPECT_NE(again.find("123456.0"), std::string::npos) << again;
  EXPECT_NE(again.find("| peer us | over peer |"), std::string::npos) << again;
  saved[0]["key"]["binary"] = "another";
  write_file(cells, saved.dump());
  EXPECT_EQ(run_well(fig9(folder.path(), {"--resume"})).out.find("123456.0"), std::string::npos);
}

TEST(ReproCommand, RepeatsOfStepsAreChosenAndSaid) {
  const TempFolder folder;
  const std::string text = run_well({"repro", "quest-fig10", "--quick", "--repeats", "2", "--max-tokens", "4",
                                     "--model", "synthetic:tiny", "--device", "cpu", "--out", folder.path()})
                               .out;
  EXPECT_NE(text.find("`vesper repro quest-fig10 --quick --repeats 2 --max-tokens 4 --model synthetic:tiny`"),
            std::string::npos)
      << text;
  const Json cells = Json::parse(text_of(folder / "cells.json"));
  EXPECT_EQ(cells[0].at("key").at("repeats"), 2);
  EXPECT_EQ(cells[0].at("key").at("max_tokens"), 4);
  EXPECT_EQ(cells[0].at("result").at("arms")[0].at("seconds").size(), 2U);
}

TEST(ReproCommand, WhatCannotBeIsRefused) {
  const TempFolder folder;
  EXPECT_NE(refused({"repro", "quest-fig99"}).find("one of: quest-fig10, "), std::string::npos);
  EXPECT_NE(refused({"repro"}).find("found no name, expected NAME"), std::string::npos);
  EXPECT_NE(refused(fig9(folder.path(), {"--peer-csv", folder / "none.csv"})).find("--peer-csv"), std::string::npos);
  write_file(folder / "file", "");
  EXPECT_NE(refused(fig9(folder / "file")).find("change --out"), std::string::npos);
}

}  // namespace
}  // namespace vesper
