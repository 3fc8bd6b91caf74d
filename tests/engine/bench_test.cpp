// The decode benchmark on a small synthetic model: what it measures that does not depend on the machine's speed.
#include "engine/bench.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>

#include "engine/crossover.h"
#include "tests/engine/device.h"

namespace vesper {
namespace {

class BenchRun : public DeviceTest {};

// The machine's own takes a second to measure, and nothing here is about speed.
const BenchHooks kFixedRoof{
    .probe = [] { return Roof{.read_bytes_per_s = 1e18, .matrix_flops_per_s = 1e18}; }, .loading = {}, .progress = {}};

BenchSetting setting_of(std::vector<std::string> attentions) {
  BenchSetting setting;
  setting.model = "synthetic:tiny";
  setting.engine.limits.device = kTestDevice;
  setting.contexts = {512};
  setting.batches = {2};
  setting.attentions = std::move(attentions);
  setting.max_tokens = 6;
  setting.repeats = 2;
  setting.fill = BenchFill::kSynthetic;
  return setting;
}

TEST_F(BenchRun, CountersAndBytesAreThoseOfTheSteps) {
  const BenchReport report = run_bench(setting_of({"dense", "quest:token_budget=64"}), kFixedRoof);
  ASSERT_EQ(report.rows.size(), 2U);
  const BenchRow& dense = report.rows[0];
  const BenchRow& quest = report.rows[1];
  EXPECT_EQ(dense.step_s.size(), 12U);
  EXPECT_EQ(dense.device_s.size(), 12U);
  EXPECT_EQ(dense.tpot_s.size(), 2U);
  // Tokens 507 to 512 of two sequences, of three layers; K and V of two KV heads.
  const ModelConfig config = model_config_of("synthetic:tiny");
  const double row_bytes = 2.0 * config.kv_heads * config.head_dim * (kTestDevice == DeviceKind::kCuda ? 2 : 4);
  const double visible = 2 * 509.5;
  EXPECT_DOUBLE_EQ(dense.kv_bytes, 3 * visible * row_bytes);
  EXPECT_DOUBLE_EQ(dense.dense_kv_bytes, dense.kv_bytes);
  EXPECT_DOUBLE_EQ(quest.dense_kv_bytes, dense.kv_bytes);
  EXPECT_EQ(dense.metadata_bytes, 0.0);
  EXPECT_EQ(dense.lists, 0);
  EXPECT_FALSE(dense.sparse);
  EXPECT_DOUBLE_EQ(dense.kept_tokens, 509.5);
  // Layer 2 alone is sparse: steps x repeats x sequences x KV heads.
  EXPECT_TRUE(quest.sparse);
  EXPECT_EQ(quest.lists, 6 * 2 * 2 * 2);
  // Four pages; the newest, with 11 to 16 tokens, is one of them.
  EXPECT_DOUBLE_EQ(quest.kept_tokens, 48 + 13.5);
  EXPECT_DOUBLE_EQ(quest.kept_tokens_p99, 64.0);
  EXPECT_DOUBLE_EQ(quest.kv_bytes, (2 * visible + 2 * quest.kept_tokens) * row_bytes);
  EXPECT_GT(quest.kept_mass, 64.0 / 512);
  EXPECT_LT(quest.kept_mass, 1.0);
  EXPECT_DOUBLE_EQ(dense.speedup.value, 1.0);
  EXPECT_GT(quest.attention_s, 0.0);
}

TEST_F(BenchRun, TheSpreadOfScoresIsTheOneAskedFor) {
  for (const double sigma : {1.0, 3.0}) {
    BenchSetting setting = setting_of({"dense"});
    setting.contexts = {4096};
    setting.batches = {1};
    setting.repeats = 1;
    setting.scores = {.sigma = {sigma, sigma}, .locality = 0.5};
    const BenchRow row = run_bench(setting, kFixedRoof).rows[0];
    // A head's query differs from the mean length over steps and group by some 10 % at head_dim 64.
    EXPECT_NEAR(row.sigma, sigma, 0.1 * sigma);
    EXPECT_GT(row.sigma_least, 0.6 * sigma);
    EXPECT_LT(row.sigma_largest, 1.4 * sigma);
  }
}

TEST_F(BenchRun, NeighboursThatScoreAlikeLetPagesBeChosen) {
  const auto mass = [](double locality) {
    BenchSetting setting = setting_of({"quest:token_budget=256"});
    setting.contexts = {4096};
    setting.repeats = 1;
    setting.scores = {.sigma = {3.0, 3.0}, .locality = locality};
    return run_bench(setting, kFixedRoof).rows[0].kept_mass;
  };
  EXPECT_GT(mass(0.9), 0.6);
  EXPECT_LT(mass(0.0), 0.3);
}

TEST_F(BenchRun, OfCellsThatDoNotFitTheOthersRun) {
  BenchSetting setting = setting_of({"dense"});
  setting.max_tokens = 2;
  setting.repeats = 1;
  setting.contexts = {16, (1 << 24) - 1};
  setting.batches = {64};  // sequences of 16 M tokens: more than any machine holds
  setting.engine.limits.prefill_chunk = 16;
  const BenchReport report = run_bench(setting, kFixedRoof);
  ASSERT_EQ(report.rows.size(), 1U);
  EXPECT_EQ(report.rows[0].context, 16);
  ASSERT_EQ(report.skipped.size(), 1U);
  EXPECT_NE(report.skipped[0].find("does not fit: it needs"), std::string::npos) << report.skipped[0];
}

// An attention's steps leave alone what only another one reads, and rewinding leaves nothing behind: the same lists as
// alone.
TEST_F(BenchRun, AttentionsThatTakeTurnsKeepWhatTheyKeepAlone) {
  const std::vector<std::string> attentions = {"dense", "quest:token_budget=64", "twilight:base_budget=128"};
  BenchSetting setting = setting_of(attentions);
  setting.max_tokens = 40;  // over pages of their own
  const BenchReport together = run_bench(setting, kFixedRoof);
  for (std::size_t arm = 0; arm < attentions.size(); ++arm) {
    BenchSetting alone = setting;
    alone.attentions = {attentions[arm]};
    const BenchRow row = run_bench(alone, kFixedRoof).rows[0];
    EXPECT_EQ(row.listed_tokens, together.rows[arm].listed_tokens) << attentions[arm];
    EXPECT_EQ(row.kept_mass, together.rows[arm].kept_mass) << attentions[arm];
  }
}

std::vector<std::string> stage_names(const BenchRow& row, const std::string& backend) {
  std::vector<std::string> names;
  for (const StageFigure& figure : row.stages) {
    if (figure.backend == backend) names.push_back(figure.stage);
  }
  return names;
}

const StageFigure& stage_of(const BenchRow& row, const std::string& backend, const std::string& stage) {
  for (const StageFigure& figure : row.stages) {
    if (figure.backend == backend && figure.stage == stage) return figure;
  }
  throw std::out_of_range(stage);
}

TEST_F(BenchRun, StagesAreThoseThatTheBackendRuns) {
  BenchSetting setting = setting_of({"dense", "quest:token_budget=64", "twilight:base_budget=128", "vattention"});
  setting.contexts = {2048};
  setting.batches = {2};
  setting.stages = true;
  setting.scores = {.sigma = {3.0, 3.0}, .locality = 0.9};
  const BenchReport report = run_bench(setting, kFixedRoof);
  EXPECT_EQ(stage_names(report.rows[0], "dense"), (std::vector<std::string>{"all", "attend"}));
  for (std::size_t i = 1; i < report.rows.size(); ++i) {
    const BenchRow& row = report.rows[i];
    const std::string backend = i == 1 ? "quest" : i == 2 ? "twilight" : "vattention";
    const std::vector<std::string> names = stage_names(row, backend);
    ASSERT_GE(names.size(), 2U) << backend;
    EXPECT_EQ(names.front(), "all");
    EXPECT_EQ(stage_of(row, backend, "all").layers, 1);
    EXPECT_EQ(stage_of(row, "dense", "all").layers, 2);
    std::int64_t bytes = 0;
    for (const std::string& name : names) {
      if (name == "all") continue;
      const StageFigure& stage = stage_of(row, backend, name);
      EXPECT_GT(stage.seconds + stage.seam_seconds, 0.0) << name;
      EXPECT_GT(stage.cost.bytes, 0) << name;
      bytes += stage.cost.bytes;
    }
    EXPECT_EQ(stage_of(row, backend, "all").cost.bytes, bytes);
  }
  // What attending reads is the lists that the device made: of quest four pages of two sequences and KV heads.
  const ModelConfig config = model_config_of("synthetic:tiny");
  const std::int64_t element = kTestDevice == DeviceKind::kCuda ? 2 : 4;
  const std::int64_t listed = 2 * 2 * 64;
  const std::int64_t attending = listed * (2 * config.head_dim * element + 4) + 2 * 2 * config.q_rows() * element;
  const std::vector<std::string> names = stage_names(report.rows[1], "quest");
  if (std::find(names.begin(), names.end(), "attend") != names.end()) {
    EXPECT_EQ(stage_of(report.rows[1], "quest", "attend").cost.bytes, attending);
  } else {
    EXPECT_GT(stage_of(report.rows[1], "quest", "score+select+attend+count").cost.bytes, attending);
  }
}

TEST(StageFigures, AddUpToTheWholeWithoutTheirSeams) {
  const auto figure = [](const char* stage, double seconds) {
    return StageFigure{.backend = "b", .stage = stage, .layers = 1, .seconds = seconds, .cost = {}};
  };
  const std::vector<StageFigure> found =
      without_seams({figure("all", 16), figure("score", 9), figure("attend", 7), figure("all", 5), figure("attend", 5)},
                    {figure("all", 12), figure("all", 6)});
  ASSERT_EQ(found.size(), 5U);
  EXPECT_EQ(found[0].seconds, 12);
  EXPECT_EQ(found[1].seconds, 7);
  EXPECT_EQ(found[1].seam_seconds, 2);
  EXPECT_EQ(found[2].seconds, 5);
  EXPECT_EQ(found[3].seconds, 6);  // no stages' sum exceeds it: nothing to take off
  EXPECT_EQ(found[4].seconds, 5);
  EXPECT_EQ(found[4].seam_seconds, 0);
}

TEST_F(BenchRun, ACrossoverIsBracketedByWhatWasMeasured) {
  BenchSetting setting = setting_of({"dense", "quest:token_budget=512"});
  setting.contexts = {512, 4096};
  setting.batches = {1};
  const CrossoverReport report = find_crossovers(setting, kFixedRoof);
  ASSERT_EQ(report.crossovers.size(), 1U);
  const Crossover& crossover = report.crossovers[0];
  EXPECT_EQ(crossover.points.back().context, 4096);
  EXPECT_FALSE(crossover.points.back().dense);
  if (!crossover.dense_below) return;  // speeds are the machine's own affair
  EXPECT_EQ(crossover.points.front().context, 512);
  EXPECT_TRUE(crossover.points.front().dense);  // the budget covers it
  EXPECT_GE(*crossover.dense_below, 512);
  EXPECT_LT(*crossover.dense_below, 4096);
}

TEST(CrossoverLines, AreTheOnesThatAUserWrites) {
  const Crossover plain{.attention = "twilight", .points = {}, .dense_below = 4096};
  EXPECT_EQ(crossover_shorthand(plain), "twilight:dense_below=4096");
  const Crossover quest{.attention = "quest:token_budget=2048,group=sum", .points = {}, .dense_below = 6144};
  EXPECT_EQ(crossover_shorthand(quest), "quest:token_budget=2048,group=sum,dense_below=6144");
  EXPECT_EQ(crossover_rule(quest),
            R"({ "layers": "2-", "backend": "quest", "dense_below": 6144, "group": "sum", "token_budget": 2048 })");
}

}  // namespace
}  // namespace vesper
