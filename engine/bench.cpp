#include "engine/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "engine/bench_cell.h"
#include "engine/core/error.h"

namespace vesper {
namespace {

class Bench {
 public:
  Bench(const BenchSetting& setting, const BenchHooks& hooks) : setting_(setting), hooks_(hooks) {
    for (const int context : setting.contexts) {
      if (context > setting.max_tokens) continue;
      refuse({"planning the bench", fmt::format("--context {} with --max-tokens {}", context, setting.max_tokens),
              "a context of more tokens than are decoded in it", "raise --context or lower --max-tokens"});
    }
  }

  BenchReport run() {
    plan();
    const DeviceKind device = setting_.engine.limits.device;
    const auto probe = [&] { return hooks_.probe ? hooks_.probe() : probe_roof(device); };
    report_.roof = probe();
    report_.clocks_before = read_clocks();
    for (const BatchPlan& plan : plans_) run_batch(plan);
    report_.clocks_after = read_clocks();
    report_.roof = higher(report_.roof, probe());
    for (BenchRow& row : report_.rows) row.roof = report_.roof;
    for (const BenchRow& row : report_.rows) check_row(row);
    return std::move(report_);
  }

 private:
  struct BatchPlan {
    int batch = 0;
    EngineOptions options;
    std::vector<int> contexts;
  };

  // Which cells fit, before anything is loaded.
  void plan() {
    for (const WeightFormat weights : setting_.weights) {
      for (const int batch : setting_.batches) plan_batch(weights, batch);
    }
    if (plans_.empty()) {
      refuse({"planning the bench", report_.skipped[0], "at least one cell that does", "lower --context or --batch"});
    }
  }

  void plan_batch(WeightFormat weights, int batch) {
    BatchPlan fits{.batch = batch, .options = {}, .contexts = {}};
    for (const int context : setting_.contexts) {
      const EngineOptions options = bench_engine_options(setting_, weights, context, batch);
      if (const std::optional<std::string> reason = does_not_fit(setting_, options)) {
        report_.skipped.push_back(*reason);
        continue;
      }
      if (fits.contexts.empty() || context > fits.options.limits.max_context) fits.options = options;
      fits.contexts.push_back(context);
      total_ += cell_steps();
    }
    if (!fits.contexts.empty()) plans_.push_back(std::move(fits));
  }

  // Timed decode steps of a cell, which progress is counted in.
  [[nodiscard]] std::int64_t cell_steps() const {
    return static_cast<std::int64_t>(setting_.attentions.size()) * setting_.repeats * setting_.max_tokens;
  }

  void run_batch(const BatchPlan& plan) {
    restart_peak(Memory::kDevice);
    BenchEngine engine(setting_, plan.options, hooks_.loading);
    const auto on_repeat = [this] {
      done_ += setting_.max_tokens;
      if (hooks_.progress) hooks_.progress(done_, total_);
    };
    for (const int context : plan.contexts) {
      std::vector<BenchRow> rows = engine.measure(context, on_repeat);
      std::move(rows.begin(), rows.end(), std::back_inserter(report_.rows));
    }
  }

  const BenchSetting& setting_;
  const BenchHooks& hooks_;
  BenchReport report_;
  std::vector<BatchPlan> plans_;
  std::int64_t done_ = 0;
  std::int64_t total_ = 0;
};

}  // namespace

BenchReport run_bench(const BenchSetting& setting, const BenchHooks& hooks) {
  return Bench(setting, hooks).run();
}

}  // namespace vesper
