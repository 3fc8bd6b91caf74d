// Experiments as files, the papers' numbers in them, cells, verdicts; measuring on a small shape.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "engine/core/error.h"
#include "engine/kernel_operator.h"
#include "engine/repro_rows.h"
#include "tests/engine/device.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

std::string refusal(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput);
    return error.what();
  }
  return "nothing was refused";
}

// One panel: dense against quest, stages and a part, at two contexts.
Json small_experiment() {
  return Json::parse(R"({
    "title": "a title", "paper": "a paper", "quick": {"contexts": [2048], "batches": [2]},
    "panels": [{
      "name": "panel", "source": "figure 1", "gpu": "a GPU", "model": "synthetic:tiny", "batch": 2, "sigma": 3.0,
      "contexts": [1024, 2048],
      "lines": [
        {"label": "all", "attention": "dense", "paper": [100, 200]},
        {"label": "few", "attention": "quest:token_budget=256", "paper": [null, 40]},
        {"label": "scoring", "attention": "quest:token_budget=256", "stages": ["score"], "part": true}
      ]}]})");
}

TEST(ReproFiles, AllThatComeWithVesperHold) {
  const std::vector<std::string> names = experiment_names();
  for (const char* name :
       {"quest-fig10", "quest-fig8", "quest-fig9", "twilight-fig10", "twilight-fig7", "vattention-speed"}) {
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  }
  for (const std::string& name : names) {
    const Experiment experiment = load_experiment(name);
    EXPECT_FALSE(experiment.about.empty()) << name;
    EXPECT_FALSE(experiment.limits.empty()) << name;
    EXPECT_FALSE(quick_part(experiment).panels.empty()) << name;
    EXPECT_LT(plan_cells(quick_part(experiment)).size(), plan_cells(experiment).size()) << name;
    for (const ReproPanel& panel : experiment.panels) {
      const int layers = model_config_of(panel.model).layers;
      for (const ReproLine& line : panel.lines) EXPECT_NO_THROW((void)parse_attention(line.attention, layers)) << name;
    }
  }
  EXPECT_NE(refusal([] { (void)load_experiment("quest-fig99"); }).find("one of: quest-fig10, quest-fig8"),
            std::string::npos);
}

// Times that a file gives stand for our own too, so that every verdict must be "reproduced".
std::vector<ReproResult> as_in_the_paper(const Experiment& experiment, const std::vector<ReproCell>& cells) {
  std::vector<ReproResult> results;
  for (const ReproCell& cell : cells) {
    ReproResult& result = results.emplace_back();
    result.roof = {.read_bytes_per_s = 1e12, .matrix_flops_per_s = 1e15};
    for (const std::string& attention : cell.attentions) {
      result.arms.push_back({.attention = attention, .seconds = {1.0}, .bytes = 1e9, .stages = {}});
    }
    for (const ReproPanel& panel : experiment.panels) {
      for (std::size_t i = 0; i < panel.contexts.size(); ++i) {
        if (!cell.serves(panel, panel.contexts[i]) || panel.unit == ReproUnit::kShare) continue;
        for (const ReproLine& line : panel.lines) {
          if (!line.stages.empty() || !line.paper[i]) continue;
          for (ReproArm& arm : result.arms) {
            if (arm.attention != line.attention) continue;
            const bool times = panel.unit == ReproUnit::kTimes;
            arm.seconds = {times ? 1.0 / *line.paper[i] : *line.paper[i]};
          }
        }
      }
    }
  }
  return results;
}

double paper_speedup_of(const std::string& name, const std::string& panel, const std::string& label, int context) {
  const Experiment experiment = load_experiment(name);
  const std::vector<ReproCell> cells = plan_cells(experiment);
  const std::vector<ReproResult> results = as_in_the_paper(experiment, cells);
  for (const ReproRow& row : make_rows(experiment, cells, results, {}, true)) {
    if (row.panel->name != panel || row.line->label != label || row.context != context) continue;
    EXPECT_EQ(row.verdict, "reproduced") << name;
    return row.paper_speedup.value_or(0.0);
  }
  ADD_FAILURE() << name << ": no " << label;
  return 0.0;
}

TEST(ReproFiles, ThePapersHeadlinesComeOut) {
  EXPECT_NEAR(paper_speedup_of("quest-fig9", "self-attention", "Quest, budget 2048", 32768), 7.03, 0.005);
  EXPECT_NEAR(paper_speedup_of("quest-fig9", "self-attention", "Quest, budget 4096", 32768), 4.86, 0.02);
  EXPECT_NEAR(paper_speedup_of("quest-fig10", "16-bit weights", "Quest, budget 2048", 32768), 1.74, 0.005);
  EXPECT_NEAR(paper_speedup_of("quest-fig10", "4-bit weights", "Quest, budget 2048", 32768), 2.23, 0.005);
  EXPECT_NEAR(paper_speedup_of("twilight-fig7", "batch 64", "Quest-Twi", 30720), 15.8 / 3.5, 1e-6);
  EXPECT_NEAR(paper_speedup_of("twilight-fig10", "batch 64", "Quest-Twi", 32768), 1.61, 0.01);
}

TEST(ReproFiles, WhatIsWrongIsNamed) {
  const auto reading = [](const std::function<void(Json&)>& change) {
    Json document = small_experiment();
    change(document);
    return refusal([&] { (void)parse_experiment(document, "small", "small.json"); });
  };
  Json fine = small_experiment();
  EXPECT_EQ(parse_experiment(fine, "small", "small.json").panels.size(), 1U);
  const auto panel = [](Json& document) -> Json& { return document["panels"][0]; };
  EXPECT_NE(reading([&](Json& d) { panel(d)["sigmas"] = 2; }).find("the key \"sigmas\""), std::string::npos);
  EXPECT_NE(reading([&](Json& d) { panel(d)["unit"] = "hours"; }).find("one of: us, ms, x, of baseline"),
            std::string::npos);
  EXPECT_NE(reading([&](Json& d) { panel(d)["contexts"] = {1024}; }).find("one for each of 1 contexts"),
            std::string::npos);
  EXPECT_NE(reading([&](Json& d) { panel(d)["measure"] = "step"; }).find("stages of a step"), std::string::npos);
  EXPECT_NE(reading([&](Json& d) { panel(d)["lines"][1]["attention"] = "best"; }).find("best"), std::string::npos);
  EXPECT_NE(reading([&](Json& d) { panel(d).erase("lines"); }).find("no \"lines\""), std::string::npos);
  EXPECT_NE(reading([](Json& d) { d["panels"] = 3; }).find("a list"), std::string::npos);
}

class Verdicts : public testing::Test {
 protected:
  // Quest's verdict at 2048 tokens, where dense takes 200 us for 2 MB and the paper's speed-up is 5.
  std::string quest(double us, double bytes, bool judged = true) {
    ReproResult& result = results_[1];
    result.arms[1].seconds = {us * 1e-6};
    result.arms[1].bytes = bytes;
    rows_ = make_rows(experiment_, cells_, results_, peers_, judged);
    return rows_[4].verdict;
  }
  Verdicts() {
    for (const ReproCell& cell : cells_) {
      ReproResult& result = results_.emplace_back();
      result.roof = {.read_bytes_per_s = 1e12, .matrix_flops_per_s = 1e15};
      for (const std::string& attention : cell.attentions) {
        result.arms.push_back({.attention = attention,
                               .seconds = {200e-6},
                               .bytes = 2e6,
                               .cold = true,
                               .stages = {{"all", 200e-6, 1e-6}, {"score+select", 20e-6, 1e-6}}});
      }
    }
  }

  Experiment experiment_ = parse_experiment(small_experiment(), "small", "small.json");
  std::vector<ReproCell> cells_ = plan_cells(experiment_);
  std::vector<ReproResult> results_;
  std::vector<PeerTime> peers_;
  std::vector<ReproRow> rows_;
};

TEST_F(Verdicts, GoBySpeedupAndByBytes) {
  ASSERT_EQ(cells_.size(), 2U);
  EXPECT_EQ(quest(40.0, 0.2e6), "reproduced");
  EXPECT_EQ(quest(41.5, 0.2e6), "reproduced");
  EXPECT_EQ(quest(30.0, 0.2e6), "exceeded");
  EXPECT_EQ(quest(60.0, 0.2e6), "missed");      // the bytes allow ten times
  EXPECT_EQ(quest(60.0, 0.8e6), "impossible");  // or two and a half
  EXPECT_EQ(quest(60.0, 0.2e6, false), "unjudged");
  EXPECT_EQ(rows_[3].verdict, "baseline");
  EXPECT_EQ(rows_[1].verdict, "unpublished");
  EXPECT_DOUBLE_EQ(rows_[4].speedup_bound.value_or(0.0), 10.0);
  EXPECT_NEAR(rows_[4].bound_share.value_or(0.0), 0.2 / 60.0, 1e-6);
  results_[1].skipped = "too large";
  EXPECT_EQ(quest(60.0, 0.2e6), "unfit");
  EXPECT_EQ(rows_[4].note, "too large");
}

TEST_F(Verdicts, AStageThatRunsWithAnotherHasNoTimeOfItsOwn) {
  (void)quest(40.0, 0.2e6);
  EXPECT_EQ(rows_[5].verdict, "part");
  EXPECT_FALSE(rows_[5].time_us.has_value());
  EXPECT_FALSE(rows_[5].bound_share.has_value());
  EXPECT_EQ(rows_[5].note, "in one launch with select, 20.0 us together");
  experiment_.panels[0].lines[2].part = false;
  (void)quest(40.0, 0.2e6);
  EXPECT_EQ(rows_[5].verdict, "inseparable");
}

TEST_F(Verdicts, AStageThatRunsAloneHasItsTime) {
  for (ReproResult& result : results_) result.arms[1].stages[1].name = "score";
  (void)quest(40.0, 0.2e6);
  EXPECT_NEAR(rows_[5].time_us.value_or(0.0), 20.0, 1e-9);
  EXPECT_EQ(rows_[5].note, "");
}

TEST_F(Verdicts, TheFastestPeerStandsBeside) {
  peers_ = parse_peers(
      "engine,model,attention,context,batch,attention_us\n"
      "a,synthetic:tiny,\"one, two\",2048,2,300\nb,synthetic:tiny,three,2048,2,120\nb,synthetic:tiny,three,2048,1,10\n"
      "vesper,synthetic:tiny,dense,2048,2,1\n",
      "peers.csv");
  ASSERT_EQ(peers_.size(), 3U);
  EXPECT_EQ(peers_[0].engine, "a one, two");
  (void)quest(40.0, 0.2e6);
  EXPECT_EQ(rows_[4].peer, "b three");
  EXPECT_NEAR(rows_[4].peer_speedup.value_or(0.0), 3.0, 1e-9);
  EXPECT_FALSE(rows_[5].peer_us.has_value());  // of a part
  EXPECT_NE(refusal([] { (void)parse_peers("a,b\n", "peers.csv"); }).find("no column engine"), std::string::npos);
}

class ReproRun : public DeviceTest {};

TEST_F(ReproRun, ACellIsMeasuredSavedAndReadAgain) {
  const Experiment experiment = parse_experiment(small_experiment(), "small", "small.json");
  const std::vector<ReproCell> cells = plan_cells(quick_part(experiment));
  ASSERT_EQ(cells.size(), 1U);
  ReproSetting setting;
  setting.engine.limits.device = kTestDevice;
  const ReproResult result = measure_cell(cells[0], setting, {});
  ASSERT_FALSE(result.skipped.has_value()) << *result.skipped;
  ASSERT_EQ(result.arms.size(), 2U);
  EXPECT_NEAR(result.sigma, 3.0, 0.6);
  const ReproArm& quest = result.arms[1];
  EXPECT_DOUBLE_EQ(quest.kept_tokens, 256.0);
  EXPECT_DOUBLE_EQ(quest.kept_tokens_p99, 256.0);
  EXPECT_GT(quest.kept_mass, 256.0 / 2048);
  EXPECT_LT(quest.kept_mass, 1.0);
  EXPECT_LT(quest.bytes, result.arms[0].bytes);
  const ModelConfig config = model_config_of("synthetic:tiny");
  const double element = kTestDevice == DeviceKind::kCuda ? 2.0 : 4.0;
  EXPECT_DOUBLE_EQ(result.arms[0].bytes, 2.0 * 2048 * 2 * config.kv_heads * config.head_dim * element);
  ASSERT_GE(quest.stages.size(), 2U);  // the whole, and on CUDA one launch that does it
  EXPECT_EQ(quest.stages[0].name, "all");
  const Json saved = result_json(result);
  EXPECT_EQ(result_json(parse_result(saved, "cells.json")), saved);
  Json torn = saved;
  torn["arms"][1]["seconds"].push_back(1.0);
  EXPECT_NE(refusal([&] { (void)parse_result(torn, "cells.json"); }).find("as of the first attention"),
            std::string::npos);
  torn["arms"][0]["seconds"] = Json::array();
  EXPECT_NE(refusal([&] { (void)parse_result(torn, "cells.json"); }).find("found 0 times of dense"), std::string::npos);
  EXPECT_NE(refusal([] { (void)parse_result(Json::parse(R"({"skipped": null})"), "cells.json"); }).find("--resume"),
            std::string::npos);
}

TEST_F(ReproRun, OperatorsAreCheckedAgainstTheCpu) {
  KernelSetting setting;
  setting.model = "synthetic:tiny";
  setting.device = kTestDevice;
  setting.contexts = {2048};
  setting.batches = {2};
  setting.scores = {.sigma = {3.0, 3.0}, .locality = 0.9};
  const OperatorReport report = run_operators(
      setting, {"dense", "quest:token_budget=256", "twilight:base_budget=512", "vattention:epsilon=0.1,delta=0.1"});
  ASSERT_EQ(report.rows.size(), 4U);
  for (const OperatorRow& row : report.rows) {
    EXPECT_TRUE(row.check.starts_with("CPU, ")) << row.attention << ": " << row.check;
    EXPECT_FALSE(row.seconds.empty());
  }
  EXPECT_LT(report.rows[2].kept_tokens, 512.0);
  EXPECT_LE(report.rows[2].kept_tokens, report.rows[2].kept_tokens_p99);
}

}  // namespace
}  // namespace vesper
