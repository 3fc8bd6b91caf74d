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

// Where two inputs meet in their right halves, the share of pairs that a round leaves wrong shrinks by the side of the
// square; six rounds leave 2^-12 of the pairs of 16 residuals, the smallest that is worth sampling, and less of larger
// ones.
inline constexpr std::uint32_t kDrawRounds = 6;

// The order in which a residual is drawn: draw i is residual number pi(i), pi being a permutation of [0, n_rest) that
// the key chooses: a balanced Feistel network over the least square that holds n_rest, its halves numbers below the
// square's side and added modulo it, walked along its cycle until it lands inside. So draws are distinct, any prefix of
// them is a uniform sample without replacement, and a sample grows by appending. Of a square at most 2 sqrt(n_rest)
// numbers lie outside, so that hardly a draw walks; in a power of two most would, and a warp waits for its longest
// walk. Two words of Philox make the key; a round mixes the right half, that word and the round's multiple of the other
// as MurmurHash3 finishes, less its last step, which the upper bits do not see. (Philox in every round costs ten
// multiplications one after another instead of two.)
// Sources: Luby, Rackoff, SIAM J. Comput. 17(2), 1988; Black, Rogaway, "Ciphers with arbitrary finite domains", 2002
// (the generalised Feistel network over a x b); Appleby, MurmurHash3, fmix32.
class DrawOrder {
 public:
  VESPER_HD DrawOrder(std::int32_t n_rest, const DrawKey& key)
      : rest_(static_cast<std::uint32_t>(n_rest > 1 ? n_rest : 1)),
        side_(static_cast<std::uint32_t>(sqrtf(static_cast<float>(rest_)))) {  // below 2^16; to one, then exactly
    while (side_ * side_ < rest_) ++side_;
    while ((side_ - 1) * (side_ - 1) >= rest_) --side_;
    // The sampler of tokens has 0 as the second word of its key.
    const PhiloxCounter random = philox({{0, key.step, key.request, key.kv_head}}, {{key.seed, key.layer + 1}});
    first_ = random.word[0];
    stride_ = random.word[1];
  }

  // 0 <= i < n_rest
  [[nodiscard]] VESPER_HD std::int32_t operator()(std::int32_t i) const {
    auto at = static_cast<std::uint32_t>(i);
    do {
      std::uint32_t left = at / side_;
      std::uint32_t right = at % side_;
      for (std::uint32_t round = 0; round < kDrawRounds; ++round) {
        const std::uint32_t mixed = mix(right + first_ + round * stride_);
        const std::uint32_t sum = left + static_cast<std::uint32_t>((std::uint64_t{mixed} * side_) >> 32);
        left = right;
        right = sum >= side_ ? sum - side_ : sum;
      }
      at = left * side_ + right;
    } while (at >= rest_);
    return static_cast<std::int32_t>(at);
  }

 private:
  VESPER_HD static std::uint32_t mix(std::uint32_t x) {
    x = (x ^ x >> 16) * 0x85EBCA6BU;
    return (x ^ x >> 13) * 0xC2B2AE35U;
  }

  std::uint32_t rest_;
  std::uint32_t side_;    // of the square
  std::uint32_t first_;   // the key
  std::uint32_t stride_;  // from a round to the next
};

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
template <typename Number>
VESPER_HD Number draws_for(Number z, Number n_rest, Number variance, Number tolerance) {
  if (variance == 0) return 0;
  const Number ratio = z * n_rest / tolerance;
  return 1 / (1 / (ratio * ratio * variance) + 1 / n_rest);
}

// ceil(safety draws), between the pilot and n_rest; n_rest where `draws` is no number.
template <typename Number>
VESPER_HD std::int32_t sample_tokens(Number safety, Number draws, std::int32_t pilot, std::int32_t n_rest) {
  const Number wanted = ceil(safety * draws);
  if (wanted <= static_cast<Number>(pilot)) return pilot;
  return wanted < static_cast<Number>(n_rest) ? static_cast<std::int32_t>(wanted) : n_rest;
}

// Tokens in the first half of an escalation: twice the sample, at most the residual.
VESPER_HD inline std::int32_t doubled(std::int32_t drawn, std::int32_t n_rest) {
  return drawn > n_rest / 2 ? n_rest : 2 * drawn;
}

}  // namespace vesper
