// What sparse attention costs each layer: its output against that of dense attention on the same query and cache, and
// how much of the softmax its list carries. Measured by a probe, beside a decode that runs as ever.
#pragma once

#include <string>
#include <vector>

#include "engine/exact_step.h"

namespace vesper {

// Values of every decode step. A step that attended dense has error 0, and keeps everything.
struct LayerFidelity {
  std::string backend;
  std::int64_t steps = 0;
  std::int64_t sparse_steps = 0;
  std::vector<std::vector<double>> error;       // [heads][steps] |out - dense| / |dense|
  std::vector<std::vector<double>> kept_mass;   // [heads][steps] share of the denominator on listed tokens, weight 1
  std::vector<std::vector<double>> kept_share;  // [kv_heads][steps] listed tokens of all visible ones
};

class AttentionFidelity {
 public:
  // `engine` must outlive it; what it takes on the device comes on top of the engine's memory plan.
  explicit AttentionFidelity(const Engine& engine);
  // Of steps that no engine takes: what their attention was built for, and each layer's backend.
  AttentionFidelity(const AttentionLimits& limits, const std::vector<BackendConfig>& backends);

  void look(const Exec& exec, const AttendedLayer& layer);

  // One entry a layer.
  [[nodiscard]] const std::vector<LayerFidelity>& layers() const { return layers_; }

 private:
  // Log-sum-exp [seqs * heads] of the listed tokens, each with weight 1.
  std::vector<float> listed_lse(const Exec& exec, const AttendedLayer& layer);

  AttentionLimits limits_;
  ExactStep exact_;
  Buffer partials_;
  Buffer out_;
  Buffer lse_;
  Buffer no_weight_;  // [seqs, kv_heads] zeros
  std::vector<LayerFidelity> layers_;
};

}  // namespace vesper
