// From which context on a sparse attention's decode step is faster than the dense one, on this machine.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "engine/bench.h"

namespace vesper {

// What was measured at one context.
struct CrossoverPoint {
  int context = 0;
  Ratio speedup;       // over dense
  bool dense = false;  // the attention made no list: its budget covers the context
};

struct Crossover {
  std::string attention;
  std::vector<CrossoverPoint> points;  // by context
  // Contexts of at most so many tokens are no faster, as far as the intervals tell; 0 where the least context asked for
  // is faster already. Nothing where the largest is not.
  std::optional<int> dense_below;
};

struct CrossoverReport {
  std::vector<Crossover> crossovers;  // one for each sparse attention of the setting
  std::string device;
  std::string weights;
  std::optional<ClockState> clocks_before;
  std::optional<ClockState> clocks_after;
};

// Bisects between the least and the largest of the setting's contexts, in steps of equal ratio, down to a factor of
// 1.1. A context counts as faster where the whole 95 % interval of the speed-up lies above 1, and a longer context is
// taken to be faster where a shorter one is. Every context is measured once, with all attentions in turns. The setting
// has one batch and one weight format, dense as its baseline, two repeats or more, and no attention with a dense_below.
// Throws input errors.
CrossoverReport find_crossovers(const BenchSetting& setting, const BenchHooks& hooks);

// The crossover as a user writes it: "quest:token_budget=2048,dense_below=6144", and the rule of a configuration file.
// Of an attention that is a shorthand.
std::string crossover_shorthand(const Crossover& crossover);
std::string crossover_rule(const Crossover& crossover);

}  // namespace vesper
