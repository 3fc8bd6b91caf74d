// Lists of sampled attention: the static part against a sort, the pilot's place on the list, sizes against two-pass
// sums over the paged tensors. What samples estimate is in sample_tail_guarantee_test.cpp.
#include "attention/sample_tail.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "attention/attend_sampled.h"
#include "tests/attention/list_buffers.h"
#include "tests/paged.h"

namespace vesper {
namespace {

AttentionShape shape_of(int group, int kv_heads, int head_dim) {
  return {.heads = group * kv_heads,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .page_tokens = 16,
          .scale = 1.0F / std::sqrt(static_cast<float>(head_dim))};
}

double group_score(const AttentionShape& shape, const std::vector<float>& scores, std::int64_t tokens, GroupScore how,
                   int s, int g, int t) {
  double sum = 0.0;
  double largest = -INFINITY;
  for (int h = g * shape.group(); h < (g + 1) * shape.group(); ++h) {
    const auto score = static_cast<double>(scores[static_cast<std::size_t>((s * shape.heads + h) * tokens + t)]);
    sum += score;
    largest = std::max(largest, score);
  }
  return how == GroupScore::kMax ? largest : sum;
}

// Scores are small multiples of 1/8, so that many are equal and sums are exact.
std::vector<float> tied_scores(std::mt19937& random, std::size_t count) {
  std::vector<float> scores = random_floats(random, count, -9.0F, 9.0F);
  for (float& score : scores) score = std::round(score * 8.0F) / 8.0F;
  return scores;
}

TEST(SelectStatic, IsSinkTopKAndWindow) {
  std::mt19937 random(1);
  const std::vector<int> lengths{1, 2, 15, 16, 100, 333, 1000};
  const RaggedBatch ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), 16);
  const Batch& batch = ragged.batch;
  constexpr int kCapacity = 1003;
  for (const int group : {1, 3}) {
    const AttentionShape shape = shape_of(group, 2, 8);
    const std::vector<float> scores =
        tied_scores(random, lengths.size() * static_cast<std::size_t>(shape.heads) * kCapacity);
    const TopKScores top_k{.of_tokens = TensorView<const float, 3>(scores.data(), batch.seqs, shape.heads, kCapacity),
                           .of_pages = {}};
    for (const StaticRule& rule :
         {StaticRule{.sink_tokens = {4}, .window_tokens = {8}, .top_k = {0.1}},
          StaticRule{.sink_tokens = {0}, .window_tokens = {0}, .top_k = {7}, .group_score = GroupScore::kSum},
          StaticRule{.sink_tokens = {0.5}, .window_tokens = {0.6}, .top_k = {3}},
          StaticRule{.sink_tokens = {1}, .window_tokens = {2}, .top_k = {5000}, .group_score = GroupScore::kMean},
          StaticRule{.sink_tokens = {200}, .window_tokens = {200}, .top_k = {}}}) {
      ListBuffers lists(batch.seqs, 2, kCapacity);
      cpu::select_static(shape, batch, top_k, rule, {.tokens = 2}, lists.list);
      for (int s = 0; s < batch.seqs; ++s) {
        for (int g = 0; g < 2; ++g) {
          const int n = batch.kv_len(s);
          if (n <= 2) {
            EXPECT_EQ(lists.list.count(s, g), ListBuffers::kUntouched);
            continue;
          }
          const int window = std::max(1, tokens_of(rule.window_tokens, n));
          const int sink = std::min(n - window, tokens_of(rule.sink_tokens, n));
          std::vector<int> order;
          for (int t = sink; t < n - window; ++t) order.push_back(t);
          std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
            return group_score(shape, scores, kCapacity, rule.group_score, s, g, a) >
                   group_score(shape, scores, kCapacity, rule.group_score, s, g, b);
          });
          order.resize(std::min<std::size_t>(order.size(), static_cast<std::size_t>(tokens_of(rule.top_k, n))));
          std::set<std::int32_t> expected(order.begin(), order.end());
          for (int t = 0; t < sink; ++t) expected.insert(t);
          for (int t = n - window; t < n; ++t) expected.insert(t);
          EXPECT_EQ(lists.entries(s, g), std::vector<std::int32_t>(expected.begin(), expected.end()))
              << "group " << group << ", sequence " << s << ", KV head " << g;
          EXPECT_EQ(lists.list.tail_begin(s, g), lists.list.count(s, g));
        }
      }
    }
  }
}

TEST(SelectStatic, TakesPagesScoresAndIgnoresNan) {
  std::mt19937 random(2);
  const RaggedBatch ragged(random, Phase::kDecode, {70}, {1}, 16);
  const AttentionShape shape = shape_of(2, 1, 8);
  const std::vector<float> pages{1.0F, 3.0F, NAN, 2.0F, 9.0F};
  ListBuffers lists(1, 1, 70);
  cpu::select_static(shape, ragged.batch,
                     {.of_tokens = {}, .of_pages = TensorView<const float, 3>(pages.data(), 1, 1, 5)},
                     {.sink_tokens = {2}, .window_tokens = {3}, .top_k = {22}}, {}, lists.list);
  // Page 4 is tokens 64 to 69, the last three of them in the window; then page 1, then the first of page 3.
  std::vector<std::int32_t> expected{0, 1};
  for (int t = 16; t < 32; ++t) expected.push_back(t);
  for (const int t : {48, 49, 50, 64, 65, 66, 67, 68, 69}) expected.push_back(t);
  EXPECT_EQ(lists.entries(0, 0), expected);

  std::vector<float> tokens(140, NAN);
  tokens[40] = -1.0F;
  tokens[70 + 41] = -5.0F;
  cpu::select_static(shape, ragged.batch,
                     {.of_tokens = TensorView<const float, 3>(tokens.data(), 1, 2, 70), .of_pages = {}},
                     {.sink_tokens = {}, .window_tokens = {1}, .top_k = {3}}, {}, lists.list);
  EXPECT_EQ(lists.entries(0, 0), (std::vector<std::int32_t>{0, 40, 41, 69}));
}

// Of one KV head's list: pilot of `expected` draws behind the static part, distinct and off it.
void expect_pilot(ListBuffers& lists, int s, int g, int kv_len, int expected) {
  const std::vector<std::int32_t> entries = lists.entries(s, g);
  const int begin = lists.list.tail_begin(s, g);
  EXPECT_EQ(lists.list.count(s, g) - begin, expected);
  const std::set<std::int32_t> unique(entries.begin(), entries.end());
  EXPECT_EQ(unique.size(), entries.size()) << "a token is on the list twice";
  EXPECT_TRUE(*unique.begin() >= 0 && *unique.rbegin() == kv_len - 1);
  const double weight = expected == 0 ? 1.0 : static_cast<double>(kv_len - begin) / expected;
  EXPECT_FLOAT_EQ(lists.list.tail_log_weight(s, g), static_cast<float>(std::log(weight)));
}

TEST(DrawPilot, AppendsDistinctTokensOfTheRest) {
  std::mt19937 random(3);
  const std::vector<int> lengths{9, 10, 11, 200, 800};
  const RaggedBatch ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), 16);
  const AttentionShape shape = shape_of(1, 3, 8);
  const StaticRule rule{.sink_tokens = {4}, .window_tokens = {5}, .top_k = {}};
  std::vector<std::int32_t> smaller;
  for (const Amount pilot : {Amount{0.01}, Amount{60}, Amount{5000}}) {
    ListBuffers lists(5, 3, 800);
    cpu::select_static(shape, ragged.batch, {}, rule, {.tokens = 9}, lists.list);
    cpu::draw_pilot(shape, ragged.batch, {.pilot = pilot}, {.tokens = 9}, lists.list);
    EXPECT_EQ(lists.list.count(0, 0), ListBuffers::kUntouched);
    for (int s = 1; s < 5; ++s) {
      const int n = ragged.batch.kv_len(s);
      for (int g = 0; g < 3; ++g) expect_pilot(lists, s, g, n, std::min(std::max(2, tokens_of(pilot, n)), n - 9));
    }
    // A larger pilot begins with the smaller one.
    const std::vector<std::int32_t> entries = lists.entries(4, 2);
    EXPECT_TRUE(std::equal(smaller.begin(), smaller.end(), entries.begin()));
    EXPECT_NE(lists.entries(4, 1), entries) << "KV heads draw alike";
    smaller = entries;
  }
}

TEST(DrawPilot, DependsOnTheRequestNotOnItsPlaceInTheBatch) {
  std::mt19937 random(4);
  RaggedBatch both(random, Phase::kDecode, {300, 400}, {1, 1}, 16);
  both.request = {8, 5};
  RaggedBatch swapped(random, Phase::kDecode, {400, 300}, {1, 1}, 16);
  swapped.request = {5, 8};
  RaggedBatch alone(random, Phase::kDecode, {400}, {1}, 16);
  alone.request = {5};
  const AttentionShape shape = shape_of(2, 2, 8);
  const auto lists_of = [&](const RaggedBatch& ragged, std::uint32_t seed) {
    ListBuffers lists(ragged.batch.seqs, 2, 400);
    cpu::select_static(shape, ragged.batch, {}, {.sink_tokens = {4}, .window_tokens = {4}, .top_k = {}}, {},
                       lists.list);
    cpu::draw_pilot(shape, ragged.batch, {.pilot = {50}, .seed = seed, .layer = 3}, {}, lists.list);
    return lists;
  };
  ListBuffers a = lists_of(both, 1);
  ListBuffers b = lists_of(swapped, 1);
  ListBuffers c = lists_of(alone, 1);
  ListBuffers d = lists_of(alone, 2);
  for (int g = 0; g < 2; ++g) {
    EXPECT_EQ(a.entries(0, g), b.entries(1, g));
    EXPECT_EQ(a.entries(1, g), b.entries(0, g));
    EXPECT_EQ(a.entries(1, g), c.entries(0, g));
    EXPECT_NE(c.entries(0, g), d.entries(0, g));
  }
}

// Two passes in fp64 over plain rows: what the formulas of sample_tail.h say, for one query head.
struct NaiveSize {
  double denominator = 0.0;
  double output = 0.0;
};
NaiveSize naive_size(const SampleRule& rule, const std::vector<double>& weight,
                     const std::vector<std::vector<double>>& apart, double out_norm, double n) {
  const auto m = static_cast<double>(weight.size());
  const auto variance = [m](const std::vector<double>& x) {
    double mean = 0.0;
    for (double value : x) mean += value / m;
    double sum = 0.0;
    for (double value : x) sum += (value - mean) * (value - mean);
    return sum / (m - 1);
  };
  double trace = 0.0;
  for (std::size_t d = 0; d < apart[0].size(); ++d) {
    std::vector<double> x;
    for (std::size_t i = 0; i < weight.size(); ++i) x.push_back(weight[i] * apart[i][d]);
    trace += variance(x);
  }
  const auto corrected = [n](double b) { return b / (1.0 + b / n); };
  const double z = static_cast<double>(rule.z);
  const double epsilon = static_cast<double>(rule.epsilon);
  return {.denominator = corrected(std::pow(z * n * std::sqrt(variance(weight)) / epsilon, 2)),
          .output = corrected(std::pow(z * n * std::sqrt(trace) / (epsilon * out_norm), 2))};
}

TEST(SizeSample, FollowsTheFormulas) {
  std::mt19937 random(5);
  const std::vector<int> lengths{40, 700, 1500};
  RaggedBatch ragged(random, Phase::kDecode, lengths, {1, 1, 1}, 16);
  const Batch& batch = ragged.batch;
  for (const int head_dim : {6, 64}) {
    const AttentionShape shape = shape_of(3, 2, head_dim);
    PagedTensor k(ragged.pages, 2, 16, head_dim);
    PagedTensor v(ragged.pages, 2, 16, head_dim);
    k.fill(batch, random);
    v.fill(batch, random);
    const auto width = static_cast<std::size_t>(3 * shape.heads * head_dim);
    const std::vector<float> q = random_floats(random, width, -4.0F, 4.0F);
    const std::vector<float> out = random_floats(random, width, 0.2F, 0.6F);
    const std::vector<float> lse = random_floats(random, static_cast<std::size_t>(3 * shape.heads), 6.5F, 7.5F);
    for (const Verify verify : {Verify::kOutput, Verify::kDenominator}) {
      const SampleRule rule{.epsilon = 0.1F, .pilot = {30}, .verify = verify, .on_outlier = OnOutlier::kReport};
      ListBuffers lists(3, 2, 1500);
      cpu::select_static(shape, batch, {}, {.sink_tokens = {4}, .window_tokens = {8}, .top_k = {}}, {.tokens = 40},
                         lists.list);
      cpu::draw_pilot(shape, batch, rule, {.tokens = 40}, lists.list);
      ListBuffers sized = lists;
      cpu::size_sample(
          shape, TensorView<const float, 2>(q.data(), 3, shape.heads * head_dim), {.k = k.ref(), .v = v.ref()}, batch,
          TensorView<const float, 2>(out.data(), 3, shape.heads * head_dim),
          TensorView<const float, 2>(lse.data(), 3, shape.heads), rule, {.tokens = 40}, sized.list, sized.report);
      EXPECT_EQ(sized.list.count(0, 0), ListBuffers::kUntouched);
      EXPECT_EQ(sized.report.guard_hits(0, 0), 0);
      for (int s = 1; s < 3; ++s) {
        for (int g = 0; g < 2; ++g) {
          const std::vector<std::int32_t> entries = lists.entries(s, g);
          const double n = lengths[static_cast<std::size_t>(s)] - 12;
          double largest = 0.0;
          for (int h = 3 * g; h < 3 * g + 3; ++h) {
            std::vector<double> weight;
            std::vector<std::vector<double>> apart;
            double norm = 0.0;
            const auto at = [&](int d) { return static_cast<std::size_t>((s * shape.heads + h) * head_dim + d); };
            for (int d = 0; d < head_dim; ++d) norm += std::pow(static_cast<double>(out[at(d)]), 2);
            for (auto t = entries.begin() + 12; t != entries.end(); ++t) {
              double score = 0.0;
              apart.emplace_back();
              for (int d = 0; d < head_dim; ++d) {
                score += static_cast<double>(q[at(d)]) * static_cast<double>(k.at(batch, s, *t, g, d));
                apart.back().push_back(static_cast<double>(v.at(batch, s, *t, g, d)) - static_cast<double>(out[at(d)]));
              }
              weight.push_back(std::exp(score * static_cast<double>(shape.scale) -
                                        static_cast<double>(lse[static_cast<std::size_t>(s * shape.heads + h)])));
            }
            const NaiveSize size = naive_size(rule, weight, apart, std::sqrt(norm), n);
            largest = std::max({largest, size.denominator, verify == Verify::kOutput ? size.output : 0.0});
          }
          const double expected = std::clamp(static_cast<double>(rule.safety) * largest, 30.0, n);
          const int drawn = sized.list.count(s, g) - sized.list.tail_begin(s, g);
          EXPECT_GE(drawn, std::floor(expected * (1 - 1e-9))) << "sequence " << s << ", KV head " << g;
          EXPECT_LE(drawn, std::ceil(expected * (1 + 1e-9)));
          EXPECT_GT(drawn, 30) << "the pilot alone shows nothing";
          expect_pilot(sized, s, g, lengths[static_cast<std::size_t>(s)], drawn);
          const std::vector<std::int32_t> longer = sized.entries(s, g);
          EXPECT_TRUE(std::equal(entries.begin(), entries.end(), longer.begin())) << "the pilot is not the beginning";
        }
      }
    }
  }
}

TEST(SizeSample, LeavesAListWithoutRestAlone) {
  std::mt19937 random(6);
  RaggedBatch ragged(random, Phase::kDecode, {20}, {1}, 16);
  const AttentionShape shape = shape_of(1, 1, 8);
  PagedTensor k(ragged.pages, 1, 16, 8);
  const std::vector<float> q(8);
  const std::vector<float> lse(1);
  ListBuffers lists(1, 1, 20);
  cpu::select_static(shape, ragged.batch, {}, {.sink_tokens = {15}, .window_tokens = {9}, .top_k = {}}, {}, lists.list);
  cpu::draw_pilot(shape, ragged.batch, {}, {}, lists.list);
  cpu::size_sample(shape, TensorView<const float, 2>(q.data(), 1, 8), {.k = k.ref(), .v = k.ref()}, ragged.batch,
                   TensorView<const float, 2>(q.data(), 1, 8), TensorView<const float, 2>(lse.data(), 1, 1), {}, {},
                   lists.list, lists.report);
  EXPECT_EQ(lists.list.count(0, 0), 20);
  EXPECT_EQ(lists.list.tail_begin(0, 0), 20);
  EXPECT_EQ(lists.report.guard_hits(0, 0), 0);
}

// What the kernel's shared memory and loops over parts rely on.
TEST(SampledCuts, KeepWithinWhatTheKernelHolds) {
  constexpr int kUnits = 264;
  for (const int group : {1, 2, 4, 8, 16}) {
    for (const int tokens : {1024, 8191, 8192, 131072}) {
      for (int lists = 1; lists <= 4096; lists = lists * 3 / 2 + 1) {
        const SampledCuts cuts = sampled_cuts(lists, group, tokens, kUnits);
        EXPECT_TRUE(cuts.team >= 1 && cuts.team <= 32) << cuts.team << " parts for " << lists << " lists";
        EXPECT_TRUE(cuts.draws >= 16 && cuts.draws % 16 == 0) << cuts.draws << " draws for " << lists << " lists";
        EXPECT_TRUE(cuts.parts >= 1 && cuts.parts <= kMostParts) << cuts.parts << " parts for " << lists << " lists";
      }
    }
  }
  // Long samples of many groups are cut into fewer parts; a single head's, and short ones, are not.
  EXPECT_EQ(sampled_cuts(64, 4, 32768, kUnits).draws, 512);
  EXPECT_EQ(sampled_cuts(8, 4, 32768, kUnits).draws, 128);
  EXPECT_EQ(sampled_cuts(64, 4, 4096, kUnits).draws, 256);
  EXPECT_EQ(sampled_cuts(64, 1, 32768, kUnits).draws, 256);
}

}  // namespace
}  // namespace vesper
