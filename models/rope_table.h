// The rotary frequencies of a decoder on its device.
#pragma once

#include <span>
#include <vector>

#include "engine/core/buffer.h"
#include "kvcache/append.h"
#include "models/rope.h"

namespace vesper {

// At one address as long as it lives, so that captured steps may look into it. One row of frequencies serves all
// sequences, except for dynamic ones: these follow a sequence's own length, so each sequence of a step has a row.
//
// Dynamic frequencies in a growing sequence are those of transformers' generate: a step rotates its own queries and
// keys by the length it brings the sequence to, and keys that are already stored keep the rotation they were stored
// with. A prompt counts whole, however many steps its prefill takes (CachedSequence::prompt_length). Unlike there,
// another, longer sequence before leaves no trace, and a rewound sequence has its shorter length again.
class RopeTable {
 public:
  RopeTable(const RopeConfig& rope, int head_dim, int max_seqs, const Exec& exec);

  // Before a step, outside of any capture: brings the rows of its sequences to these lengths and queues a copy where
  // one has changed. Nothing to do for other kinds than dynamic.
  void update(const Exec& exec, std::span<const int> lengths);

  [[nodiscard]] Rope rope() const;

 private:
  [[nodiscard]] bool is_dynamic() const { return rope_.kind == RopeKind::kDynamic; }
  [[nodiscard]] int pairs() const { return head_dim_ / 2; }

  RopeConfig rope_;
  int head_dim_;
  std::vector<int> lengths_;  // of each row, at least the original one
  std::vector<float> rows_;   // [rows, head_dim / 2]
  Buffer device_;             // the same
};

}  // namespace vesper
