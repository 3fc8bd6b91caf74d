// Comparison under a derived bound: every element has its own, and a failure names the worst.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <span>
#include <string>

namespace vesper {

// Half a unit in the last place, relative: what one rounding to the type may add.
inline constexpr double kRoundF32 = 0x1p-24;
inline constexpr double kRoundF16 = 0x1p-11;
inline constexpr double kRoundBf16 = 0x1p-8;

// Bound of a sum of n products accumulated in fp32 in any order, from the sum of their magnitudes: each of the n
// additions and the product itself rounds once (Higham, "Accuracy and Stability of Numerical Algorithms", (3.7)).
inline double sum_bound(double n, double sum_of_magnitudes) {
  return (n + 1) * kRoundF32 * sum_of_magnitudes;
}

// |found - expected| <= bound, element by element. NaN never passes.
inline void expect_within(std::span<const float> found, std::span<const double> expected, std::span<const double> bound,
                          const std::string& what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  ASSERT_EQ(found.size(), bound.size()) << what;
  std::size_t outside = 0;
  std::size_t worst = 0;
  double worst_ratio = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double error = std::abs(static_cast<double>(found[i]) - expected[i]);
    const bool inside = error <= bound[i];
    if (inside) continue;
    ++outside;
    const double ratio = std::isnan(error) ? INFINITY : error / bound[i];
    if (ratio >= worst_ratio) {
      worst_ratio = ratio;
      worst = i;
    }
  }
  EXPECT_EQ(outside, 0U) << what << ": " << outside << " of " << found.size() << " outside; worst at " << worst
                         << ": expected " << expected[worst] << ", found " << found[worst] << ", bound "
                         << bound[worst];
}

}  // namespace vesper
