// A cache at a depth, for measurements: by prefill of random ids, or with drawn keys whose scores have a chosen spread.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "engine/bench_figures.h"
#include "engine/core/buffer.h"
#include "engine/engine.h"

namespace vesper {

// Ids of prompt `number`, drawn from `seed` over the vocabulary.
std::vector<std::int32_t> drawn_ids(const ModelConfig& config, std::uint64_t seed, int number, int tokens);

// What drawn keys shall give: the spread of scores, and the correlation of neighbours' scores (models/synthetic_kv.h).
struct DrawnScores {
  SigmaRange sigma{2.0, 2.0};
  double locality = 0.9;
};

// Drawn keys for one engine, scaled so that the scores of the model's own queries have the spread asked for. A (layer,
// KV head) gets its spread from the range by the golden ratio's multiples, which cover it evenly and put neighbours
// apart. How long queries are is measured: a few decode steps over random ids, mean of |q|^2 over steps and the group's
// query heads. Norms fix that length where weights are drawn; a real model's changes somewhat with text and position,
// which is why a report states the spread that was met.
class SyntheticFill {
 public:
  // Runs decode steps of the attention in use. `engine` must have free pages for one short sequence, and outlive it.
  SyntheticFill(Engine& engine, const DrawnScores& scores, std::uint64_t seed);

  // Stores `tokens` tokens in an empty sequence. Pages must be reserved.
  void fill(CachedSequence& sequence, int tokens) const;

 private:
  Engine& engine_;
  std::uint64_t seed_;
  float run_share_;
  float token_share_;
  Buffer numbers_;  // on the device: ranges [layers, kv_heads], then zeros [head_dim / 2]
};

// The spread of q . k / sqrt(head_dim) over the keys of a sequence.
struct ScoreSpread {
  Moments of_heads;  // one standard deviation for each layer and query head
  double least = 0.0;
  double largest = 0.0;
};

// Takes one decode step, with the attention in use, of `sequences` and looks at the first of them: all of its keys,
// through score_tokens. Takes device memory of heads * tokens floats while it runs.
ScoreSpread measure_spread(Engine& engine, std::span<CachedSequence* const> sequences,
                           std::span<const std::int32_t> ids);

}  // namespace vesper
