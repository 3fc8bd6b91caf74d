// Dense attention on what a layer has just attended with, read back to the host: sparse results are measured against
// it.
#pragma once

#include <span>
#include <vector>

#include "attention/attention.h"
#include "engine/core/stream.h"
#include "engine/engine.h"

namespace vesper {

// Copies from the device. Waits.
std::vector<float> read_floats(const Exec& exec, const TensorRef& tensor);
template <typename T, int Rank>
std::vector<std::remove_const_t<T>> read_back(const Exec& exec, TensorView<T, Rank> view) {
  std::vector<std::remove_const_t<T>> values(static_cast<std::size_t>(view.size()));
  copy_bytes(exec, values.data(), view.data(), view.size() * static_cast<std::int64_t>(sizeof(T)));
  synchronize(exec);
  return values;
}

// |found - expected| / |expected|; 0 where both are zero, infinite where only `expected` is.
double relative_error(std::span<const float> found, std::span<const float> expected);

class ExactStep {
 public:
  // `limits`: of the steps to come.
  explicit ExactStep(const AttentionLimits& limits);

  // Waits.
  void run(const Exec& exec, const AttendedLayer& layer);

  // Of the last run, of the query head `row` = s * heads + h.
  [[nodiscard]] std::span<const float> out(std::size_t row) const;      // [head_dim]
  [[nodiscard]] float lse(std::size_t row) const { return lse_[row]; }  // natural log of the softmax denominator

 private:
  AttentionLimits limits_;
  DenseAttention dense_;
  Buffer device_out_;
  Buffer device_lse_;
  std::vector<float> out_;
  std::vector<float> lse_;
};

// Lets a probe look at an engine's decode steps while it lives.
class ProbeScope {
 public:
  ProbeScope(Engine& engine, AttentionProbe probe) : engine_(engine) { engine_.set_attention_probe(std::move(probe)); }
  ~ProbeScope() { engine_.set_attention_probe({}); }
  ProbeScope(const ProbeScope&) = delete;
  ProbeScope& operator=(const ProbeScope&) = delete;
  ProbeScope(ProbeScope&&) = delete;
  ProbeScope& operator=(ProbeScope&&) = delete;

 private:
  Engine& engine_;
};

}  // namespace vesper
