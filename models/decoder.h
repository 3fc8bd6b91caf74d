// The decoder stack: one forward pass, for prefill and decode alike.
#pragma once

#include <cstdint>
#include <span>

#include "attention/attention.h"
#include "engine/core/buffer.h"
#include "kvcache/kv_cache.h"
#include "models/rope_table.h"
#include "models/synthetic_kv.h"
#include "models/weights.h"

namespace vesper {

// Llama: pre-norm blocks of rotary attention and a gated feed-forward.
// Source: Touvron et al., arXiv 2302.13971 and 2307.09288; transformers, models/llama/modeling_llama.py.
// Holds the activations of one step; the weights and the cache must outlive it. Not thread-safe.
class Decoder {
 public:
  // Device memory that the activations of a step of up to `max_tokens` query tokens take.
  static std::int64_t activation_bytes(const ModelConfig& config, DType dtype, int max_tokens);

  Decoder(const ModelConfig& config, const ModelWeights& weights, KvCache& cache, int max_tokens, int max_seqs,
          const Exec& exec);

  // Before each step, outside of any capture: the rotary frequencies of its sequences (models/rope_table.h).
  //   lengths [seqs]: tokens that a sequence will hold after the step, or all of the prompt that the step is a part of
  void place(const Exec& exec, std::span<const int> lengths) { rope_table_.update(exec, lengths); }

  // Runs the step, for which `attention` is planned: appends K and V of its tokens to the cache and leaves the final
  // hidden states of all of them.
  void forward(const Exec& exec, ModelAttention& attention, const Batch& batch);

  // Stores the step's tokens with keys and values that are drawn, not computed (models/synthetic_kv.h), through the
  // append pass, in every layer. Query states are of no use after it.
  void append_drawn(const Exec& exec, const Batch& batch, const DrawnKv& drawn);

  // Logits of chosen query tokens of the last forward.
  //   rows [n] query token numbers, on the step's device;  out [n, vocab] f32
  void logits(const Exec& exec, TensorView<const std::int32_t, 1> rows, const TensorRef& out);
  // Logits of all of them, which are out's rows: of a decode step.
  void logits(const Exec& exec, const TensorRef& out);

 private:
  [[nodiscard]] TensorRef activation(int slot, std::int64_t rows) const;

  const ModelConfig& config_;
  const ModelWeights& weights_;
  KvCache& cache_;
  int max_tokens_;
  DType dtype_;
  RopeTable rope_table_;
  Buffer activations_;
  LinearContext linear_;
};

}  // namespace vesper
