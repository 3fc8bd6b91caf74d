// What an experiment measures: cells, each some attentions in turns at one model, context and batch.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/repro.h"
#include "engine/roof.h"

namespace vesper {

// How thoroughly, and on what.
struct ReproSetting {
  EngineOptions engine;  // device, pages, seed
  std::string model;     // in place of each panel's own, where it is not empty
  int repeats = 9;       // of steps; an operator's replays are always nine
  int max_tokens = 32;   // of a repeat of steps
};

struct ReproCell {
  ReproMeasure measure = ReproMeasure::kOperator;
  std::string model;
  WeightFormat weights = WeightFormat::kStored;
  int batch = 1;
  int context = 0;
  DrawnScores scores;
  std::vector<std::string> attentions;

  // Whether a panel's numbers at `at` come from this cell.
  [[nodiscard]] bool serves(const ReproPanel& panel, int at) const;
};

// The panels' cells, each once, in their order; attentions that several panels have at one place share a cell.
std::vector<ReproCell> plan_cells(const Experiment& experiment);

struct ReproStage {
  std::string name;
  double seconds = 0.0;
  double bound_seconds = 0.0;
};

// One attention of a cell.
struct ReproArm {
  std::string attention;
  std::vector<double> seconds;  // of a layer's attention, an entry a replay; of a step, an entry a repeat
  double bytes = 0.0;           // that it read: K, V, side tables, and the weights of a step
  double kept_tokens = 0.0;
  double kept_tokens_p99 = 0.0;
  double kept_mass = 1.0;
  bool cold = false;  // too much for the last cache to hold
  std::vector<ReproStage> stages;
};

struct ReproResult {
  std::optional<std::string> skipped;  // why nothing was measured
  std::vector<ReproArm> arms;          // in the cell's order
  double sigma = 0.0;
  Roof roof;
};

// Measures one cell. Throws run errors for figures that cannot be. `progress`: from 0 to 1.
ReproResult measure_cell(const ReproCell& cell, const ReproSetting& setting,
                         const std::function<void(double share)>& progress);

// All that a cell's figures depend on but the machine and the binary.
nlohmann::json cell_key(const ReproCell& cell, const ReproSetting& setting);
nlohmann::json result_json(const ReproResult& result);
// Throws an input error, naming `source`, where it is not what result_json() writes.
ReproResult parse_result(const nlohmann::json& object, const std::string& source);

}  // namespace vesper
