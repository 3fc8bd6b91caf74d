// Draws of the residual: a permutation, uniform in single tokens, in pairs and in order, and independent of one another
// where any part of the key differs. Item (e) of the statistical protocol of docs/backends.md.
#include "attention/residual.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "attention/sample_tail.h"

namespace vesper {
namespace {

std::int32_t residual_draw(std::int32_t i, std::int32_t n, const DrawKey& key) {
  return DrawOrder(n, key)(i);
}

// Pearson's statistic of counts that should all be `expected`, as a deviate of a normal: (X - f) / sqrt(2 f), f being
// the degrees of freedom. `share`: variance of a count over that of a Poisson one.
double deviate(const std::vector<int>& counts, double expected, double share, double freedom) {
  double statistic = 0.0;
  for (int count : counts) statistic += (count - expected) * (count - expected) / (expected * share);
  return (statistic - freedom) / std::sqrt(2.0 * freedom);
}

TEST(ResidualDraw, IsAPermutation) {
  for (const std::int32_t n : {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4096, 4097}) {
    for (std::uint32_t seed = 0; seed < 3; ++seed) {
      std::vector<std::int32_t> drawn;
      for (std::int32_t i = 0; i < n; ++i) drawn.push_back(residual_draw(i, n, {.seed = seed}));
      std::sort(drawn.begin(), drawn.end());
      std::vector<std::int32_t> all(drawn.size());
      std::iota(all.begin(), all.end(), 0);
      ASSERT_EQ(drawn, all) << n << " residuals, seed " << seed;
    }
  }
}

TEST(ResidualDraw, StaysInsideALongResidual) {
  constexpr std::int32_t kRest = 1'000'003;
  std::vector<std::int32_t> drawn;
  for (std::int32_t i = 0; i < 20000; ++i) {
    drawn.push_back(residual_draw(i, kRest, {.seed = 7, .request = 1}));
    ASSERT_TRUE(drawn.back() >= 0 && drawn.back() < kRest);
  }
  std::sort(drawn.begin(), drawn.end());
  EXPECT_EQ(std::adjacent_find(drawn.begin(), drawn.end()), drawn.end());
  for (const std::int32_t i : {0, 1, INT32_MAX - 1}) EXPECT_GE(residual_draw(i, INT32_MAX, {}), 0);
}

// The values that CPU and CUDA must give; a change here changes every seeded result.
TEST(ResidualDraw, GivesTheseValues) {
  const DrawKey key{.seed = 1, .request = 2, .step = 3, .layer = 4, .kv_head = 5};
  std::vector<std::int32_t> drawn;
  for (std::int32_t i = 0; i < 8; ++i) drawn.push_back(residual_draw(i, 1000, key));
  EXPECT_EQ(drawn, (std::vector<std::int32_t>{757, 619, 493, 390, 233, 263, 871, 549}));
}

TEST(ResidualDraw, IncludesEveryTokenEquallyOften) {
  struct Case {
    int n, b, seeds;
  };
  for (const auto& [n, b, seeds] :
       {Case{23, 6, 40000}, Case{64, 16, 20000}, Case{97, 20, 20000}, Case{3000, 64, 3000}}) {
    std::vector<int> counts(static_cast<std::size_t>(n));
    for (int seed = 0; seed < seeds; ++seed) {
      for (int i = 0; i < b; ++i) {
        ++counts[static_cast<std::size_t>(residual_draw(i, n, {.seed = static_cast<std::uint32_t>(seed)}))];
      }
    }
    // Counts of a sample without replacement: variance p (1 - p) each, of which one degree is fixed by their sum.
    const double p = static_cast<double>(b) / n;
    const double found = deviate(counts, seeds * p, (1 - p) * n / (n - 1), n - 1);
    EXPECT_LT(std::abs(found), 4.5) << b << " of " << n << ": " << found;
  }
}

TEST(ResidualDraw, IncludesEveryPairEquallyOften) {
  constexpr int kRest = 23;
  constexpr int kDrawn = 6;
  constexpr int kSeeds = 50000;
  std::vector<int> inclusion(kRest * kRest);
  std::vector<int> first_two(kRest * kRest);
  for (int seed = 0; seed < kSeeds; ++seed) {
    std::int32_t drawn[kDrawn];
    for (int i = 0; i < kDrawn; ++i) drawn[i] = residual_draw(i, kRest, {.step = static_cast<std::uint32_t>(seed)});
    for (const std::int32_t a : drawn) {
      for (const std::int32_t b : drawn) ++inclusion[static_cast<std::size_t>(a * kRest + b)];
    }
    ++first_two[static_cast<std::size_t>(drawn[0] * kRest + drawn[1])];
  }
  const double p = static_cast<double>(kDrawn * (kDrawn - 1)) / (kRest * (kRest - 1));
  double worst = 0.0;
  for (int a = 0; a < kRest; ++a) {
    for (int b = 0; b < a; ++b) {
      const double count = inclusion[static_cast<std::size_t>(a * kRest + b)];
      worst = std::max(worst, std::abs(count - kSeeds * p) / std::sqrt(kSeeds * p * (1 - p)));
    }
  }
  EXPECT_LT(worst, 4.8) << "pairs in samples";  // of 253 normal deviates: 4e-4

  // The first two draws in order: a multinomial over the pairs that differ.
  std::vector<int> ordered;
  for (int i = 0; i < kRest * kRest; ++i) {
    if (i / kRest != i % kRest) ordered.push_back(first_two[static_cast<std::size_t>(i)]);
  }
  const auto cells = static_cast<double>(ordered.size());
  const double found = deviate(ordered, kSeeds / cells, 1.0, cells - 1);
  EXPECT_LT(std::abs(found), 4.5) << "first two draws: " << found;
}

// The overlap of two independent samples is hypergeometric.
TEST(ResidualDraw, DiffersInEveryPartOfTheKey) {
  constexpr int kRest = 500;
  constexpr int kDrawn = 50;
  constexpr int kTrials = 3000;
  const auto overlap = [](const DrawKey& a, const DrawKey& b) {
    std::vector<bool> in_a(kRest);
    for (int i = 0; i < kDrawn; ++i) in_a[static_cast<std::size_t>(residual_draw(i, kRest, a))] = true;
    int both = 0;
    for (int i = 0; i < kDrawn; ++i) both += in_a[static_cast<std::size_t>(residual_draw(i, kRest, b))] ? 1 : 0;
    return both;
  };
  const double share = static_cast<double>(kDrawn) / kRest;
  const double variance = kDrawn * share * (1 - share) * (kRest - kDrawn) / (kRest - 1.0);
  for (int part = 0; part < 5; ++part) {
    double sum = 0.0;
    for (std::uint32_t trial = 0; trial < kTrials; ++trial) {
      const DrawKey key{.seed = trial, .request = 3, .step = 900 + trial, .layer = 2, .kv_head = 1};
      DrawKey other = key;
      (part == 0   ? other.seed
       : part == 1 ? other.request
       : part == 2 ? other.step
       : part == 3 ? other.layer
                   : other.kv_head) += 1;
      sum += overlap(key, other);
    }
    const double z = (sum / kTrials - kDrawn * share) / std::sqrt(variance / kTrials);
    EXPECT_LT(std::abs(z), 4.5) << "part " << part << " of the key: mean overlap " << sum / kTrials;
  }
}

TEST(ResidualToken, SkipsTheStaticPart) {
  for (const std::vector<std::int32_t>& on_static :
       {std::vector<std::int32_t>{}, {0, 1, 2}, {9}, {0, 3, 4, 8, 9}, {0, 1, 2, 3, 4, 5, 6, 7, 9}, {5}}) {
    std::vector<std::int32_t> expected;
    for (std::int32_t t = 0; t < 10; ++t) {
      if (!std::binary_search(on_static.begin(), on_static.end(), t)) expected.push_back(t);
    }
    for (std::size_t r = 0; r < expected.size(); ++r) {
      EXPECT_EQ(
          residual_token(static_cast<std::int32_t>(r), on_static.data(), static_cast<std::int32_t>(on_static.size())),
          expected[r]);
    }
  }
}

TEST(DrawsFor, SolvesTheErrorOfASampleWithoutReplacement) {
  // z n sqrt(variance (1 / b - 1 / n)) = tolerance
  const double b = draws_for(1.96, 5000.0, 0.3, 250.0);
  EXPECT_NEAR(1.96 * 5000.0 * std::sqrt(0.3 * (1.0 / b - 1.0 / 5000.0)), 250.0, 1e-9);
  EXPECT_EQ(draws_for(1.96, 5000.0, 0.0, 0.0), 0.0);
  EXPECT_EQ(draws_for(1.96, 5000.0, 0.3, 0.0), 5000.0);
  EXPECT_EQ(sample_tokens(1.2, b, 2, 5000), static_cast<int>(std::ceil(1.2 * b)));
  EXPECT_EQ(sample_tokens(1.2, b, 4000, 5000), 4000);
  EXPECT_EQ(sample_tokens(1.2, 4900.0, 10, 5000), 5000);
  EXPECT_EQ(sample_tokens<double>(1.2, NAN, 10, 5000), 5000);
  EXPECT_EQ(doubled(10, 21), 20);
  EXPECT_EQ(doubled(10, 20), 20);
  EXPECT_EQ(doubled(11, 21), 21);
  EXPECT_EQ(doubled(INT32_MAX - 1, INT32_MAX), INT32_MAX);
}

TEST(InverseNormal, MatchesTables) {
  EXPECT_NEAR(inverse_normal(0.975), 1.959963984540054, 1e-9);
  EXPECT_NEAR(inverse_normal(0.95), 1.644853626951473, 1e-9);
  EXPECT_NEAR(inverse_normal(0.9995), 3.290526731491926, 1e-9);
  EXPECT_NEAR(inverse_normal(1e-9), -5.997807015007686, 1e-9);
  EXPECT_NEAR(inverse_normal(0.5), 0.0, 1e-9);
  EXPECT_NEAR(inverse_normal(0.25), -inverse_normal(0.75), 1e-12);
  EXPECT_EQ(inverse_normal(0.0), -INFINITY);
  EXPECT_EQ(inverse_normal(1.0), INFINITY);
}

}  // namespace
}  // namespace vesper
