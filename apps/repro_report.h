// What `vesper repro` prints and saves.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>

#include "engine/core/clocks.h"
#include "engine/repro_rows.h"

namespace vesper {

// What the rows were measured on.
struct ReproRun {
  std::string command;
  std::string binary;  // version and build
  std::string device;
  DeviceKind kind = DeviceKind::kCpu;
  Roof roof;  // the highest of the cells'
  std::optional<ClockState> clocks_before;
  std::optional<ClockState> clocks_after;
};

// The experiment in words, a table a panel, what the words of the verdicts mean, what was left out.
std::string repro_markdown(const Experiment& experiment, const ReproRun& run, std::span<const ReproRow> rows);
// {"experiment", "title", "paper", "run", "rows": [a member for each of repro_columns()]}.
nlohmann::json repro_json(const Experiment& experiment, const ReproRun& run, std::span<const ReproRow> rows);
// A head and a line a row.
std::string repro_csv(std::span<const ReproRow> rows);

// The columns and the words of the verdicts, a line each: for --help.
std::string repro_definitions();

}  // namespace vesper
