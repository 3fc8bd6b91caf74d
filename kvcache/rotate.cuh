// Rotary embedding of one channel pair on the device; formulas in kvcache/append.h. Products and sums are spelt out, so
// that every kernel that rotates gives the same bits.
#pragma once

#include "kvcache/append.h"

namespace vesper::cuda {

// (cos, sin) of the angle of channel pair d for a query token at `position` of sequence `seq` of the step.
__device__ inline float2 rotary_turn(const Rope& rope, int seq, int position, int d) {
  const float frequency = rope.inv_freq.data()[static_cast<std::int64_t>(seq) * rope.seq_stride + d];
  float sine;
  float cosine;
  sincosf(static_cast<float>(position) * frequency, &sine, &cosine);
  return {cosine * rope.attention_factor, sine * rope.attention_factor};
}

__device__ inline float rotated_low(float low, float high, float2 turn) {
  return fmaf(low, turn.x, -(high * turn.y));
}
__device__ inline float rotated_high(float low, float high, float2 turn) {
  return fmaf(high, turn.x, low * turn.y);
}

}  // namespace vesper::cuda
