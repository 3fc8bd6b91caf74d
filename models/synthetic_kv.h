// Keys and values without a prompt: drawn, so that a cache can be filled to any depth at once, with scores that are as
// concentrated as one asks.
//
// A key of a (layer, KV head) is r (sqrt(a) u + sqrt(1 - a) w), with u of a run of kDrawnRun tokens and w of the token,
// both uniform in +-1 and independent in every channel. For a query q the scores q . k / sqrt(d) then have mean 0 and
// standard deviation sigma = |q| r / sqrt(3 d), and are normal to within their fourth cumulant, at most
// -1.2 sum q_d^4 / |q|^4 (about -0.03 at d = 128): the attention weights are lognormal, and sigma alone says how many
// tokens carry a given share of them. `a` is the correlation of neighbours' scores: what lets bounds of a page tell
// which of its keys score high. At 0 no page is better than another to a page selector, which real text is far from.
// A value is (m + w) / sqrt(2) at variance 1, with m of the sequence and w of the token: attention's output then has a
// length that does not vanish with the number of tokens, as that of real values has not; else an error relative to it
// could only be bounded by reading everything. Keys are stored as they are drawn, rotated by no angle, so that a run
// stays one. Source: ours; docs/bench.md.
#pragma once

#include <cstdint>

#include "engine/core/exec.h"
#include "engine/core/tensor.h"
#include "kvcache/batch.h"

namespace vesper {

struct DrawnKv {
  TensorView<const float, 2> key_range;  // [layers, kv_heads] r, on the step's device
  TensorView<const float, 1> no_turn;    // [head_dim / 2] zeros there: rotary frequencies
  float run_share = 0.0F;                // sqrt(a)
  float token_share = 1.0F;              // sqrt(1 - a)
  std::uint64_t seed = 0;
};

inline constexpr int kDrawnRun = 16;  // the default page

// Of values: variance 1, in equal shares the sequence's and the token's.
inline constexpr float kValueRange = 1.7320508F;
inline constexpr float kValueShare = 0.70710678F;

// Writes keys and values of the step's tokens for one layer; the queries of the rows are left as they are. Element c of
// the [k, v] part of a token has its u (m, of a value) and w from Philox at counters drawn_element() + c, key seed: so
// what a token gets depends on its sequence and position alone, sequences share nothing, and CPU and CUDA write the
// same bits.
//   qkv [tokens, (heads + 2 kv_heads) * head_dim]; on CUDA of a 16-bit type, head_dim a multiple of 4
void draw_kv(const Exec& exec, const DrawnKv& drawn, int layer, const Batch& batch, std::int64_t head_dim,
             const TensorRef& qkv);

// First number of the elements of a token (or of a run of them, `place` counting runs, or of a sequence, at place 0),
// and what keeps these draws apart from each other and from those of the weights.
VESPER_HD constexpr std::uint64_t drawn_element(std::int32_t request, std::int32_t place, std::int64_t columns) {
  return ((static_cast<std::uint64_t>(request) << 24) + static_cast<std::uint64_t>(place)) *
         static_cast<std::uint64_t>(columns);
}
VESPER_HD constexpr std::uint32_t drawn_tensor(int layer, bool shared) {
  return (shared ? 0xC0000000U : 0x80000000U) | static_cast<std::uint32_t>(layer);
}

namespace cpu {
void draw_kv(const DrawnKv& drawn, int layer, const Batch& batch, std::int64_t head_dim, TensorView<float, 2> qkv);
}  // namespace cpu
namespace cuda {
void draw_kv(const Exec& exec, const DrawnKv& drawn, int layer, const Batch& batch, std::int64_t head_dim,
             const TensorRef& qkv);
}  // namespace cuda

}  // namespace vesper
