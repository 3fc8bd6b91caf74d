// Experiments of papers as files say them: configs/repro/NAME.json.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/bench_fill.h"
#include "models/weight_format.h"

namespace vesper {

// What is timed: a layer's attention alone over cold data (engine/kernel_operator.h), or whole decode steps
// (engine/bench.h).
enum class ReproMeasure : std::uint8_t { kOperator, kStep };

// What a panel's numbers are: microseconds, milliseconds, times faster than the baseline, or a share of its time.
enum class ReproUnit : std::uint8_t { kUs, kMs, kTimes, kShare };
std::string_view unit_name(ReproUnit unit);  // "us", "ms", "x", "of baseline"

// One curve of a figure or row of a table, over the contexts of its panel.
struct ReproLine {
  std::string label;                         // as the paper calls it
  std::string attention;                     // a shorthand
  std::vector<std::string> stages;           // whose times are added up; empty: the whole
  bool part = false;                         // of another line of the panel, and judged with it
  std::vector<std::optional<double>> paper;  // one for each context; nothing where the paper prints none
};

struct ReproPanel {
  std::string name;
  std::string source;  // "figure 9"
  std::string gpu;     // the paper's
  ReproMeasure measure = ReproMeasure::kOperator;
  std::string model;
  WeightFormat weights = WeightFormat::kStored;
  int batch = 1;
  DrawnScores scores;
  ReproUnit unit = ReproUnit::kUs;
  std::string baseline;  // an attention
  std::vector<int> contexts;
  std::vector<ReproLine> lines;
};

struct Experiment {
  std::string name;
  std::string title;
  std::string paper;
  std::vector<std::string> about;   // what the paper's numbers stand for, a paragraph each
  std::vector<std::string> limits;  // what the paper leaves undefined or a card cannot do, and what is run instead
  std::vector<int> quick_contexts;  // of --quick
  std::vector<int> quick_batches;
  std::vector<ReproPanel> panels;
};

// Strict: unknown keys and values out of range are input errors that say what is known.
Experiment parse_experiment(const nlohmann::json& document, const std::string& name, const std::string& source);
// Those of configs/repro, by name. An unknown name lists the known ones.
std::vector<std::string> experiment_names();
Experiment load_experiment(const std::string& name);

// What --quick leaves of it.
Experiment quick_part(const Experiment& whole);

}  // namespace vesper
