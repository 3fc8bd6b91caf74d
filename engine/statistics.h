// Summaries of measured values.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace vesper {

// 0 for no values.
double mean(const std::vector<double>& values);

// The smallest value that at least `share` of all values do not exceed; 0 for no values.
double quantile(std::vector<double> values, double share);

// Count, mean and spread of values that are not kept. Sums in fp64: for values around 1, not for millions of them far
// from 0.
class Moments {
 public:
  void add(double value) {
    ++count_;
    sum_ += value;
    squares_ += value * value;
  }
  void add(const Moments& other) {
    count_ += other.count_;
    sum_ += other.sum_;
    squares_ += other.squares_;
  }
  [[nodiscard]] std::int64_t count() const { return count_; }
  [[nodiscard]] double mean() const;            // 0 for no values
  [[nodiscard]] double variance() const;        // unbiased; 0 for fewer than two values
  [[nodiscard]] double standard_error() const;  // of the mean, where values are independent

 private:
  std::int64_t count_ = 0;
  double sum_ = 0.0;
  double squares_ = 0.0;
};

// The regularised incomplete beta function I_x(a, b), the distribution function of Beta(a, b); a, b > 0, x in [0, 1].
double regularized_beta(double x, double a, double b);

// The two-sided quantile of Student's t: |T| stays below it with probability `confidence`, with `freedom` > 0 degrees
// of freedom.
double student_t(double confidence, double freedom);

// A ratio of two means, with the interval that holds the true ratio with the confidence asked for.
struct Ratio {
  double value = 0.0;
  std::optional<double> low;  // none where there are fewer than two pairs, or the interval has no end
  std::optional<double> high;
};
// mean(numerator) / mean(denominator) of pairs that were measured side by side; the pairs' own correlation is part of
// the interval. Source: Fieller, "Some Problems in Interval Estimation", J. R. Stat. Soc. B 16, 1954, for normal means:
// all r with (x - r y)^2 <= t^2 (var x - 2 r cov + r^2 var y) / n.
Ratio ratio_of_means(std::span<const double> numerator, std::span<const double> denominator, double confidence);

// The exact one-sided upper confidence bound of a rate that `failures` of `trials` independent trials showed: the
// largest p under which so few failures still have a probability of 1 - confidence. 1 for no trials.
// Source: Clopper, Pearson, Biometrika 26(4), 1934.
double clopper_pearson_upper(std::int64_t failures, std::int64_t trials, double confidence);

}  // namespace vesper
