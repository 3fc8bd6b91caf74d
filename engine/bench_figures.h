// The figures of a decode benchmark: one row a model, context, batch and attention, each figure with its definition,
// and what a row must not claim.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/roof.h"
#include "engine/stage_clock.h"
#include "engine/statistics.h"

namespace vesper {

// What was measured. Times in seconds, one entry a decode step where nothing else is said.
struct BenchRow {
  std::string engine = "vesper";
  std::string model;
  std::string device;
  std::string weights;  // dtype or format
  std::string fill;     // "prefill" or "synthetic"
  std::string attention;
  int context = 0;
  int batch = 0;
  int max_tokens = 0;
  int repeats = 0;
  int layers = 0;
  std::optional<double> ttft_s;
  double prefill_flops = 0.0;     // of one prompt
  std::vector<double> step_s;     // end to end
  std::vector<double> device_s;   // of the same steps
  std::vector<double> tpot_s;     // the mean step of each repeat
  std::int64_t weight_bytes = 0;  // a step
  double kv_bytes = 0.0;          // a step, K and V
  double metadata_bytes = 0.0;    // a step
  double dense_kv_bytes = 0.0;    // a step, of all visible tokens
  double attention_s = 0.0;       // a step and layer
  bool sparse = false;            // whether any layer is to make lists
  std::int64_t lists = 0;         // that the device counted
  std::int64_t listed_tokens = 0;
  std::int64_t visible_tokens = 0;  // of the same sequences
  double kept_tokens = 0.0;         // a list, or a dense sequence
  double kept_tokens_p99 = 0.0;
  double kept_mass = 1.0;  // mean over the sparse layers' query heads
  double sigma = 0.0;      // mean over layers and query heads
  double sigma_least = 0.0;
  double sigma_largest = 0.0;
  Ratio speedup;                    // against the baseline; 1 for itself
  std::vector<StageFigure> stages;  // where they were asked for
  Roof roof;                        // probed in the same run
  std::int64_t cache_bytes = 0;
  std::int64_t peak_bytes = 0;
};

// Derived figures.
double mean_step_s(const BenchRow& row);
double step_bytes(const BenchRow& row);
// Flops a second up to the first token over the probed matrix rate; nothing without a prefill.
std::optional<double> prefill_share(const BenchRow& row);
// Bytes a second over the mean step, end to end; nothing where a step's bytes would fit the last cache four times over,
// since they say nothing about memory then.
std::optional<double> roof_share(const BenchRow& row);
// The speed-up over a dense step that no sparse method passes: all K and V bytes gone.
double speedup_ceiling(const BenchRow& row);

// A column of every output: its name, what it means in one sentence, and its value (null where it does not apply).
struct BenchColumn {
  std::string_view name;
  std::string_view meaning;
  nlohmann::json (*value)(const BenchRow& row);
};
std::span<const BenchColumn> bench_columns();

// A number, or null.
nlohmann::json optional_json(const std::optional<double>& value);
// A value as a field of CSV (RFC 4180); null is empty.
std::string csv_value(const nlohmann::json& value);

// One line of CSV each, without the newline.
std::string csv_head();
std::string csv_line(const BenchRow& row);

// Reading kernels have been seen 1 % over a probe's median; what is farther above it was not read.
inline constexpr double kRoofTolerance = 1.03;

// Throws a run error for a figure that cannot be: bytes over 1.03 x the roof probed in the same run, or a speed-up of
// an attention that is to be sparse whose device counters say that it read everything.
void check_row(const BenchRow& row);

// "1k,8k,32768" -> numbers; k is 1024. Each from 1 to `most`, none twice. `flag` is where the text came from. Throws an
// input error.
std::vector<int> parse_sizes(const std::string& text, const std::string& flag, int most);

// "2" or "1:5" -> least and largest, from 0.01 to 20. Throws an input error.
struct SigmaRange {
  double least = 0.0;
  double largest = 0.0;
};
SigmaRange parse_sigma(const std::string& text, const std::string& flag);

}  // namespace vesper
