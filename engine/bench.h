// The decode benchmark: several attentions over one cache, at every context and batch asked for, measured in turns.
//
// For each weight format and batch size one engine is built, and for each context its sequences, with keys and values
// of their own on shuffled pages, are filled once to context - max_tokens tokens. A repeat rewinds the cache and
// decodes max_tokens tokens greedily, end-of-sequence tokens being no end; the attentions take turns, A B A B, so that
// what drifts (clocks, temperature, neighbours) drifts for all of them. An attention appends to its own side tables
// only (ModelAttention::written), so that none pays for another's; rewinding leaves nothing to rebuild, since every
// page that a repeat writes to has its tables remade by the repeat's own steps. What needs looking at the device (kept
// tokens one by one, kept mass, the spread of scores, the time of attention alone) is taken in further steps that are
// not timed.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "engine/bench_fill.h"
#include "engine/core/clocks.h"
#include "engine/engine.h"

namespace vesper {

enum class BenchFill : std::uint8_t { kPrefill, kSynthetic };

struct BenchSetting {
  std::string model;
  EngineOptions engine;  // device, pages, prefill chunk, seed; the lists below set the rest
  std::vector<WeightFormat> weights = {WeightFormat::kStored};
  std::vector<int> contexts;
  std::vector<int> batches;
  std::vector<std::string> attentions;  // as --attention
  int baseline = 0;                     // which of them speed-ups are against
  int max_tokens = 32;                  // less than every context
  int repeats = 5;
  BenchFill fill = BenchFill::kPrefill;
  DrawnScores scores;   // of a synthetic fill
  bool stages = false;  // also time each stage of attention by itself
};

struct BenchReport {
  std::vector<BenchRow> rows;
  std::vector<std::string> skipped;  // cells that do not fit, a sentence each
  Roof roof;                         // the higher of two measurements, before and after
  std::optional<ClockState> clocks_before;
  std::optional<ClockState> clocks_after;
};

struct BenchHooks {
  std::function<Roof()> probe;  // measures the rulers; where it is empty, probe_roof
  Progress loading;             // of weights
  std::function<void(std::int64_t done, std::int64_t total)> progress;  // of the measurement, in decode steps
};

// Runs the whole cross product. Throws an input error where nothing of it fits or a context leaves no room for
// max_tokens, and a run error for a figure that cannot be (check_row).
BenchReport run_bench(const BenchSetting& setting, const BenchHooks& hooks);

}  // namespace vesper
