// Summaries of measured values, against hand values and 30-digit sums.
#include "engine/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace vesper {
namespace {

TEST(Statistics, MomentsAreThoseOfTheTextbook) {
  Moments moments;
  EXPECT_EQ(moments.mean(), 0.0);
  EXPECT_EQ(moments.standard_error(), 0.0);
  moments.add(3.0);
  EXPECT_EQ(moments.variance(), 0.0);
  Moments others;
  for (const double value : {5.0, 7.0, 9.0}) others.add(value);
  moments.add(others);
  EXPECT_EQ(moments.count(), 4);
  EXPECT_DOUBLE_EQ(moments.mean(), 6.0);
  EXPECT_DOUBLE_EQ(moments.variance(), 20.0 / 3.0);
  EXPECT_DOUBLE_EQ(moments.standard_error(), std::sqrt(20.0 / 3.0 / 4.0));
}

TEST(Statistics, IncompleteBetaIsThatOfClosedForms) {
  EXPECT_EQ(regularized_beta(0.0, 2.0, 3.0), 0.0);
  EXPECT_EQ(regularized_beta(1.0, 2.0, 3.0), 1.0);
  for (const double x : {0.01, 0.3, 0.5, 0.77, 0.999}) {
    EXPECT_NEAR(regularized_beta(x, 1.0, 1.0), x, 1e-14);
    EXPECT_NEAR(regularized_beta(x, 7.0, 1.0), std::pow(x, 7.0), 1e-14);
    EXPECT_NEAR(regularized_beta(x, 1.0, 9.0), 1.0 - std::pow(1.0 - x, 9.0), 1e-14);
    EXPECT_NEAR(regularized_beta(x, 0.5, 0.5), 2.0 / M_PI * std::asin(std::sqrt(x)), 1e-13);  // the arcsine law
    EXPECT_NEAR(regularized_beta(x, 2.5, 40.0) + regularized_beta(1.0 - x, 40.0, 2.5), 1.0, 1e-13);
  }
  EXPECT_NEAR(regularized_beta(0.3, 2.0, 3.0), 0.3483, 1e-14);  // 1 - (0.7^4 + 4 * 0.3 * 0.7^3)
  EXPECT_NEAR(regularized_beta(0.9, 10.0, 0.5), 0.15164090963471, 1e-13);
  EXPECT_NEAR(regularized_beta(0.02, 5.0, 200.0), 0.38694032205011, 1e-13);
  EXPECT_NEAR(regularized_beta(0.0231, 4322.0, 187679.0), 0.958381209572, 1e-8);  // a binomial tail of 192 000 trials
}

// Expected: p with P(X <= failures) = 1 - confidence, from binomial sums in 30 digits.
TEST(Statistics, ClopperPearsonIsTheExactBound) {
  for (const double n : {1.0, 20.0, 1000.0, 1e6}) {
    EXPECT_NEAR(clopper_pearson_upper(0, static_cast<std::int64_t>(n), 0.95), 1.0 - std::pow(0.05, 1.0 / n), 1e-12);
  }
  EXPECT_NEAR(clopper_pearson_upper(1, 20, 0.95), 0.216106164207, 1e-11);
  EXPECT_NEAR(clopper_pearson_upper(5, 100, 0.95), 0.102253377643, 1e-11);
  EXPECT_NEAR(clopper_pearson_upper(41, 1040, 0.95), 0.0508497461721, 1e-11);
  EXPECT_NEAR(clopper_pearson_upper(4321, 192000, 0.95), 0.0230699410257, 1e-11);
  EXPECT_NEAR(clopper_pearson_upper(19, 20, 0.95), std::pow(0.95, 1.0 / 20.0), 1e-12);
  EXPECT_EQ(clopper_pearson_upper(20, 20, 0.95), 1.0);
  EXPECT_EQ(clopper_pearson_upper(0, 0, 0.95), 1.0);
  EXPECT_GT(clopper_pearson_upper(50, 1000, 0.99), clopper_pearson_upper(50, 1000, 0.95));
  // Many trials: close to the normal bound, which has no exact form to compare with.
  const double rate = clopper_pearson_upper(5'000'000, 100'000'000, 0.95);
  EXPECT_NEAR(rate, 0.05 + 1.6448536 * std::sqrt(0.05 * 0.95 / 1e8), 2e-8);
}

// Expected: printed tables of Student's t.
TEST(Statistics, StudentsQuantileIsThatOfTheTables) {
  EXPECT_NEAR(student_t(0.95, 1), 12.706205, 1e-5);
  EXPECT_NEAR(student_t(0.95, 4), 2.776445, 1e-5);
  EXPECT_NEAR(student_t(0.99, 10), 3.169273, 1e-5);
  EXPECT_NEAR(student_t(0.95, 1e6), 1.959966, 1e-5);
}

TEST(Statistics, RatioOfMeansHasFiellersInterval) {
  const std::vector<double> one = {3.0};
  EXPECT_DOUBLE_EQ(ratio_of_means(one, one, 0.95).value, 1.0);
  EXPECT_FALSE(ratio_of_means(one, one, 0.95).low.has_value());
  // Pairs in one proportion have no spread, however much they drift.
  const std::vector<double> slow = {2.0, 4.0, 6.0};
  const std::vector<double> fast = {1.0, 2.0, 3.0};
  const Ratio exact = ratio_of_means(slow, fast, 0.5);
  EXPECT_DOUBLE_EQ(exact.value, 2.0);
  EXPECT_NEAR(*exact.low, 2.0, 1e-7);
  EXPECT_NEAR(*exact.high, 2.0, 1e-7);
  // By the definition: x - r y of the pairs has mean 0 at distance t standard errors, at both ends.
  const std::vector<double> x = {10.2, 9.8, 10.5, 10.1, 9.9};
  const std::vector<double> y = {5.1, 5.0, 4.8, 5.2, 4.9};
  const Ratio ratio = ratio_of_means(x, y, 0.95);
  EXPECT_DOUBLE_EQ(ratio.value, 50.5 / 25.0);
  for (const double end : {*ratio.low, *ratio.high}) {
    Moments differences;
    for (std::size_t i = 0; i < x.size(); ++i) differences.add(x[i] - end * y[i]);
    EXPECT_NEAR(std::abs(differences.mean()) / differences.standard_error(), student_t(0.95, 4), 1e-6);
  }
  EXPECT_LT(*ratio.low, ratio.value);
  EXPECT_GT(*ratio.high, ratio.value);
  // A denominator that may be 0 bounds nothing.
  EXPECT_FALSE(ratio_of_means(x, std::vector<double>{-5.0, 6.0, -4.0, 5.0, 1.0}, 0.95).low.has_value());
}

}  // namespace
}  // namespace vesper
