// The residual of a static part: the tokens that are not on it, numbered 0 ... n_rest - 1 in order. Which of them are
// drawn and how many, to the same bits on host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "engine/core/philox.h"

namespace vesper {

// What a permutation of the residual depends on, and nothing else.
struct DrawKey {
  std::uint32_t seed = 0;
  std::uint32_t request = 0;
  std::uint32_t step = 0;  // kv_len - 1
  std::uint32_t layer = 0;
  std::uint32_t kv_head = 0;
};

// Where two inputs meet in their right halves of b bits, the share of pairs that a round leaves wrong shrinks by 2^-b;
// six rounds leave 2^-12 of the pairs of 16 residuals, the smallest that is worth sampling, and less of larger ones.
inline constexpr std::uint32_t kDrawRounds = 6;

// Draw i is residual number pi(i), pi being a permutation of [0, n_rest) that the key chooses: a balanced Feistel
// network over the next even power of two, at least 4, with Philox as its round function, walked along its cycle until
// it lands inside. So draws are distinct, any prefix of them is a uniform sample without replacement, and a sample
// grows by appending.
//   0 <= i < n_rest
// Sources: Luby, Rackoff, SIAM J. Comput. 17(2), 1988; Black, Rogaway, "Ciphers with arbitrary finite domains", 2002.
VESPER_HD inline std::int32_t residual_draw(std::int32_t i, std::int32_t n_rest, const DrawKey& key) {
  int bits = 1;  // of a half, at most 16
  while ((std::int64_t{1} << (2 * bits)) < n_rest) ++bits;
  const std::uint32_t mask = (std::uint32_t{1} << bits) - 1;
  auto at = static_cast<std::uint32_t>(i);
  do {
    std::uint32_t left = at >> bits;
    std::uint32_t right = at & mask;
    for (std::uint32_t round = 0; round < kDrawRounds; ++round) {
      // The sampler of tokens has 0 as the second word of its key.
      const PhiloxCounter random =
          philox({{right | round << 16, key.step, key.request, key.kv_head}}, {{key.seed, key.layer + 1}});
      const std::uint32_t mixed = left ^ (random.word[0] & mask);
      left = right;
      right = mixed;
    }
    at = left << bits | right;
  } while (at >= static_cast<std::uint32_t>(n_rest));
  return static_cast<std::int32_t>(at);
}

// The token that is residual number r, where `on_static` [static_count] is ascending: r plus the static tokens that
// have at most r residual ones before them, which are a prefix.
VESPER_HD inline std::int32_t residual_token(std::int32_t r, const std::int32_t* on_static, std::int32_t static_count) {
  std::int32_t low = 0;
  std::int32_t high = static_count;
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (on_static[middle] - middle <= r) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return r + low;
}

// Unbiased variance of n >= 2 numbers. Sums in fp64, so that nothing is lost where the mean is large.
VESPER_HD inline double unbiased_variance(double sum, double sum_of_squares, double n) {
  const double deviations = sum_of_squares - sum * sum / n;
  return deviations < 0.0 ? 0.0 : deviations / (n - 1.0);
}

// How many of n_rest numbers of this variance must be drawn without replacement, so that n_rest times their mean misses
// their sum by more than `tolerance` in one case of those that the two-sided quantile z leaves out: b' = b / (1 + b /
// n_rest), b = (z n_rest sd / tolerance)^2. Where the numbers are equal, none.
VESPER_HD inline double draws_for(double z, double n_rest, double variance, double tolerance) {
  if (variance == 0.0) return 0.0;
  const double ratio = z * n_rest / tolerance;
  return 1.0 / (1.0 / (ratio * ratio * variance) + 1.0 / n_rest);
}

// ceil(safety draws), between the pilot and n_rest; n_rest where `draws` is no number.
VESPER_HD inline std::int32_t sample_tokens(double safety, double draws, std::int32_t pilot, std::int32_t n_rest) {
  const double wanted = ceil(safety * draws);
  if (wanted <= pilot) return pilot;
  return wanted < n_rest ? static_cast<std::int32_t>(wanted) : n_rest;
}

// Tokens in the first half of an escalation: twice the sample, at most the residual.
VESPER_HD inline std::int32_t doubled(std::int32_t drawn, std::int32_t n_rest) {
  return drawn > n_rest / 2 ? n_rest : 2 * drawn;
}

}  // namespace vesper
