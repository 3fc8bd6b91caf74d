#include "engine/crossover.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "engine/bench_cell.h"
#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr double kNear = 1.1;     // the two ends of an answer are no farther apart
constexpr int kContextUnit = 64;  // measured contexts are multiples of it

void check(const BenchSetting& setting) {
  const std::string doing = "planning the crossover";
  if (setting.contexts.size() != 2 || setting.contexts[0] >= setting.contexts[1]) {
    refuse({doing, fmt::format("{} contexts", setting.contexts.size()),
            "the least and the largest, as in --context 1k,64k", ""});
  }
  if (setting.batches.size() != 1 || setting.weights.size() != 1) {
    refuse({doing, "several batches or weight formats", "one of each", "run it once for each"});
  }
  if (setting.repeats < 2) refuse({doing, "one repeat", "two or more: it goes by intervals", "raise --repeats"});
  if (setting.contexts[0] <= setting.max_tokens) {
    refuse({doing, fmt::format("a context of {} with --max-tokens {}", setting.contexts[0], setting.max_tokens),
            "a context of more tokens than are decoded in it", "raise --context or lower --max-tokens"});
  }
  const int layers = model_config_of(setting.model).layers;
  int sparse = 0;
  for (std::size_t i = 0; i < setting.attentions.size(); ++i) {
    const std::vector<BackendConfig> backends = parse_attention(setting.attentions[i], layers).layers;
    const bool dense = std::all_of(backends.begin(), backends.end(), [](const BackendConfig& layer) {
      return std::holds_alternative<DenseConfig>(layer.settings);
    });
    const auto number = static_cast<int>(i);
    if (dense != (number == setting.baseline)) {
      refuse({doing, setting.attentions[i], "dense as the baseline, and sparse attentions beside it", ""});
    }
    sparse += dense ? 0 : 1;
    for (const BackendConfig& layer : backends) {
      if (layer.dense_below == 0) continue;
      refuse({doing, fmt::format("dense_below in {}", setting.attentions[i]), "none: it is what is looked for", ""});
    }
  }
  if (sparse == 0) refuse({doing, "dense alone", "a sparse attention beside it", "add one to --attention"});
}

bool is_faster(const CrossoverPoint& point) {
  return !point.dense && point.speedup.low && *point.speedup.low > 1.0;
}

// The next context to measure between two measured ones; nothing where they are near enough.
std::optional<int> between(int low, int high) {
  if (high <= low * kNear) return {};
  const int middle =
      static_cast<int>(std::lround(std::sqrt(static_cast<double>(low) * high) / kContextUnit)) * kContextUnit;
  if (middle <= low || middle >= high) return {};
  return middle;
}

class Search {
 public:
  Search(const BenchSetting& setting, const BenchHooks& hooks) : setting_(setting), hooks_(hooks) {}

  CrossoverReport run() {
    const EngineOptions options =
        bench_engine_options(setting_, setting_.weights[0], setting_.contexts[1], setting_.batches[0]);
    if (const std::optional<std::string> reason = does_not_fit(setting_, options)) {
      refuse({"planning the crossover", *reason, "the largest context to fit", "lower --context or --batch"});
    }
    BenchEngine engine(setting_, options, hooks_.loading);
    CrossoverReport report;
    report.clocks_before = read_clocks();
    for (std::size_t arm = 0; arm < setting_.attentions.size(); ++arm) {
      if (static_cast<int>(arm) != setting_.baseline) report.crossovers.push_back(search(engine, arm));
    }
    report.clocks_after = read_clocks();
    report.device = measured_.begin()->second[0].device;
    report.weights = measured_.begin()->second[0].weights;
    return report;
  }

 private:
  // Steps of this many contexts are to come at most.
  [[nodiscard]] int most_contexts() const {
    const double span = std::log(static_cast<double>(setting_.contexts[1]) / setting_.contexts[0]) / std::log(kNear);
    return 2 + static_cast<int>(std::ceil(std::log2(std::max(2.0, span)))) *
                   static_cast<int>(setting_.attentions.size() - 1);
  }

  const std::vector<BenchRow>& measure(BenchEngine& engine, int context) {
    const auto found = measured_.find(context);
    if (found != measured_.end()) return found->second;
    const auto arms = static_cast<std::int64_t>(setting_.attentions.size());
    const std::int64_t steps = arms * setting_.repeats * setting_.max_tokens;
    const auto contexts = static_cast<std::int64_t>(measured_.size());
    const std::int64_t total = steps * std::max<std::int64_t>(most_contexts(), contexts + 1);
    std::int64_t done = contexts * steps;
    return measured_[context] = engine.measure_steps(context, [&] {
      done += setting_.max_tokens;
      if (hooks_.progress) hooks_.progress(done, total);
    });
  }

  Crossover search(BenchEngine& engine, std::size_t arm) {
    Crossover crossover{.attention = setting_.attentions[arm], .points = {}, .dense_below = {}};
    const auto faster = [&](int context) {
      const BenchRow& row = measure(engine, context)[arm];
      const CrossoverPoint point{.context = context, .speedup = row.speedup, .dense = row.lists == 0};
      crossover.points.push_back(point);
      return is_faster(point);
    };
    int low = setting_.contexts[0];
    int high = setting_.contexts[1];
    const bool at_most = faster(high);
    if (at_most && faster(low)) {
      crossover.dense_below = 0;
    } else if (at_most) {
      while (const std::optional<int> middle = between(low, high)) (faster(*middle) ? high : low) = *middle;
      crossover.dense_below = low;
    }
    std::sort(crossover.points.begin(), crossover.points.end(),
              [](const CrossoverPoint& a, const CrossoverPoint& b) { return a.context < b.context; });
    return crossover;
  }

  const BenchSetting& setting_;
  const BenchHooks& hooks_;
  std::map<int, std::vector<BenchRow>> measured_;
};

}  // namespace

CrossoverReport find_crossovers(const BenchSetting& setting, const BenchHooks& hooks) {
  check(setting);
  return Search(setting, hooks).run();
}

std::string crossover_shorthand(const Crossover& crossover) {
  const std::string& text = crossover.attention;
  return fmt::format("{}{}dense_below={}", text, text.find(':') == std::string::npos ? ':' : ',',
                     crossover.dense_below.value_or(0));
}

std::string crossover_rule(const Crossover& crossover) {
  return shorthand_rule(crossover_shorthand(crossover));
}

}  // namespace vesper
