// What sparse attention read in a run, for people and for programs.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "attention/attention.h"

namespace vesper {

// "0-1", "5": runs of neighbouring layers that `same` holds equal, as (first, last).
std::vector<std::pair<int, int>> layer_runs(const AttentionConfig& attention);
std::string layer_range(int first, int last);

// A line for each run of sparse layers: kept share, bytes against dense, sample and guard. Nothing for dense layers. A
// layer that never made a list says so.
std::vector<std::string> attention_report(const AttentionConfig& attention, const std::vector<AttentionTotals>& totals);

// The same as [{"layers", "backend", "steps", "sparse_steps", "kept_share", ...}]; shares are null where no layer of
// the run made a list.
nlohmann::json attention_report_json(const AttentionConfig& attention, const std::vector<AttentionTotals>& totals);

}  // namespace vesper
