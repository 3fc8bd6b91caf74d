// Times and byte bounds of the stages that attention runs in place, whatever they are.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "attention/config.h"
#include "attention/stage.h"
#include "engine/core/stream.h"

namespace vesper {

// A stage of the layers that share a backend and its settings; the stage "all" is their whole attention, from the first
// stage to the end of the last, and their part of the stage that they share (StageOwner), if there is one.
struct StageFigure {
  std::string backend;
  std::string stage;
  int layers = 0;             // that ran it
  double seconds = 0.0;       // a layer: the median over steps of the mean over layers
  double seam_seconds = 0.0;  // of marks, taken off (without_seams)
  Cost cost;                  // a layer, mean; nothing where it was not asked for
};

// Takes the marks of layers' stages: events on CUDA, where a graph that is captured meanwhile holds them as nodes and a
// replay sets them anew; the host's clock on a CPU. An event node takes time of its own, about 2 us on an H100, and
// ends the overlap of kernels at its seam.
class StageClock {
 public:
  // `inner`: stages each by itself; otherwise only "all".
  StageClock(DeviceKind device, int layers, bool inner);
  StageClock(const StageClock&) = delete;
  StageClock& operator=(const StageClock&) = delete;
  StageClock(StageClock&&) = delete;
  StageClock& operator=(StageClock&&) = delete;
  ~StageClock() = default;

  // A StageMark that refers to this clock.
  [[nodiscard]] StageMark mark();
  // While it is on, marks ask every stage for its cost: of a step that no graph holds.
  void ask_costs(bool wanted) { asks_ = wanted; }
  // Adds the times of the last step, which must be done.
  void read();

  // Median over the steps read of the mean over layers.
  [[nodiscard]] double layer_seconds() const;
  // `backends`: of each layer. In the order in which stages ran, "all" before those of its layers.
  [[nodiscard]] std::vector<StageFigure> figures(const std::vector<BackendConfig>& backends) const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Layer {
    std::vector<std::string> stages;  // of the last step that was marked
    std::vector<Cost> costs;
    std::vector<std::vector<double>> seconds;  // [stages][steps read]
    std::vector<double> whole;                 // [steps read]
    bool open = false;
    // The stage that this layer shares with others, in the last step that was marked; cost and time are its part.
    std::string shared;
    int first_sharer = 0;
    int sharers = 0;
    Cost shared_cost;
    std::vector<double> shared_seconds;  // [steps read]; none where nothing was shared
  };

  void take(const Exec& exec, const StageOwner& owner, std::string_view stage, const StageCost& cost);
  void take_shared(const Exec& exec, const StageOwner& owner, std::string_view stage, const std::optional<Cost>& ended);
  void record(const Exec& exec, int layer, std::size_t mark);
  [[nodiscard]] double between(std::size_t layer, std::size_t from, std::size_t to) const;

  bool cuda_;
  bool inner_;
  bool asks_ = false;
  std::vector<Layer> layers_;
  std::vector<Event> events_;               // [layers, marks]
  std::vector<Clock::time_point> moments_;  // likewise
  StageCost pending_;                       // of the stage that runs
};

// Figures of stages by themselves, with what marks added taken off: "all" becomes that of `whole`, which has marks at
// both ends alone, and what the stages come to beyond it is taken off each of them alike, so that they add up to it. A
// stage has nothing left at the least.
std::vector<StageFigure> without_seams(std::vector<StageFigure> stages, const std::vector<StageFigure>& whole);

}  // namespace vesper
