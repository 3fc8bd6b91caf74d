// The attention formula in double precision over a list of weighted keys, and how far fp32 may be from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "attention/attend.h"
#include "tests/compare.h"
#include "tests/paged.h"

namespace vesper {

inline AttentionShape make_shape(int kv_heads, int group, int head_dim, int page_tokens) {
  return {.heads = kv_heads * group,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .page_tokens = page_tokens,
          .scale = 1.0F / std::sqrt(static_cast<float>(head_dim))};
}

inline std::string describe(const AttentionShape& shape) {
  return "group " + std::to_string(shape.group()) + ", kv_heads " + std::to_string(shape.kv_heads) + ", head_dim " +
         std::to_string(shape.head_dim) + ", page_tokens " + std::to_string(shape.page_tokens);
}

// A key that is attended to with weight e^log_weight.
struct WeightedKey {
  int token = 0;
  double log_weight = 0.0;
};

inline std::vector<WeightedKey> first_keys(int count) {
  std::vector<WeightedKey> keys(static_cast<std::size_t>(count));
  for (int t = 0; t < count; ++t) keys[static_cast<std::size_t>(t)].token = t;
  return keys;
}

// One query head over some keys, in double.
struct ExactAttention {
  double lse = 0.0;
  double total = 0.0;             // e^lse over the largest weight
  std::vector<double> out;        // [head_dim]
  std::vector<double> spread;     // [head_dim] sum_i w_i |v_i|, the w_i summing to 1
  std::vector<double> magnitude;  // [head_dim] sum_i |v_i|
  // Of scores, the log-weight included: the largest, the smallest, the largest magnitude (also without the log-weight),
  // and the largest sum of |q_d k_d| that one is made of, scaled.
  double largest = -INFINITY, smallest = INFINITY, reach = 0.0, products = 0.0;
  bool weighted = false;
};

inline ExactAttention exact_attention(const AttentionShape& shape, const float* q, PagedTensor& k, PagedTensor& v,
                                      const Batch& batch, int s, int g, std::span<const WeightedKey> keys) {
  ExactAttention exact;
  std::vector<double> scores;
  for (const auto& [token, log_weight] : keys) {
    double sum = 0.0;
    double magnitude = 0.0;
    for (int d = 0; d < shape.head_dim; ++d) {
      const double product = static_cast<double>(q[d]) * k.at(batch, s, token, g, d);
      sum += product;
      magnitude += std::abs(product);
    }
    const double score = sum * shape.scale + log_weight;
    scores.push_back(score);
    exact.largest = std::max(exact.largest, score);
    exact.smallest = std::min(exact.smallest, score);
    exact.reach = std::max({exact.reach, std::abs(score), std::abs(sum * shape.scale)});
    exact.products = std::max(exact.products, magnitude * shape.scale);
    exact.weighted = exact.weighted || log_weight != 0.0;
  }
  const auto channels = static_cast<std::size_t>(shape.head_dim);
  exact.out.resize(channels);
  exact.spread.resize(channels);
  exact.magnitude.resize(channels);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const double weight = std::exp(scores[i] - exact.largest);
    exact.total += weight;
    for (std::size_t d = 0; d < channels; ++d) {
      const double value = v.at(batch, s, keys[i].token, g, static_cast<int>(d));
      exact.out[d] += weight * value;
      exact.spread[d] += weight * std::abs(value);
      exact.magnitude[d] += std::abs(value);
    }
  }
  for (std::size_t d = 0; d < channels; ++d) {
    exact.out[d] /= exact.total;
    exact.spread[d] /= exact.total;
  }
  exact.lse = exact.largest + std::log(exact.total);
  return exact;
}

// With the error that any fp32 evaluation with a running maximum may have.
//   score: a sum of head_dim products, one more rounding for the scale, and one for adding a log-weight, itself rounded
//   weight e^(score - maximum): the score's error, the subtraction, 2 ulp of the exponential, and once a block of keys
//   a rescaling by such a weight; the relative errors of numerator and denominator add
struct Reference {
  std::vector<double> out, bound;
  double lse = 0.0, lse_bound = 0.0;
};

inline Reference reference(const AttentionShape& shape, const float* q, PagedTensor& k, PagedTensor& v,
                           const Batch& batch, int s, int g, std::span<const WeightedKey> keys) {
  constexpr int kShortestBlock = 16;  // keys between two rescalings, at least
  const ExactAttention exact = exact_attention(shape, q, k, v, batch, s, g, keys);
  const auto count = static_cast<double>(keys.size());
  const double score_error =
      sum_bound(shape.head_dim + 1, exact.products) + (exact.weighted ? 3 * kRoundF32 * exact.reach : 0.0);
  const double blocks = 2.0 + count / kShortestBlock;
  const double relative = 2 * score_error + ((exact.largest - exact.smallest) + 6.0 + 6.0 * blocks + count) * kRoundF32;
  Reference result;
  result.out = exact.out;
  for (const double spread : exact.spread) result.bound.push_back(2 * relative * spread + 1e-37);
  result.lse = exact.lse;
  result.lse_bound = relative + 4 * kRoundF32 * (std::abs(exact.lse) + std::abs(exact.largest) + std::log(exact.total));
  return result;
}

// What was found beside what was expected, gathered for expect_within.
struct Comparison {
  std::vector<float> found;
  std::vector<double> expected, bound;
  void add(float value, double reference_value, double reference_bound) {
    found.push_back(value);
    expected.push_back(reference_value);
    bound.push_back(reference_bound);
  }
  void add(std::span<const float> values, const Reference& truth) {
    for (std::size_t d = 0; d < values.size(); ++d) add(values[d], truth.out[d], truth.bound[d]);
  }
  void expect(const std::string& what) const { expect_within(found, expected, bound, what); }
};

}  // namespace vesper
