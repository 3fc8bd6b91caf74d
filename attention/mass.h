// Probability masses as integers, and integers in the order of scores. With both, the set that top-p keeps is the same
// on every device and in any order of summation.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "engine/core/dtype.h"

namespace vesper {

// One IEEE operation each: the device compiler would fuse a product and a sum into other bits than the host's.
VESPER_HD inline float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
VESPER_HD inline float rounded_sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
VESPER_HD inline std::uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return std::bit_cast<std::uint32_t>(x);
#endif
}
VESPER_HD inline float float_of(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

inline constexpr std::uint32_t kSignBit = 0x80000000U;

// Unsigned, in the order of the scores; the two zeros are one, NaN counts as -inf.
VESPER_HD inline std::uint32_t order_of(float score) {
  constexpr std::uint32_t kInfinity = 0x7F800000U;
  std::uint32_t bits = bits_of(score);
  if ((bits & ~kSignBit) > kInfinity) bits = kSignBit | kInfinity;
  if ((bits & ~kSignBit) == 0) bits = 0;
  return (bits & kSignBit) != 0 ? ~bits : bits | kSignBit;
}
inline constexpr std::uint32_t kOrderOfMinusInfinity = 0x007FFFFFU;

// The score of an order; zero is positive.
VESPER_HD inline float score_of_order(std::uint32_t order) {
  return float_of((order & kSignBit) != 0 ? order & ~kSignBit : ~order);
}

// More candidates than this would overflow the sums of masses.
inline constexpr std::int64_t kMaxCandidates = std::int64_t{1} << 20;
inline constexpr int kMassBits = 40;  // of the largest score's mass

// floor(2^40 e^(score - largest)), the exponential being that of engine/core/lanes.h in one lane: its relative error
// and the difference's together stay under 2^-19 where the mass is not 0 (28.5 + 2.6 units of 2^-24; below -28.5 the
// mass is 0). The largest score itself, infinite or not, has 2^40; NaN has 0.
VESPER_HD inline std::uint64_t mass_of(float score, float largest) {
  float x = rounded_sum(score, -largest);
  x = x >= -87.0F ? x : -87.0F;     // whose mass is 0, as is that of NaN
  x = score == largest ? 0.0F : x;  // of infinite ones too
  const float to_integer = 0x1.8p23F;
  const float shifted = rounded_sum(rounded_product(x, 0x1.715476p0F), to_integer);
  const float n = rounded_sum(shifted, -to_integer);
  const float r = rounded_sum(rounded_sum(x, -rounded_product(n, 0x1.63p-1F)), rounded_product(n, 0x1.bd0106p-13F));
  float p = rounded_sum(rounded_product(r, 0x1.5dd1bap-10F), 0x1.11ea4ap-7F);
  p = rounded_sum(rounded_product(p, r), 0x1.55641ap-5F);
  p = rounded_sum(rounded_product(p, r), 0x1.5554fcp-3F);
  p = rounded_sum(rounded_product(p, r), 0x1.fffff6p-2F);
  p = rounded_sum(1.0F, rounded_sum(r, rounded_product(rounded_product(r, r), p)));
  const float power = float_of((bits_of(shifted) << 23) + (static_cast<std::uint32_t>(127 + kMassBits) << 23));
  return static_cast<std::uint64_t>(rounded_product(p, power));
}

// The sum of masses that a kept set must reach so that its true probability is at least top_p. True masses m and the
// integers f above obey f (1 - e) <= m < (f + 1)(1 + e), e = 2^-19; so (1 - p) M_kept >= p M_dropped follows from
//   F_kept >= p (F + candidates)(1 + e) / (1 - e + 2 p e).
// That is more than `total` where top_p is so near to 1 that only all candidates are enough. A set that is one score
// smaller than asked for has a true probability under top_p + 2^-19 + candidates 2^-39.
// `share` is share_to_keep(p), which has the division.
VESPER_HD inline double share_to_keep(float top_p) {
  const double p = top_p;
  return p / ((1.0 - 0x1p-19) + p * 0x1p-18);
}
VESPER_HD inline std::uint64_t mass_to_keep(double share, std::uint64_t total, std::int64_t candidates) {
  const std::uint64_t raised = total + static_cast<std::uint64_t>(candidates);
  return static_cast<std::uint64_t>(ceil(share * static_cast<double>(raised + (raised >> 19) + 1)));
}

// Bins of scores by their distance below the largest, an eighth each, which spreads attention scores well; the last
// takes all that is farther away, where masses are 0.
inline constexpr int kDistanceBins = 256;
VESPER_HD inline int distance_bin(float score, float largest) {
  if (score >= largest) return 0;
  const float eighths = rounded_product(rounded_sum(largest, -score), 8.0F);
  return eighths < static_cast<float>(kDistanceBins - 1) ? static_cast<int>(eighths) : kDistanceBins - 1;
}

}  // namespace vesper
