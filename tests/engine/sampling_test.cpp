// Sampling on the CPU: exact sets, the distribution of draws, and what a draw depends on.
#include "engine/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "engine/core/error.h"
#include "engine/core/philox.h"

namespace vesper {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::int32_t draw(const std::vector<float>& logits, const SamplingParams& params, std::int32_t step = 0) {
  std::int32_t id = -1;
  cpu::sample(TensorView<const float, 2>(logits.data(), 1, logits.size()),
              TensorView<const SamplingParams, 1>(&params, 1), TensorView<const std::int32_t, 1>(&step, 1),
              TensorView<std::int32_t, 1>(&id, 1));
  return id;
}

// The ids that `draws` steps give.
std::vector<int> histogram(const std::vector<float>& logits, const SamplingParams& params, int draws) {
  std::vector<int> count(logits.size());
  for (int step = 0; step < draws; ++step) ++count[static_cast<std::size_t>(draw(logits, params, step))];
  return count;
}

std::set<std::size_t> drawn_ids(const std::vector<float>& logits, const SamplingParams& params, int draws) {
  const std::vector<int> count = histogram(logits, params, draws);
  std::set<std::size_t> ids;
  for (std::size_t i = 0; i < count.size(); ++i) {
    if (count[i] > 0) ids.insert(i);
  }
  return ids;
}

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> probability;
  double total = 0.0;
  for (const float logit : logits) {
    probability.push_back(std::exp(logit / temperature));
    total += probability.back();
  }
  for (double& p : probability) p /= total;
  return probability;
}

// Pearson's statistic of `draws` draws; its mean is bins - 1, its variance twice that.
double chi_square(const std::vector<int>& count, const std::vector<double>& probability, int draws) {
  double sum = 0.0;
  for (std::size_t i = 0; i < count.size(); ++i) {
    const double expected = probability[i] * draws;
    sum += (count[i] - expected) * (count[i] - expected) / expected;
  }
  return sum;
}

TEST(SampleCpu, GreedyTakesTheLowestIdAmongEquals) {
  EXPECT_EQ(draw({1.0F, 3.0F, 2.0F, 3.0F}, {}), 1);
  EXPECT_EQ(draw({-5.0F}, {}), 0);
  std::vector<float> wide(100000, 0.5F);  // several threads: still the lowest
  EXPECT_EQ(draw(wide, {}), 0);
  wide[77777] = wide[99999] = 0.75F;
  EXPECT_EQ(draw(wide, {}), 77777);
}

TEST(SampleCpu, NanIsNeverChosen) {
  EXPECT_EQ(draw({kNan, -2.0F, kNan, -1.0F}, {}), 3);
  EXPECT_EQ(draw({kNan, -kInfinity, -7.0F}, {}), 2);
  const SamplingParams warm{.temperature = 1.0F, .top_k = 3, .top_p = 0.999F};
  EXPECT_EQ(drawn_ids({kNan, 1.0F, kNan, 1.0F, -kInfinity}, warm, 200), (std::set<std::size_t>{1, 3}));
  EXPECT_THROW(draw({kNan, kNan}, {}), Error);
  EXPECT_THROW(draw({kNan, -kInfinity}, warm), Error);
}

TEST(SampleCpu, AnInfiniteLogitIsCertain) {
  for (const float top_p : {0.5F, 1.0F}) {
    EXPECT_EQ(draw({1.0F, kInfinity, 2.0F}, {.temperature = 1.0F, .top_p = top_p}), 1);
  }
}

TEST(SampleCpu, DrawsFollowTheSoftmax) {
  const std::vector<float> logits{0.0F, 1.0F, -1.0F, 2.0F, 0.5F, -2.0F, 1.5F, -0.5F};
  const int draws = 40000;
  for (const float temperature : {0.5F, 1.0F, 2.0F}) {
    for (const std::uint32_t seed : {0U, 1U, 12345U}) {
      const SamplingParams params{.temperature = temperature, .seed = seed};
      const double statistic =
          chi_square(histogram(logits, params, draws), softmax(logits, static_cast<double>(temperature)), draws);
      EXPECT_LT(statistic, 29.9) << "temperature " << temperature << ", seed " << seed;  // 7 degrees, p = 1e-4
    }
  }
}

TEST(SampleCpu, TopKKeepsTheLargestAndTies) {
  const std::vector<float> logits{0.1F, 0.5F, 0.3F, 0.5F, 0.2F, 0.4F};
  const auto ids = [&](int k) { return drawn_ids(logits, {.temperature = 1.0F, .top_k = k}, 400); };
  EXPECT_EQ(ids(1), (std::set<std::size_t>{1, 3}));  // the second is tied with the first
  EXPECT_EQ(ids(2), (std::set<std::size_t>{1, 3}));
  EXPECT_EQ(ids(3), (std::set<std::size_t>{1, 3, 5}));
  EXPECT_EQ(ids(4), (std::set<std::size_t>{1, 2, 3, 5}));
  EXPECT_EQ(ids(0).size(), 6U);
  EXPECT_EQ(ids(6).size(), 6U);
  EXPECT_EQ(ids(1000).size(), 6U);
}

TEST(SampleCpu, TopPKeepsTheSmallestSetThatReachesIt) {
  // Probabilities 0.4, 0.3, 0.2, 0.1 in shuffled order.
  const std::vector<float> logits{std::log(0.2F), std::log(0.4F), std::log(0.1F), std::log(0.3F)};
  const auto ids = [&](float p) { return drawn_ids(logits, {.temperature = 1.0F, .top_p = p}, 600); };
  EXPECT_EQ(ids(0.0F), (std::set<std::size_t>{1}));
  EXPECT_EQ(ids(0.39F), (std::set<std::size_t>{1}));
  EXPECT_EQ(ids(0.41F), (std::set<std::size_t>{1, 3}));
  EXPECT_EQ(ids(0.69F), (std::set<std::size_t>{1, 3}));
  EXPECT_EQ(ids(0.71F), (std::set<std::size_t>{0, 1, 3}));
  EXPECT_EQ(ids(0.91F), (std::set<std::size_t>{0, 1, 2, 3}));
  EXPECT_EQ(ids(1.0F).size(), 4U);
  // At temperature 1/2 the probabilities are 0.16, 0.09, 0.04, 0.01 over 0.30: 0.533, 0.3, 0.133, 0.033.
  const auto cold = [&](float p) { return drawn_ids(logits, {.temperature = 0.5F, .top_p = p}, 600); };
  EXPECT_EQ(cold(0.52F), (std::set<std::size_t>{1}));
  EXPECT_EQ(cold(0.84F), (std::set<std::size_t>{0, 1, 3}));
  // Over the set that top-k left, 0.4 and 0.3 have 0.571 and 0.429.
  EXPECT_EQ(drawn_ids(logits, {.temperature = 1.0F, .top_k = 2, .top_p = 0.56F}, 600), (std::set<std::size_t>{1}));
  EXPECT_EQ(drawn_ids(logits, {.temperature = 1.0F, .top_k = 2, .top_p = 0.6F}, 600), (std::set<std::size_t>{1, 3}));
}

TEST(SampleCpu, TopPKeepsTiesAtTheThreshold) {
  // 0.4, then three of 0.2: any p in (0.4, 0.6] needs one of the three and keeps all.
  const std::vector<float> logits{std::log(0.2F), std::log(0.2F), std::log(0.4F), std::log(0.2F)};
  EXPECT_EQ(drawn_ids(logits, {.temperature = 1.0F, .top_p = 0.5F}, 600).size(), 4U);
  EXPECT_EQ(drawn_ids(logits, {.temperature = 1.0F, .top_p = 0.3F}, 600), (std::set<std::size_t>{2}));
}

// The threshold of top-p over many random rows, by sorting.
TEST(SampleCpu, TopPAgreesWithSorting) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0F, 2.0F);
  for (int row = 0; row < 60; ++row) {
    std::vector<float> logits(50);
    for (float& logit : logits) logit = normal(random);
    const float top_p = 0.02F + 0.95F * static_cast<float>(row) / 60.0F;
    std::vector<double> sorted = softmax(logits, 1.0);
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    double sum = 0.0;
    double threshold = 0.0;
    for (const double p : sorted) {
      threshold = p;
      sum += p;
      if (sum >= static_cast<double>(top_p)) break;
    }
    const std::vector<double> probability = softmax(logits, 1.0);
    const std::vector<int> count = histogram(logits, {.temperature = 1.0F, .top_p = top_p}, 3000);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (probability[i] < threshold) {
        EXPECT_EQ(count[i], 0) << "row " << row << ", id " << i;
      }
      // Seen with probability above 1 - e^-15.
      if (probability[i] >= std::max(threshold, 0.005)) {
        EXPECT_GT(count[i], 0) << "row " << row << ", id " << i;
      }
    }
  }
}

TEST(SampleCpu, DrawsOfAKeptSetFollowItsSoftmax) {
  const std::vector<float> logits{1.0F, 0.0F, 2.0F, -4.0F, 0.5F, -5.0F};
  const int draws = 40000;
  const std::vector<int> count = histogram(logits, {.temperature = 1.0F, .top_k = 4, .seed = 9}, draws);
  const std::vector<double> kept = softmax({1.0F, 0.0F, 2.0F, 0.5F}, 1.0);
  EXPECT_EQ(count[3] + count[5], 0);
  EXPECT_LT(chi_square({count[0], count[1], count[2], count[4]}, kept, draws), 21.1);  // 3 degrees, p = 1e-4
}

TEST(SampleCpu, ColdIsGreedy) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0.0F, 2.0F);
  for (int row = 0; row < 50; ++row) {
    std::vector<float> logits(300);
    for (float& logit : logits) logit = normal(random);
    EXPECT_EQ(draw(logits, {.temperature = 1e-6F}, row), draw(logits, {}));
  }
}

TEST(SampleCpu, ADrawDependsOnSeedRequestAndStepOnly) {
  const std::vector<float> logits(64, 0.0F);
  const auto sequence = [&](std::uint32_t seed, std::uint32_t request) {
    std::vector<std::int32_t> ids;
    for (int step = 0; step < 64; ++step) {
      ids.push_back(draw(logits, {.temperature = 1.0F, .seed = seed, .request = request}, step));
    }
    return ids;
  };
  EXPECT_EQ(sequence(1, 0), sequence(1, 0));
  // 64 draws of 64 equal ids agree in one place on average, and in more than 8 with probability below 1e-5.
  const auto agreements = [](const std::vector<std::int32_t>& a, const std::vector<std::int32_t>& b) {
    int same = 0;
    for (std::size_t i = 0; i < a.size(); ++i) same += a[i] == b[i] ? 1 : 0;
    return same;
  };
  EXPECT_LE(agreements(sequence(1, 0), sequence(2, 0)), 8);
  EXPECT_LE(agreements(sequence(1, 0), sequence(1, 1)), 8);
  std::vector<std::int32_t> shifted = sequence(1, 0);
  std::rotate(shifted.begin(), shifted.begin() + 1, shifted.end());
  EXPECT_LE(agreements(sequence(1, 0), shifted), 8);

  // The same draws in a batch.
  const int seqs = 5;
  std::vector<float> rows(static_cast<std::size_t>(seqs) * 64, 0.0F);
  std::vector<SamplingParams> params;
  std::vector<std::int32_t> steps;
  for (int s = 0; s < seqs; ++s) {
    params.push_back({.temperature = 1.0F, .seed = 1, .request = static_cast<std::uint32_t>(s)});
    steps.push_back(3 * s);
  }
  std::vector<std::int32_t> ids(static_cast<std::size_t>(seqs));
  cpu::sample(TensorView<const float, 2>(rows.data(), seqs, 64),
              TensorView<const SamplingParams, 1>(params.data(), seqs),
              TensorView<const std::int32_t, 1>(steps.data(), seqs), TensorView<std::int32_t, 1>(ids.data(), seqs));
  for (int s = 0; s < seqs; ++s) {
    EXPECT_EQ(ids[static_cast<std::size_t>(s)],
              sequence(1, static_cast<std::uint32_t>(s))[static_cast<std::size_t>(3 * s)]);
  }
}

// The draw of the contract, evaluated here from its words.
TEST(SampleCpu, IsTheGumbelArgmaxOfTheContract) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  std::vector<float> logits(1000);
  for (float& logit : logits) logit = normal(random);
  const SamplingParams params{.temperature = 0.8F, .seed = 42, .request = 7};
  for (std::int32_t step = 0; step < 20; ++step) {
    double best = -INFINITY;
    std::int32_t expected = -1;
    for (std::uint32_t i = 0; i < 1000; ++i) {
      const PhiloxCounter word = philox({{i, static_cast<std::uint32_t>(step), 7, 0}}, {{42, 0}});
      const double noise = -std::log(-std::log(static_cast<double>(unit_interval(word.word[0]))));
      const double score = logits[i] / 0.8 + noise;
      if (score > best) {
        best = score;
        expected = static_cast<std::int32_t>(i);
      }
    }
    EXPECT_EQ(draw(logits, params, step), expected) << "step " << step;
  }
}

}  // namespace
}  // namespace vesper
