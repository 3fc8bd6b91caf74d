// Quality of a model under its attention, measured through the decode path: the beginning of a window is prefilled, its
// last tokens go through decode one by one, whatever the model would have said itself (teacher forcing). So every layer
// answers for them with its own backend.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/eval_attention.h"

namespace vesper {

using TokenIds = std::vector<std::int32_t>;

// Token ids from a file of little-endian 16-bit numbers. Throws an input error where it cannot be read or holds half a
// number.
TokenIds read_u16_ids(const std::string& path);

// How windows of context + 1 ids are cut from a text: the last id is only a target.
struct WindowCut {
  int context = 0;
  int windows = 1;                    // one after the other from the start, where no offsets are given
  std::vector<std::int64_t> offsets;  // of each window's first id
  int bos_id = -1;                    // >= 0: every window starts with it, and takes one id less
};

// Throws an input error where a window reaches past the end of `ids`. `source` names them.
std::vector<TokenIds> cut_windows(const TokenIds& ids, const WindowCut& cut, const std::string& source);

// Stores `ids` behind what `sequence` holds, by prefill in chunks. `on_step` is told each step's tokens.
// Pages must be reserved.
void prefill_in_chunks(Engine& engine, CachedSequence& sequence, std::span<const std::int32_t> ids,
                       const std::function<void(int tokens)>& on_step);

// Feeds `ids` to a sequence of its own, which serves request number `request`: the last `decoded` of them by decode,
// those before by prefill. `on_logits` gets the position of each decoded id and the logits [vocab] that follow it.
// Throws an input error where they exceed the engine's context.
void feed_through_decode(Engine& engine, int request, std::span<const std::int32_t> ids, int decoded,
                         const std::function<void(int position, std::span<const float> logits)>& on_logits,
                         const std::function<void(int tokens)>& on_step);

// Index of the largest logit, the lowest among equals.
std::int32_t likeliest(std::span<const float> logits);

struct Perplexity {
  std::vector<double> window_nll;  // mean negative natural log likelihood of each window's targets

  [[nodiscard]] double nll() const;
  [[nodiscard]] double perplexity() const;  // e^nll
};

// The last `last` targets of each window; 1 <= last <= context. `progress` counts tokens fed.
Perplexity eval_perplexity(Engine& engine, std::span<const TokenIds> windows, int last, const Progress& progress);

// Logits [windows * last, vocab] of the same positions, for eval_fidelity.
std::vector<float> decode_logits(Engine& engine, std::span<const TokenIds> windows, int last, const Progress& progress);

// How far the next-token distributions of an engine are from a reference, and each layer's attention from dense.
struct Fidelity {
  double kl_mean = 0.0;  // of KL(reference || engine) over all positions, in nats
  double kl_p99 = 0.0;
  double kl_max = 0.0;
  double top1_agreement = 0.0;  // share of positions where both name the same likeliest token
  Perplexity reference;
  Perplexity engine;
  std::vector<LayerFidelity> layers;
};

//   reference: decode_logits() of the same windows and `last`
Fidelity eval_fidelity(Engine& engine, std::span<const TokenIds> windows, int last, std::span<const float> reference,
                       const Progress& progress);

}  // namespace vesper
