// One engine of the decode benchmark, with all its attentions over one cache, measured at one context after the other.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "engine/bench.h"

namespace vesper {

// Options of an engine with all the setting's attentions, for contexts of at most `context`.
EngineOptions bench_engine_options(const BenchSetting& setting, WeightFormat weights, int context, int batch);

// Why an engine with these options would not fit what is free; nothing where it fits.
std::optional<std::string> does_not_fit(const BenchSetting& setting, const EngineOptions& options);

class BenchEngine {
 public:
  // `options`: of bench_engine_options. `setting` must outlive it.
  BenchEngine(const BenchSetting& setting, const EngineOptions& options, const Progress& loading);

  // A row for each attention, without the roof. Attentions take turns; `on_repeat` is called after each repeat of one.
  std::vector<BenchRow> measure(int context, const std::function<void()>& on_repeat);
  // The same without what needs looking at the device: sigma, attention_s, stages, kept mass and p99 stay empty.
  std::vector<BenchRow> measure_steps(int context, const std::function<void()>& on_repeat);

 private:
  std::vector<BenchRow> run(int context, bool looks, const std::function<void()>& on_repeat);
  [[nodiscard]] BenchRow new_row(int context, int arm) const;

  const BenchSetting& setting_;
  EngineOptions options_;
  Engine engine_;
  std::optional<SyntheticFill> drawn_;
};

}  // namespace vesper
