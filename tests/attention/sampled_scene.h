// One context whose scores are set at will, attended to by many sequences that differ in their request only: so many
// independent samples of the same tokens. Everything that sampling estimates is known in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "attention/sample_tail.h"
#include "engine/core/parallel.h"
#include "kvcache/batch.h"
#include "tests/paged.h"

namespace vesper {

// What a list of tokens gives for one query head.
struct Estimate {
  double denominator = 0.0;
  std::vector<double> out;  // [head_dim]
};

// Scores of query head h are set by channel h of the keys, so head_dim is at least the group; one KV head.
class SampledScene {
 public:
  SampledScene(int heads, int head_dim, int tokens, int replicas)
      : shape{.heads = heads, .kv_heads = 1, .head_dim = head_dim, .page_tokens = 16, .scale = 1.0F},
        tokens_(tokens),
        k_(divide_up(tokens, 16), 1, 16, head_dim),
        v_(divide_up(tokens, 16), 1, 16, head_dim),
        weight_(static_cast<std::size_t>(heads * tokens)),
        q_(static_cast<std::size_t>(replicas * heads * head_dim)),
        index_(static_cast<std::size_t>(replicas) * static_cast<std::size_t>(tokens)),
        count_(static_cast<std::size_t>(replicas)),
        tail_begin_(count_.size()),
        guard_hits_(count_.size()),
        tail_log_weight_(count_.size()),
        out_(q_.size()),
        lse_(static_cast<std::size_t>(replicas * heads)) {
    const int pages = divide_up(tokens, 16);
    for (int s = 0; s < replicas; ++s) {
      request_.push_back(s);
      kv_len_.push_back(tokens);
      for (int p = 0; p < pages; ++p) page_table_.push_back(p);
      for (int h = 0; h < heads; ++h) q_[static_cast<std::size_t>((s * heads + h) * head_dim + h)] = 1.0F;
    }
    batch.seqs = batch.tokens = replicas;
    batch.max_query_tokens = 1;
    batch.max_kv_len = tokens;
    batch.kv_len = TensorView<const std::int32_t, 1>(kv_len_.data(), replicas);
    batch.request = TensorView<const std::int32_t, 1>(request_.data(), replicas);
    batch.page_table = TensorView<const std::int32_t, 2>(page_table_.data(), replicas, pages);
    list = {.unit = SelectionUnit::kTokens,
            .index = TensorView<std::int32_t, 3>(index_.data(), replicas, 1, tokens),
            .count = TensorView<std::int32_t, 2>(count_.data(), replicas, 1),
            .tail_begin = TensorView<std::int32_t, 2>(tail_begin_.data(), replicas, 1),
            .tail_log_weight = TensorView<float, 2>(tail_log_weight_.data(), replicas, 1)};
    report = {.guard_hits = TensorView<std::int32_t, 2>(guard_hits_.data(), replicas, 1)};
  }
  SampledScene(const SampledScene&) = delete;  // `batch` and `list` view the vectors
  SampledScene& operator=(const SampledScene&) = delete;

  void set_score(int h, int t, double score) {
    k_.at(batch, 0, t, 0, h) = static_cast<float>(score);
    weight_[static_cast<std::size_t>(h * tokens_ + t)] = std::exp(static_cast<double>(static_cast<float>(score)));
  }
  float& value(int t, int d) { return v_.at(batch, 0, t, 0, d); }

  // Lognormal attention, sigma being the deviation of scores; values around `mean` with deviation 1.
  void fill(double sigma, double mean, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int t = 0; t < tokens_; ++t) {
      for (int d = 0; d < shape.head_dim; ++d) {
        k_.at(batch, 0, t, 0, d) = 0.0F;
        value(t, d) = static_cast<float>(mean + normal(random));
      }
      for (int h = 0; h < shape.heads; ++h) set_score(h, t, sigma * normal(random));
    }
  }

  // The static part by the keys' own scores, except that tokens in `missed` look like the worst.
  void select(const StaticRule& rule, const std::vector<std::int32_t>& missed = {}) {
    std::vector<float> scores(weight_.size());
    for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(std::log(weight_[i]));
    for (int h = 0; h < shape.heads; ++h) {
      for (const std::int32_t t : missed) scores[static_cast<std::size_t>(h * tokens_ + t)] = -INFINITY;
    }
    Batch one = batch;
    one.seqs = one.tokens = 1;
    const TopKScores top_k{.of_tokens = TensorView<const float, 3>(scores.data(), 1, shape.heads, tokens_),
                           .of_pages = {}};
    cpu::select_static(shape, one, top_k, rule, {}, list);
    for (int s = 1; s < batch.seqs; ++s) {
      std::copy_n(&list.index(0, 0, 0), list.count(0, 0), &list.index(s, 0, 0));
      count_[static_cast<std::size_t>(s)] = tail_begin_[static_cast<std::size_t>(s)] = list.count(0, 0);
    }
  }

  // Pilot, then sample; `attend_to_pilot` in between, as attend_selected would.
  void draw(const SampleRule& rule) { cpu::draw_pilot(shape, batch, rule, {}, list); }
  void size(const SampleRule& rule) {
    parallel_for(batch.seqs, 1, [&](std::int64_t begin, std::int64_t end) {
      for (auto s = static_cast<int>(begin); s < end; ++s) {
        for (int h = 0; h < shape.heads; ++h) {
          const Estimate estimate = estimated(s, h);
          std::copy(estimate.out.begin(), estimate.out.end(),
                    &out_[static_cast<std::size_t>((s * shape.heads + h) * shape.head_dim)]);
          lse_[static_cast<std::size_t>(s * shape.heads + h)] = static_cast<float>(std::log(estimate.denominator));
        }
      }
    });
    cpu::size_sample(shape, TensorView<const float, 2>(q_.data(), batch.seqs, shape.heads * shape.head_dim),
                     {.k = k_.ref(), .v = v_.ref()}, batch,
                     TensorView<const float, 2>(out_.data(), batch.seqs, shape.heads * shape.head_dim),
                     TensorView<const float, 2>(lse_.data(), batch.seqs, shape.heads), rule, {}, list, report);
  }

  // Of the list of sequence s as it is.
  [[nodiscard]] Estimate estimated(int s, int h) {
    Estimate result = none();
    const double tail = std::exp(static_cast<double>(list.tail_log_weight(s, 0)));
    for (int i = 0; i < list.count(s, 0); ++i) {
      add(result, h, list.index(s, 0, i), i < list.tail_begin(s, 0) ? 1.0 : tail);
    }
    return normalized(result);
  }
  // Of all tokens.
  [[nodiscard]] Estimate exact(int h) {
    Estimate result = none();
    for (int t = 0; t < tokens_; ++t) add(result, h, t, 1.0);
    return normalized(result);
  }

  [[nodiscard]] double weight(int h, int t) const { return weight_[static_cast<std::size_t>(h * tokens_ + t)]; }
  [[nodiscard]] int rest() const { return tokens_ - tail_begin_[0]; }
  [[nodiscard]] int drawn(int s) const {
    return count_[static_cast<std::size_t>(s)] - tail_begin_[static_cast<std::size_t>(s)];
  }
  [[nodiscard]] bool has_drawn(int s, std::int32_t t) const {
    const std::int32_t* tail = &list.index(s, 0, list.tail_begin(s, 0));
    return std::find(tail, tail + drawn(s), t) != tail + drawn(s);
  }

  AttentionShape shape;
  Batch batch;
  Selection list;
  SampleReport report;

 private:
  static int divide_up(int a, int b) { return (a + b - 1) / b; }
  [[nodiscard]] Estimate none() const {
    return {.denominator = 0.0, .out = std::vector<double>(static_cast<std::size_t>(shape.head_dim))};
  }
  void add(Estimate& to, int h, int t, double times) {
    const double weighs = times * weight(h, t);
    to.denominator += weighs;
    const float* row = &value(t, 0);  // plain: no multiple of 64 channels
    for (std::size_t d = 0; d < to.out.size(); ++d) to.out[d] += weighs * static_cast<double>(row[d]);
  }
  static Estimate normalized(Estimate sums) {
    for (double& channel : sums.out) channel /= sums.denominator;
    return sums;
  }

  int tokens_;
  PagedTensor k_, v_;
  std::vector<double> weight_;  // [heads, tokens] e^s
  std::vector<float> q_;
  std::vector<std::int32_t> index_, count_, tail_begin_, guard_hits_;
  std::vector<float> tail_log_weight_, out_, lse_;
  std::vector<std::int32_t> request_, kv_len_, page_table_;
};

// |found - expected| / |expected|
inline double relative_error(const std::vector<double>& found, const std::vector<double>& expected) {
  double error = 0.0;
  double norm = 0.0;
  for (std::size_t d = 0; d < found.size(); ++d) {
    error += (found[d] - expected[d]) * (found[d] - expected[d]);
    norm += expected[d] * expected[d];
  }
  return std::sqrt(error / norm);
}

}  // namespace vesper
