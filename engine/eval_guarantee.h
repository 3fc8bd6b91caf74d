// Does vattention keep its promise: P(relative error > epsilon) <= delta for each head's denominator (and output)?
// A decode step's real queries, keys and values are attended to again and again, each time with fresh draws: replicas
// of the sequence that share its pages and length and differ in their request number, which is all that draws depend on
// besides layer, step and head. Exact values come from dense attention on the same device.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "engine/eval.h"
#include "engine/statistics.h"

namespace vesper {

struct GuaranteeOptions {
  int last = 4;      // tokens of each window that go through decode
  int seeds = 1000;  // replicas of each step
};

// Trials, and those beyond epsilon.
struct Misses {
  std::int64_t trials = 0;
  std::int64_t denominator = 0;
  std::int64_t output = 0;
  void add(const Misses& other);
};

// A query head. A trial is sampled where the sample left some of the rest out; the others are exact and cannot miss.
struct HeadTrials {
  Misses all;
  Misses sampled;
  void add(const HeadTrials& other);
};

// What one layer's trials came to. Lists are those of KV heads.
struct GuaranteeTrials {
  std::vector<HeadTrials> heads;
  Moments bias;  // of each list with a tail: mean over its heads of (D^ / D - 1) / epsilon
  // Z = (D^ - D) / (n_rest S sqrt(1 / b - 1 / n_rest)) of sampled trials, S being the true deviation of e^s over the
  // rest, all of its tokens counted, b the size that the pilot led to. Trials whose denominator is expected to be off
  // by less than 1e-4 of itself are left out: rounding would show.
  Moments deviate;
  std::vector<double> sample_shares;  // b / n_rest of each list with a tail
  std::int64_t lists = 0;
  std::int64_t whole_lists = 0;  // the sample became the whole rest
  std::int64_t short_lists = 0;  // the sequence was too short to sample and attended dense
  std::int64_t kept_tokens = 0;
  std::int64_t visible_tokens = 0;
  std::int64_t guard_hits = 0;
  // Steps and heads that were sampled at all, and those of them whose own rate of misses is over delta.
  std::int64_t instances = 0;
  std::int64_t instances_denominator = 0;
  std::int64_t instances_output = 0;
  void add(const GuaranteeTrials& other);
};

// A layer with vattention, with both answers to what the guard finds, from the same draws.
struct GuaranteeLayer {
  int number = 0;
  VAttentionConfig config;
  GuaranteeTrials report;
  GuaranteeTrials escalate;
  [[nodiscard]] const GuaranteeTrials& configured() const {
    return config.on_outlier == OnOutlier::kReport ? report : escalate;
  }
};

// Refuses a configuration without a vattention layer. `attention` is how it was asked for.
void check_guarantee(const AttentionConfig& config, const std::string& attention);

// One entry a layer with vattention; the engine decodes under its own attention, one sequence at a time. Deterministic
// for a seed of the run. `progress` counts replicas over all layers. Takes at most about 512 MiB on the device on top
// of the engine's memory plan, unless a single replica needs more.
std::vector<GuaranteeLayer> eval_guarantee(Engine& engine, std::span<const TokenIds> windows,
                                           const GuaranteeOptions& options, const Progress& progress);

}  // namespace vesper
