#include "engine/repro_cells.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/bench_cell.h"
#include "engine/core/error.h"
#include "engine/kernel_operator.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

bool same_scores(const DrawnScores& a, const DrawnScores& b) {
  return a.sigma.least == b.sigma.least && a.sigma.largest == b.sigma.largest && a.locality == b.locality;
}

void add_attention(std::vector<std::string>& all, const std::string& one) {
  if (std::find(all.begin(), all.end(), one) == all.end()) all.push_back(one);
}

ReproResult measure_operator(const ReproCell& cell, const ReproSetting& setting) {
  const KernelSetting kernels{.model = cell.model,
                              .device = setting.engine.limits.device,
                              .page_tokens = setting.engine.limits.page_tokens,
                              .contexts = {cell.context},
                              .batches = {cell.batch},
                              .scores = cell.scores,
                              .seed = setting.engine.seed,
                              .families = {}};
  const OperatorReport report = run_operators(kernels, cell.attentions);
  ReproResult result{.skipped = report.skipped, .arms = {}, .sigma = report.sigma, .roof = report.roof};
  for (const OperatorRow& row : report.rows) {
    ReproArm& arm = result.arms.emplace_back();
    arm = {.attention = row.attention,
           .seconds = row.seconds,
           .bytes = row.kv_bytes + row.metadata_bytes,
           .kept_tokens = row.kept_tokens,
           .kept_tokens_p99 = row.kept_tokens_p99,
           .kept_mass = row.kept_mass,
           .cold = row.cold,
           .stages = {}};
    for (const StageFigure& stage : row.stages) {
      arm.stages.push_back({stage.stage, stage.seconds, bound_seconds(stage.cost, report.roof)});
    }
  }
  return result;
}

ReproResult measure_step(const ReproCell& cell, const ReproSetting& setting,
                         const std::function<void(double share)>& progress) {
  BenchSetting bench;
  bench.model = cell.model;
  bench.engine = setting.engine;
  bench.weights = {cell.weights};
  bench.contexts = {cell.context};
  bench.batches = {cell.batch};
  bench.attentions = cell.attentions;
  bench.max_tokens = std::min(setting.max_tokens, std::max(1, cell.context / 2));
  bench.repeats = setting.repeats;
  bench.fill = BenchFill::kSynthetic;
  bench.scores = cell.scores;
  if (const auto reason = does_not_fit(bench, bench_engine_options(bench, cell.weights, cell.context, cell.batch))) {
    return {.skipped = reason, .arms = {}, .sigma = 0.0, .roof = {}};
  }
  const BenchHooks hooks{.probe = {}, .loading = {}, .progress = [&](std::int64_t done, std::int64_t total) {
                           if (progress) progress(static_cast<double>(done) / static_cast<double>(total));
                         }};
  const BenchReport report = run_bench(bench, hooks);
  ReproResult result{.skipped = {}, .arms = {}, .sigma = report.rows[0].sigma, .roof = report.roof};
  for (const BenchRow& row : report.rows) {
    result.arms.push_back({.attention = row.attention,
                           .seconds = row.tpot_s,
                           .bytes = step_bytes(row),
                           .kept_tokens = row.kept_tokens,
                           .kept_tokens_p99 = row.kept_tokens_p99,
                           .kept_mass = row.kept_mass,
                           .cold = roof_share(row).has_value(),
                           .stages = {}});
  }
  return result;
}

}  // namespace

bool ReproCell::serves(const ReproPanel& panel, int at) const {
  return measure == panel.measure && model == panel.model && weights == panel.weights && batch == panel.batch &&
         context == at && same_scores(scores, panel.scores);
}

std::vector<ReproCell> plan_cells(const Experiment& experiment) {
  std::vector<ReproCell> cells;
  for (const ReproPanel& panel : experiment.panels) {
    for (std::size_t i = 0; i < panel.contexts.size(); ++i) {
      const int context = panel.contexts[i];
      auto cell =
          std::find_if(cells.begin(), cells.end(), [&](const ReproCell& one) { return one.serves(panel, context); });
      if (cell == cells.end()) {
        cells.push_back({.measure = panel.measure,
                         .model = panel.model,
                         .weights = panel.weights,
                         .batch = panel.batch,
                         .context = context,
                         .scores = panel.scores,
                         .attentions = {}});
        cell = cells.end() - 1;
      }
      add_attention(cell->attentions, panel.baseline);
      for (const ReproLine& line : panel.lines) add_attention(cell->attentions, line.attention);
    }
  }
  return cells;
}

ReproResult measure_cell(const ReproCell& cell, const ReproSetting& setting,
                         const std::function<void(double share)>& progress) {
  return cell.measure == ReproMeasure::kOperator ? measure_operator(cell, setting)
                                                 : measure_step(cell, setting, progress);
}

Json cell_key(const ReproCell& cell, const ReproSetting& setting) {
  const bool step = cell.measure == ReproMeasure::kStep;
  return {{"measure", step ? "step" : "operator"},
          {"model", cell.model},
          {"weights", weight_format_name(cell.weights)},
          {"batch", cell.batch},
          {"context", cell.context},
          {"sigma", cell.scores.sigma.least},
          {"locality", cell.scores.locality},
          {"attentions", cell.attentions},
          {"page_tokens", setting.engine.limits.page_tokens},
          {"seed", setting.engine.seed},
          {"repeats", step ? setting.repeats : 0},
          {"max_tokens", step ? setting.max_tokens : 0}};
}

Json result_json(const ReproResult& result) {
  Json arms = Json::array();
  for (const ReproArm& arm : result.arms) {
    Json stages = Json::array();
    for (const ReproStage& stage : arm.stages) stages.push_back({stage.name, stage.seconds, stage.bound_seconds});
    arms.push_back({{"attention", arm.attention},
                    {"seconds", arm.seconds},
                    {"bytes", arm.bytes},
                    {"kept_tokens", arm.kept_tokens},
                    {"kept_tokens_p99", arm.kept_tokens_p99},
                    {"kept_mass", arm.kept_mass},
                    {"cold", arm.cold},
                    {"stages", std::move(stages)}});
  }
  return {{"skipped", result.skipped ? Json(*result.skipped) : Json()},
          {"sigma", result.sigma},
          {"read_bytes_per_s", result.roof.read_bytes_per_s},
          {"matrix_flops_per_s", result.roof.matrix_flops_per_s},
          {"arms", std::move(arms)}};
}

ReproResult parse_result(const Json& object, const std::string& source) {
  try {
    ReproResult result;
    if (!object.at("skipped").is_null()) result.skipped = object.at("skipped").get<std::string>();
    result.sigma = object.at("sigma").get<double>();
    result.roof = {.read_bytes_per_s = object.at("read_bytes_per_s").get<double>(),
                   .matrix_flops_per_s = object.at("matrix_flops_per_s").get<double>()};
    for (const Json& one : object.at("arms")) {
      ReproArm& arm = result.arms.emplace_back();
      arm = {.attention = one.at("attention").get<std::string>(),
             .seconds = one.at("seconds").get<std::vector<double>>(),
             .bytes = one.at("bytes").get<double>(),
             .kept_tokens = one.at("kept_tokens").get<double>(),
             .kept_tokens_p99 = one.at("kept_tokens_p99").get<double>(),
             .kept_mass = one.at("kept_mass").get<double>(),
             .cold = one.at("cold").get<bool>(),
             .stages = {}};
      for (const Json& stage : one.at("stages")) {
        arm.stages.push_back({stage.at(0).get<std::string>(), stage.at(1).get<double>(), stage.at(2).get<double>()});
      }
      // Attentions took turns.
      const std::size_t turns = result.arms.front().seconds.size();
      if (turns == 0 || arm.seconds.size() != turns) {
        refuse({"reading " + source, fmt::format("{} times of {}", arm.seconds.size(), arm.attention),
                turns == 0 ? "one at least" : fmt::format("{}, as of the first attention", turns),
                "run without --resume"});
      }
    }
    return result;
  } catch (const Json::exception& error) {
    refuse({"reading " + source, error.what(), "a cell as `vesper repro` saves it", "run without --resume"});
  }
}

}  // namespace vesper
