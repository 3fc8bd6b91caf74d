// From logits to token ids on the CPU; see engine/sampling.h.
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "engine/core/error.h"
#include "engine/core/parallel.h"
#include "engine/core/philox.h"
#include "engine/sampling.h"

namespace vesper::cpu {
namespace {

// A row of logits; a NaN is read as -inf, so that it is never chosen.
struct Row {
  const float* data = nullptr;
  std::int64_t vocab = 0;
  float operator[](std::int64_t i) const { return std::isnan(data[i]) ? -INFINITY : data[i]; }
};

// The best of a set of candidates; ties go to the lowest id.
struct Best {
  float score = -INFINITY;
  std::int64_t id = 0;
  void offer(const Best& other) {
    if (other.score > score || (other.score == score && other.id < id)) *this = other;
  }
};

// The id with the largest score(i). The order in which threads finish does not matter: Best is a total order.
template <typename Score>
Best argmax(std::int64_t vocab, const Score& score) {
  std::mutex mutex;
  Best best{.score = -INFINITY, .id = vocab};
  parallel_for(vocab, 4096, [&](std::int64_t begin, std::int64_t end) {
    Best mine{.score = -INFINITY, .id = vocab};
    for (std::int64_t i = begin; i < end; ++i) mine.offer({.score = score(i), .id = i});
    const std::scoped_lock lock(mutex);
    best.offer(mine);
  });
  return best;
}

// e^((logit - largest) / temperature); the case of equality serves a largest logit of +inf.
double weight_of(float logit, float largest, float temperature) {
  if (logit == largest) return 1.0;
  return std::exp((static_cast<double>(logit) - static_cast<double>(largest)) / static_cast<double>(temperature));
}

// The largest value tau of `kept` for which the values >= tau carry at least top_p of the probability of all. Halves
// the candidates around their median, so it takes linear time where a sort would not.
float top_p_threshold(std::vector<float>& kept, float largest, float temperature, float top_p) {
  const auto mass = [&](auto begin, auto end) {
    double sum = 0.0;
    for (auto logit = begin; logit != end; ++logit) sum += weight_of(*logit, largest, temperature);
    return sum;
  };
  auto begin = kept.begin();
  auto end = kept.end();
  double missing = static_cast<double>(top_p) * mass(begin, end);
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, std::greater<>());
    const double upper = mass(begin, middle);
    if (upper >= missing) {
      end = middle;
    } else {
      missing -= upper;
      begin = middle;
    }
  }
  return *begin;
}

// The smallest logit that may be drawn.
float keep_threshold(const Row& logits, float largest, const SamplingParams& params) {
  const bool by_k = params.top_k > 0 && params.top_k < logits.vocab;
  const bool by_p = params.top_p < 1.0F;
  float threshold = -INFINITY;
  if (!by_k && !by_p) return threshold;
  std::vector<float> kept(static_cast<std::size_t>(logits.vocab));
  for (std::int64_t i = 0; i < logits.vocab; ++i) kept[static_cast<std::size_t>(i)] = logits[i];
  if (by_k) {
    const auto kth = kept.begin() + (params.top_k - 1);
    std::nth_element(kept.begin(), kth, kept.end(), std::greater<>());
    threshold = *kth;
    kept.erase(std::partition(kept.begin(), kept.end(), [&](float logit) { return logit >= threshold; }), kept.end());
  }
  if (by_p) threshold = top_p_threshold(kept, largest, params.temperature, params.top_p);
  return threshold;
}

// -log(-log(u)): a standard Gumbel variable.
float gumbel(std::int64_t id, std::int32_t step, const SamplingParams& params) {
  const PhiloxCounter draw = philox(
      {{static_cast<std::uint32_t>(id), static_cast<std::uint32_t>(step), params.request, 0}}, {{params.seed, 0}});
  return -std::log(-std::log(unit_interval(draw.word[0])));
}

std::int32_t sample_row(const Row& logits, const SamplingParams& params, std::int32_t step, std::int64_t s) {
  assert(params.temperature >= 0.0F);
  const Best greedy = argmax(logits.vocab, [&](std::int64_t i) { return logits[i]; });
  if (greedy.score == -INFINITY) {
    fail({"sampling a token for row " + std::to_string(s) + " of the batch", "no logit that is a number above -inf",
          "at least one", "check the weights for NaN and infinities"});
  }
  if (params.temperature == 0.0F) return static_cast<std::int32_t>(greedy.id);
  const float threshold = keep_threshold(logits, greedy.score, params);
  const Best drawn = argmax(logits.vocab, [&](std::int64_t i) {
    const float logit = logits[i];
    if (logit < threshold || logit == -INFINITY) return -INFINITY;
    return logit / params.temperature + gumbel(i, step, params);
  });
  return static_cast<std::int32_t>(drawn.id);
}

}  // namespace

void sample(TensorView<const float, 2> logits, TensorView<const SamplingParams, 1> params,
            TensorView<const std::int32_t, 1> step, TensorView<std::int32_t, 1> ids) {
  parallel_for(logits.shape(0), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s) {
      ids(s) = sample_row({.data = &logits(s, 0), .vocab = logits.shape(1)}, params(s), step(s), s);
    }
  });
}

}  // namespace vesper::cpu
