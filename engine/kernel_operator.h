// Whole attention operators, from rotated queries and stored keys to outputs: what a layer's decode step runs between
// its qkv product and its output product, alone, over cold data.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine/kernel_bench.h"
#include "engine/stage_clock.h"

namespace vesper {

// One attention at one context and batch. Everything is of a layer.
struct OperatorRow {
  std::string attention;
  std::vector<double> seconds;      // an entry a replay of all turns, in turns with the other attentions
  std::vector<StageFigure> stages;  // "all" first; taken apart, as of a step (docs/bench.md)
  double kv_bytes = 0.0;            // K and V read, by the device's counters
  double metadata_bytes = 0.0;      // side tables, and keys read for scores alone
  double dense_kv_bytes = 0.0;
  double kept_tokens = 0.0;  // a list, or a dense sequence
  double kept_tokens_p99 = 0.0;
  double kept_mass = 1.0;
  int turns = 0;  // layers of distinct data
  bool cold = false;
  std::string check;
};

struct OperatorReport {
  std::vector<OperatorRow> rows;       // in the order asked for; none where it does not fit
  std::optional<std::string> skipped;  // why
  double sigma = 0.0;                  // of the first sequence's scores
  Roof roof;
};

// Times every attention of `attentions` (shorthands, for all layers) over one world of the setting's one context and
// batch, in turns. The output of the first sequence and KV head is checked against the CPU's attention over the list
// that the device made. Throws a run error where it is not what it must be, or where bytes come to more than 1.03 x the
// read rate probed in the same run.
OperatorReport run_operators(const KernelSetting& setting, const std::vector<std::string>& attentions);

}  // namespace vesper
