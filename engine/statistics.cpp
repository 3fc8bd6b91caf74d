#include "engine/statistics.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <numeric>

namespace vesper {
namespace {

// The continued fraction of I_x(a, b), by the modified Lentz method; it converges in O(sqrt(max(a, b))) terms where
// x < (a + 1) / (a + b + 2). Source: NIST Digital Library of Mathematical Functions, 8.17.22 and 3.10.
double beta_fraction(double x, double a, double b) {
  constexpr double kTiny = 1e-300;  // in place of a denominator that vanishes
  constexpr int kMaxTerms = 1 << 20;
  const auto away_from_zero = [](double value) { return std::abs(value) < kTiny ? kTiny : value; };
  double c = 1.0;
  double d = 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0));
  double fraction = d;
  for (int m = 1; m <= kMaxTerms; ++m) {
    const double even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
    d = 1.0 / away_from_zero(1.0 + even * d);
    c = away_from_zero(1.0 + even / c);
    fraction *= c * d;
    const double odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
    d = 1.0 / away_from_zero(1.0 + odd * d);
    c = away_from_zero(1.0 + odd / c);
    fraction *= c * d;
    if (std::abs(c * d - 1.0) < 1e-15) break;
  }
  return fraction;
}

}  // namespace

double mean(const std::vector<double>& values) {
  return values.empty() ? 0.0 : std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<std::size_t>(std::ceil(share * static_cast<double>(values.size())));
  return values[std::min(values.size() - 1, rank == 0 ? 0 : rank - 1)];
}

double Moments::mean() const {
  return count_ == 0 ? 0.0 : sum_ / static_cast<double>(count_);
}

double Moments::variance() const {
  if (count_ < 2) return 0.0;
  const auto n = static_cast<double>(count_);
  return std::max(0.0, (squares_ - sum_ * sum_ / n) / (n - 1.0));
}

double Moments::standard_error() const {
  return count_ == 0 ? 0.0 : std::sqrt(variance() / static_cast<double>(count_));
}

double regularized_beta(double x, double a, double b) {
  if (x <= 0.0) return 0.0;
  if (x >= 1.0) return 1.0;
  const double log_front = std::lgamma(a + b) - std::lgamma(a) - std::lgamma(b) + a * std::log(x) + b * std::log1p(-x);
  const double front = std::exp(log_front);
  if (x < (a + 1.0) / (a + b + 2.0)) return front * beta_fraction(x, a, b) / a;
  return 1.0 - front * beta_fraction(1.0 - x, b, a) / b;
}

// P(|T| > t) = I_{f / (f + t^2)}(f / 2, 1 / 2) falls as t grows.
double student_t(double confidence, double freedom) {
  double low = 0.0;
  double high = 1.0;
  const auto outside = [&](double t) { return regularized_beta(freedom / (freedom + t * t), freedom / 2, 0.5); };
  while (outside(high) > 1.0 - confidence) high *= 2;
  for (int step = 0; step < 80; ++step) {
    const double middle = (low + high) / 2;
    (outside(middle) > 1.0 - confidence ? low : high) = middle;
  }
  return high;
}

Ratio ratio_of_means(std::span<const double> numerator, std::span<const double> denominator, double confidence) {
  assert(numerator.size() == denominator.size() && !numerator.empty());
  const auto n = static_cast<double>(numerator.size());
  const double x = std::accumulate(numerator.begin(), numerator.end(), 0.0) / n;
  const double y = std::accumulate(denominator.begin(), denominator.end(), 0.0) / n;
  Ratio ratio{.value = x / y, .low = {}, .high = {}};
  if (numerator.size() < 2) return ratio;
  double var_x = 0.0;
  double var_y = 0.0;
  double covariance = 0.0;
  for (std::size_t i = 0; i < numerator.size(); ++i) {
    var_x += (numerator[i] - x) * (numerator[i] - x);
    var_y += (denominator[i] - y) * (denominator[i] - y);
    covariance += (numerator[i] - x) * (denominator[i] - y);
  }
  const double t = student_t(confidence, n - 1.0);
  const double share = t * t / (n * (n - 1.0));  // of the sums of squares, what a mean's variance is
  // r^2 (y^2 - share var_y) - 2 r (x y - share cov) + (x^2 - share var_x) <= 0; an interval only where it opens
  // upwards.
  const double square = y * y - share * var_y;
  const double linear = x * y - share * covariance;
  const double constant = x * x - share * var_x;
  if (square <= 0.0) return ratio;
  const double root = std::sqrt(std::max(0.0, linear * linear - square * constant));
  ratio.low = (linear - root) / square;
  ratio.high = (linear + root) / square;
  return ratio;
}

// P(at most `failures` of `trials`) under rate p is 1 - I_p(failures + 1, trials - failures), which falls as p grows.
double clopper_pearson_upper(std::int64_t failures, std::int64_t trials, double confidence) {
  if (failures >= trials) return 1.0;
  double low = static_cast<double>(failures) / static_cast<double>(trials);
  double high = 1.0;
  for (int step = 0; step < 60; ++step) {
    const double middle = (low + high) / 2;
    const double above =
        regularized_beta(middle, static_cast<double>(failures) + 1.0, static_cast<double>(trials - failures));
    (above < confidence ? low : high) = middle;
  }
  return high;
}

}  // namespace vesper
