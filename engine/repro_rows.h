// A paper's numbers and ours, side by side, and what comes of it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/repro_cells.h"
#include "engine/statistics.h"

namespace vesper {

// Another engine's dense attention on this machine, out of a CSV of apps/peers.
struct PeerTime {
  std::string engine;
  std::string model;
  int context = 0;
  int batch = 0;
  double attention_us = 0.0;
};
// Reads what has an attention_us. Throws an input error where `text`, the content of `source`, has not these columns.
std::vector<PeerTime> parse_peers(const std::string& text, const std::string& source);

// Where a row has no number, it does not apply.
struct ReproRow {
  const ReproPanel* panel = nullptr;
  const ReproLine* line = nullptr;
  std::string model;
  int context = 0;
  std::optional<double> paper;     // in the panel's unit, like the three below
  std::optional<double> ours;      // not where the unit is a speed-up: over something else than ours would be
  std::optional<double> ours_low;  // of times the least and the most, of ratios the 95 % interval
  std::optional<double> ours_high;
  std::optional<double> time_us;        // ours, whatever the unit: the median
  std::optional<double> bound_us;       // the bytes at the read rate probed in the same run
  std::optional<double> bound_share;    // bound / time; nothing where data need not come from memory
  std::optional<double> paper_speedup;  // over the panel's baseline, as the paper's numbers have it
  Ratio speedup;                        // ours
  std::optional<double> speedup_bound;  // bytes of the baseline / bytes
  std::optional<double> kept_tokens;
  std::optional<double> kept_tokens_p99;
  std::optional<double> kept_share;
  std::optional<double> kept_mass;
  std::optional<double> sigma;
  std::string peer;
  std::optional<double> peer_us;
  std::optional<double> peer_speedup;
  std::string verdict;
  std::string note;
};

// A row for every line and context of every panel. `experiment` must outlive them.
//   results: of plan_cells(experiment);  judged: whether times say anything, which a CPU's do not
std::vector<ReproRow> make_rows(const Experiment& experiment, std::span<const ReproCell> cells,
                                std::span<const ReproResult> results, std::span<const PeerTime> peers, bool judged);

// The words of a verdict and what each means.
struct Verdict {
  std::string_view word;
  std::string_view meaning;
};
std::span<const Verdict> verdicts();

// A column of CSV and a member of JSON.
struct ReproColumn {
  std::string_view name;
  std::string_view meaning;
  nlohmann::json (*value)(const ReproRow& row);
};
std::span<const ReproColumn> repro_columns();

}  // namespace vesper
