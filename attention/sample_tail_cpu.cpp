// The sampled list on the CPU; formulas in attention/sample_tail.h. A piece of work is one sequence and KV head.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "attention/sample_tail.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {
namespace {

// body(s, g) for every sequence and KV head.
template <typename Body>
void for_each_list(const AttentionShape& shape, const Batch& batch, const Body& body) {
  parallel_for(std::int64_t{batch.seqs} * shape.kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      body(static_cast<int>(i / shape.kv_heads), static_cast<int>(i % shape.kv_heads));
    }
  });
}

// A mean orders a row as its sum does, and is summed.
float reduced_score(const AttentionShape& shape, const TopKScores& scores, GroupScore group_score, int s, int g,
                    std::int32_t t) {
  float score = 0.0F;
  if (scores.of_tokens.empty()) {
    score = scores.of_pages(s, g, t / shape.page_tokens);
  } else {
    const int first = g * shape.group();
    score = scores.of_tokens(s, first, t);
    for (int h = first + 1; h < first + shape.group(); ++h) {
      const float next = scores.of_tokens(s, h, t);
      score = group_score == GroupScore::kMax ? std::fmax(score, next) : score + next;
    }
  }
  return std::isnan(score) ? -INFINITY : score;
}

// The residual of one list, and its tail as it grows.
class Tail {
 public:
  Tail(const Batch& batch, const SampleRule& rule, const Selection& list, int s, int g)
      : list_(list),
        s_(s),
        g_(g),
        begin_(list.tail_begin(s, g)),
        rest_(batch.kv_len(s) - begin_),
        order_(rest_, {.seed = rule.seed,
                       .request = static_cast<std::uint32_t>(batch.request(s)),
                       .step = static_cast<std::uint32_t>(batch.kv_len(s) - 1),
                       .layer = static_cast<std::uint32_t>(rule.layer),
                       .kv_head = static_cast<std::uint32_t>(g)}) {}

  [[nodiscard]] std::int32_t rest() const { return rest_; }
  [[nodiscard]] std::int32_t drawn() const { return list_.count(s_, g_) - begin_; }
  [[nodiscard]] std::int32_t token(std::int32_t i) const { return list_.index(s_, g_, begin_ + i); }

  // Draws [from, to) join the list, which then holds `to` of them.
  void append(std::int32_t from, std::int32_t to) const {
    const std::int32_t* on_static = &list_.index(s_, g_, 0);
    for (std::int32_t i = from; i < to; ++i) {
      list_.index(s_, g_, begin_ + i) = residual_token(order_(i), on_static, begin_);
    }
    list_.count(s_, g_) = begin_ + to;
    list_.tail_log_weight(s_, g_) = to == 0 ? 0.0F : static_cast<float>(std::log(static_cast<double>(rest_) / to));
  }

 private:
  const Selection& list_;
  int s_, g_;
  std::int32_t begin_, rest_;
  DrawOrder order_;
};

// What one sequence's group of query heads knows of a token: its terms against the pilot's estimate.
class Terms {
 public:
  Terms(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
        TensorView<const float, 2> out, TensorView<const float, 2> lse, int s, int g)
      : shape_(shape),
        batch_(batch),
        k_(kv.k.as<const float, 4>()),
        v_(kv.v.as<const float, 4>()),
        s_(s),
        g_(g),
        q_(&q(s, std::int64_t{g} * shape.group() * shape.head_dim)),
        out_(&out(s, std::int64_t{g} * shape.group() * shape.head_dim)),
        lse_(&lse(s, std::int64_t{g} * shape.group())),
        key_(static_cast<std::size_t>(shape.head_dim)),
        value_(key_.size()) {}

  void read(std::int32_t t) {
    read_row(k_, t, key_.data());
    read_row(v_, t, value_.data());
  }
  // w_i = e^{s_i} / D of the token read last; h counts within the group.
  [[nodiscard]] double weight(int h) const {
    const float* query = q_ + std::int64_t{h} * shape_.head_dim;
    double score = 0.0;
    for (int d = 0; d < shape_.head_dim; ++d) {
      score += static_cast<double>(query[d]) * static_cast<double>(key_[static_cast<std::size_t>(d)]);
    }
    return std::exp(score * static_cast<double>(shape_.scale) - static_cast<double>(lse_[h]));
  }
  // Channel d of v_i - o.
  [[nodiscard]] double apart(int h, int d) const {
    return static_cast<double>(value_[static_cast<std::size_t>(d)]) - out(h, d);
  }
  [[nodiscard]] double apart_squared(int h) const {
    double sum = 0.0;
    for (int d = 0; d < shape_.head_dim; ++d) sum += apart(h, d) * apart(h, d);
    return sum;
  }
  [[nodiscard]] double out_squared(int h) const {
    double sum = 0.0;
    for (int d = 0; d < shape_.head_dim; ++d) sum += out(h, d) * out(h, d);
    return sum;
  }

 private:
  [[nodiscard]] double out(int h, int d) const { return out_[std::int64_t{h} * shape_.head_dim + d]; }
  // Chunks of eight channels lie together (kvcache/layout.h).
  void read_row(TensorView<const float, 4> tiles, std::int32_t t, float* row) const {
    const float* tile = &tiles(batch_.page_table(s_, t / shape_.page_tokens), g_, 0, 0);
    for (int d = 0; d < shape_.head_dim; d += 8) {
      const float* chunk = tile + tile_offset(t % shape_.page_tokens, d, shape_.head_dim);
      std::copy_n(chunk, std::min(8, shape_.head_dim - d), row + d);
    }
  }

  const AttentionShape& shape_;
  const Batch& batch_;
  TensorView<const float, 4> k_, v_;
  int s_, g_;
  const float *q_, *out_, *lse_;
  std::vector<float> key_, value_;
};

struct Sums {
  double once = 0.0;
  double squares = 0.0;
  void add(double x) {
    once += x;
    squares += x * x;
  }
};

// The largest sample that a head of the group asks for, given the pilot.
std::int32_t sized(const AttentionShape& shape, const SampleRule& rule, const Tail& tail, Terms& terms) {
  const bool of_output = rule.verify == Verify::kOutput;
  const auto heads = static_cast<std::size_t>(shape.group());
  const auto channels = static_cast<std::size_t>(shape.head_dim);
  std::vector<Sums> weights(heads);
  std::vector<Sums> errors(of_output ? heads * channels : 0);
  for (std::int32_t i = 0; i < tail.drawn(); ++i) {
    terms.read(tail.token(i));
    for (std::size_t h = 0; h < heads; ++h) {
      const double weight = terms.weight(static_cast<int>(h));
      weights[h].add(weight);
      for (std::size_t d = 0; d < channels && of_output; ++d) {
        errors[h * channels + d].add(weight * terms.apart(static_cast<int>(h), static_cast<int>(d)));
      }
    }
  }
  const double n = tail.drawn();
  std::int32_t largest = tail.drawn();
  const auto ask = [&](double variance, double tolerance) {
    const double draws = draws_for(static_cast<double>(rule.z), static_cast<double>(tail.rest()), variance, tolerance);
    largest = std::max(largest, sample_tokens(static_cast<double>(rule.safety), draws, tail.drawn(), tail.rest()));
  };
  for (std::size_t h = 0; h < heads; ++h) {
    ask(unbiased_variance(weights[h].once, weights[h].squares, n), rule.epsilon);
    if (!of_output) continue;
    double trace = 0.0;
    for (std::size_t d = 0; d < channels; ++d) {
      const Sums& error = errors[h * channels + d];
      trace += unbiased_variance(error.once, error.squares, n);
    }
    ask(trace, static_cast<double>(rule.epsilon) * std::sqrt(terms.out_squared(static_cast<int>(h))));
  }
  return largest;
}

// Of draws [from, to), those with a term beyond the tolerance where `drawn` are drawn.
std::int32_t count_heavy(const AttentionShape& shape, const SampleRule& rule, const Tail& tail, Terms& terms,
                         std::int32_t from, std::int32_t to, std::int32_t drawn) {
  const double each = static_cast<double>(tail.rest()) / drawn;
  const double epsilon = rule.epsilon;
  std::int32_t heavy = 0;
  for (std::int32_t i = from; i < to; ++i) {
    terms.read(tail.token(i));
    bool beyond = false;
    for (int h = 0; h < shape.group() && !beyond; ++h) {
      const double term = each * terms.weight(h);
      beyond = term > epsilon || (rule.verify == Verify::kOutput &&
                                  term * term * terms.apart_squared(h) > epsilon * epsilon * terms.out_squared(h));
    }
    heavy += beyond ? 1 : 0;
  }
  return heavy;
}

// Extends the tail; returns the guard's hits.
std::int32_t size_tail(const AttentionShape& shape, const SampleRule& rule, const Tail& tail, Terms& terms) {
  const std::int32_t pilot = tail.drawn();
  const std::int32_t rest = tail.rest();
  if (pilot == rest) return 0;
  const std::int32_t drawn = sized(shape, rule, tail, terms);
  tail.append(pilot, drawn);
  if (drawn == rest) return 0;
  const std::int32_t hits = count_heavy(shape, rule, tail, terms, 0, drawn, drawn);
  if (hits == 0 || rule.on_outlier == OnOutlier::kReport) return hits;
  const std::int32_t more = doubled(drawn, rest);
  tail.append(drawn, more);
  if (more == rest) return hits;
  const std::int32_t still = count_heavy(shape, rule, tail, terms, 0, drawn, more);
  const std::int32_t fresh = count_heavy(shape, rule, tail, terms, drawn, more, more);
  if (still + fresh > 0) tail.append(more, rest);
  return hits + fresh;
}

}  // namespace

void select_static(const AttentionShape& shape, const Batch& batch, const TopKScores& scores, const StaticRule& rule,
                   DenseLimit dense, const Selection& list) {
  for_each_list(shape, batch, [&](int s, int g) {
    const std::int32_t visible = batch.kv_len(s);
    if (visible <= dense.tokens) return;
    const std::int32_t window = std::max(1, tokens_of(rule.window_tokens, visible));
    const std::int32_t sink = std::min(tokens_of(rule.sink_tokens, visible), visible - window);
    const std::int32_t between = visible - window - sink;
    const bool scored = !scores.of_tokens.empty() || !scores.of_pages.empty();
    const std::int32_t top_k = scored ? std::min(tokens_of(rule.top_k, visible), between) : 0;

    std::vector<std::int32_t> best(static_cast<std::size_t>(between));
    std::iota(best.begin(), best.end(), sink);
    if (top_k > 0 && top_k < between) {
      std::vector<float> score(best.size());
      for (std::int32_t t : best) {
        score[static_cast<std::size_t>(t - sink)] = reduced_score(shape, scores, rule.group_score, s, g, t);
      }
      std::nth_element(best.begin(), best.begin() + (top_k - 1), best.end(), [&](std::int32_t a, std::int32_t b) {
        const float score_a = score[static_cast<std::size_t>(a - sink)];
        const float score_b = score[static_cast<std::size_t>(b - sink)];
        return score_a > score_b || (score_a == score_b && a < b);
      });
    }
    best.resize(static_cast<std::size_t>(top_k));
    std::sort(best.begin(), best.end());

    std::int32_t* to = &list.index(s, g, 0);
    std::iota(to, to + sink, 0);
    std::copy(best.begin(), best.end(), to + sink);
    std::iota(to + sink + top_k, to + sink + top_k + window, visible - window);
    list.count(s, g) = sink + top_k + window;
    list.tail_begin(s, g) = list.count(s, g);
    list.tail_log_weight(s, g) = 0.0F;
  });
}

void draw_pilot(const AttentionShape& shape, const Batch& batch, const SampleRule& rule, DenseLimit dense,
                const Selection& list) {
  for_each_list(shape, batch, [&](int s, int g) {
    const std::int32_t visible = batch.kv_len(s);
    if (visible <= dense.tokens) return;
    const Tail tail(batch, rule, list, s, g);
    tail.append(0, std::min(std::max(2, tokens_of(rule.pilot, visible)), tail.rest()));
  });
}

void size_sample(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                 TensorView<const float, 2> out, TensorView<const float, 2> lse, const SampleRule& rule,
                 DenseLimit dense, const Selection& list, const SampleReport& report) {
  for_each_list(shape, batch, [&](int s, int g) {
    report.guard_hits(s, g) = 0;
    if (batch.kv_len(s) <= dense.tokens) return;
    const Tail tail(batch, rule, list, s, g);
    Terms terms(shape, q, kv, batch, out, lse, s, g);
    report.guard_hits(s, g) = size_tail(shape, rule, tail, terms);
  });
}

}  // namespace vesper::cpu
