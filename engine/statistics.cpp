#include "engine/statistics.h"

#include <algorithm>
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
