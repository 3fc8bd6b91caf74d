#include "engine/stage_clock.h"

#include <algorithm>
#include <cassert>
#include <numeric>

#include "engine/statistics.h"

namespace vesper {
namespace {

constexpr std::size_t kMostMarks = 16;           // of a layer: more than any backend's stages and the end, and then
constexpr std::size_t kShared = kMostMarks - 2;  // the begin and the end of a shared stage

// The mean over layers of each step, then the median.
double median_of_means(const std::vector<const std::vector<double>*>& layers) {
  std::vector<double> means;
  for (std::size_t step = 0; step < layers.front()->size(); ++step) {
    double sum = 0.0;
    for (const std::vector<double>* layer : layers) sum += (*layer)[step];
    means.push_back(sum / static_cast<double>(layers.size()));
  }
  return quantile(means, 0.5);
}

}  // namespace

StageClock::StageClock(DeviceKind device, int layers, bool inner)
    : cuda_(device == DeviceKind::kCuda), inner_(inner), layers_(static_cast<std::size_t>(layers)) {
  if (cuda_) {
    events_.resize(layers_.size() * kMostMarks);
  } else {
    moments_.resize(layers_.size() * kMostMarks);
  }
}

StageMark StageClock::mark() {
  return [this](const Exec& exec, const StageOwner& owner, std::string_view stage, const StageCost& cost) {
    take(exec, owner, stage, cost);
  };
}

void StageClock::take(const Exec& exec, const StageOwner& owner, std::string_view stage, const StageCost& cost) {
  Layer& layer = layers_[static_cast<std::size_t>(owner.layer)];
  const std::optional<Cost> ended = asks_ && pending_ ? std::optional(pending_()) : std::nullopt;
  pending_ = asks_ && !stage.empty() ? cost : StageCost{};
  if (!owner.sharers.empty()) return take_shared(exec, owner, stage, ended);
  if (ended) layer.costs.push_back(*ended);
  if (!layer.open) {
    layer.stages.clear();
    layer.shared.clear();
    if (asks_) {
      layer.costs.clear();
      layer.shared_cost = {};
    }
  }
  const bool first = !layer.open;
  layer.open = !stage.empty();
  if (layer.open) layer.stages.emplace_back(stage);
  if (!first && !inner_ && layer.open) return;
  assert(layer.stages.size() < kShared);
  record(exec, owner.layer, inner_ ? layer.stages.size() - (layer.open ? 1 : 0) : layer.open ? 0 : 1);
}

void StageClock::take_shared(const Exec& exec, const StageOwner& owner, std::string_view stage,
                             const std::optional<Cost>& ended) {
  const auto count = static_cast<std::int64_t>(owner.sharers.size());
  for (const int sharer : owner.sharers) {
    Layer& layer = layers_[static_cast<std::size_t>(sharer)];
    if (ended) layer.shared_cost = {.bytes = ended->bytes / count, .flops = ended->flops / count};
    if (stage.empty()) continue;
    layer.shared = stage;
    layer.first_sharer = owner.layer;
    layer.sharers = static_cast<int>(count);
  }
  record(exec, owner.layer, stage.empty() ? kShared + 1 : kShared);
}

void StageClock::record(const Exec& exec, int number, std::size_t mark) {
  const std::size_t at = static_cast<std::size_t>(number) * kMostMarks + mark;
  if (cuda_) {
    events_[at].record(exec);
  } else {
    moments_[at] = Clock::now();
  }
}

double StageClock::between(std::size_t layer, std::size_t from, std::size_t to) const {
  const std::size_t first = layer * kMostMarks;
  if (cuda_) return static_cast<double>(events_[first + to].ms_since(events_[first + from])) * 1e-3;
  return std::chrono::duration<double>(moments_[first + to] - moments_[first + from]).count();
}

void StageClock::read() {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    layer.whole.push_back(between(l, 0, inner_ ? layer.stages.size() : 1));
    if (!layer.shared.empty()) {
      const auto first = static_cast<std::size_t>(layer.first_sharer);
      layer.shared_seconds.push_back(between(first, kShared, kShared + 1) / layer.sharers);
      layer.whole.back() += layer.shared_seconds.back();
    }
    if (!inner_) continue;
    layer.seconds.resize(layer.stages.size());
    for (std::size_t i = 0; i < layer.stages.size(); ++i) layer.seconds[i].push_back(between(l, i, i + 1));
  }
}

double StageClock::layer_seconds() const {
  std::vector<const std::vector<double>*> all;
  for (const Layer& layer : layers_) all.push_back(&layer.whole);
  return median_of_means(all);
}

std::vector<StageFigure> StageClock::figures(const std::vector<BackendConfig>& backends) const {
  std::vector<StageFigure> figures;
  std::vector<BackendConfig> done;
  for (const BackendConfig& config : backends) {
    if (std::find(done.begin(), done.end(), config) != done.end()) continue;
    done.push_back(config);
    std::vector<const Layer*> own;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (backends[l] == config) own.push_back(&layers_[l]);
    }
    const auto layers = static_cast<std::int64_t>(own.size());
    const auto figure = [&](const std::string& stage, const auto& times_of, const auto& cost_of) {
      std::vector<const std::vector<double>*> times;
      Cost cost;
      for (const Layer* layer : own) {
        times.push_back(times_of(*layer));
        cost = cost + cost_of(*layer);
      }
      figures.push_back({.backend = std::string(backend_name(config)),
                         .stage = stage,
                         .layers = static_cast<int>(layers),
                         .seconds = median_of_means(times),
                         .cost = {.bytes = cost.bytes / layers, .flops = cost.flops / layers}});
    };
    figure(
        "all", [](const Layer& layer) { return &layer.whole; },
        [](const Layer& layer) { return std::accumulate(layer.costs.begin(), layer.costs.end(), layer.shared_cost); });
    for (std::size_t i = 0; inner_ && i < own.front()->stages.size(); ++i) {
      figure(
          own.front()->stages[i], [i](const Layer& layer) { return &layer.seconds[i]; },
          [i](const Layer& layer) { return i < layer.costs.size() ? layer.costs[i] : Cost{}; });
    }
    if (inner_ && !own.front()->shared.empty()) {
      figure(
          own.front()->shared, [](const Layer& layer) { return &layer.shared_seconds; },
          [](const Layer& layer) { return layer.shared_cost; });
    }
  }
  return figures;
}

std::vector<StageFigure> without_seams(std::vector<StageFigure> stages, const std::vector<StageFigure>& whole) {
  std::size_t group = 0;
  for (std::size_t first = 0; first < stages.size(); ++group) {
    std::size_t last = first + 1;
    double sum = 0.0;
    while (last < stages.size() && stages[last].stage != "all") sum += stages[last++].seconds;
    assert(stages[first].stage == "all" && whole.at(group).stage == "all");
    stages[first].seconds = whole.at(group).seconds;
    const double seam =
        std::max(0.0, sum - stages[first].seconds) / static_cast<double>(std::max<std::size_t>(1, last - first - 1));
    for (std::size_t i = first + 1; i < last; ++i) {
      stages[i].seam_seconds = std::min(seam, stages[i].seconds);
      stages[i].seconds -= stages[i].seam_seconds;
    }
    first = last;
  }
  return stages;
}

}  // namespace vesper
