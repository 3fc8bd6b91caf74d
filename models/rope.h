// Rotary frequencies: what a config.json says of them, and the numbers that follow.
//
// A position p turns channel pair d of head_dim / 2 by the angle p * inv_freq[d]. Unscaled, inv_freq[d] =
// theta^(-2d / head_dim); the other kinds stretch it so that a model reaches further than it was trained.
// Sources: Su et al., "RoFormer", arXiv 2104.09864; transformers, modeling_rope_utils.py, whose fp32 arithmetic is
// followed step by step, since at position 10^5 one part in 10^7 of a frequency is a hundredth of a radian.
#pragma once

#include <string>
#include <vector>

#include "models/config_keys.h"

namespace vesper {

enum class RopeKind : std::uint8_t {
  kDefault,
  kLinear,   // all frequencies divided by the factor: Chen et al., arXiv 2306.15595
  kDynamic,  // theta grows with the length beyond the original one: "dynamic NTK", u/emozilla and u/bloc97, 2023
  kLlama3,   // low frequencies divided, high ones kept, a ramp between: Llama 3.1's own release
  kYarn,     // the same by counts of rotations, and warmer scores: Peng et al., arXiv 2309.00071
};

struct RopeConfig {
  RopeKind kind = RopeKind::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  int original_positions = 0;     // dynamic, llama3, yarn: the length that was trained before stretching
  double low_freq_factor = 1.0;   // llama3: wavelengths above original / low are divided
  double high_freq_factor = 4.0;  // llama3: wavelengths below original / high are kept
  double beta_fast = 32.0;        // yarn: pairs of more rotations over the original length are kept
  double beta_slow = 1.0;         // yarn: pairs of fewer are divided
  bool truncate = true;           // yarn: the ramp begins and ends on whole pairs
  double attention_factor = 1.0;  // yarn: on cos and sin, so that scores are multiplied by its square
};

// Reads rope_scaling (until transformers 5) or rope_parameters (since), theta inside of it or beside it. As in
// transformers: rope_scaling wins where both are there; the kind is "rope_type", or else "type"; keys that the kind
// does not know are ignored; an original length that is absent is max_positions. Other kinds (longrope, su, ...) are
// refused by name with the list of the known, wrong values by key.
RopeConfig read_rope(const ConfigKeys& keys, double default_theta, int head_dim, int max_positions);

// [head_dim / 2] frequencies. `length` matters to dynamic only: tokens of the sequence, those of the step included.
std::vector<float> rope_inv_freq(const RopeConfig& rope, int head_dim, int length);

// "theta 10000", "theta 500000, llama3 x 8 over 8192": for people.
std::string describe(const RopeConfig& rope);

}  // namespace vesper
