// Page scores against double precision, page selection against a sort.
#include "attention/select_pages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/attention/page_lists.h"
#include "tests/compare.h"
#include "tests/side_tables.h"

namespace vesper {
namespace {

struct Case {
  int heads, kv_heads, head_dim, page_tokens;

  [[nodiscard]] AttentionShape shape() const {
    return {.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .page_tokens = page_tokens, .scale = 0.125F};
  }
  [[nodiscard]] std::string words() const {
    return "heads " + std::to_string(heads) + ", kv_heads " + std::to_string(kv_heads) + ", head_dim " +
           std::to_string(head_dim) + ", page_tokens " + std::to_string(page_tokens);
  }
};

// A value and what fp32 may miss it by.
struct Bounded {
  double value = 0.0;
  double bound = 0.0;
};

// One head's score of a page in double precision, from the keys themselves.
//   min_max: two products a channel, of which relu leaves one, and their sum.
//   mean_std: the fp32 moments of n keys miss by n eps of their magnitudes; mean, square, difference and root then
//   round once each. With v the variance, dv its error: |sqrt(v + dv) - sqrt(v)| <= min(sqrt(dv), dv / sqrt(v)).
Bounded naive_score(PagedTensor& k, const Batch& batch, const Case& c, int s, int g, int p, const float* q,
                    PageScore page_score) {
  const int begin = p * c.page_tokens;
  const int end = std::min(begin + c.page_tokens, batch.kv_len(s));
  const double n = end - begin;
  Bounded score;
  double magnitudes = 0.0;
  for (int d = 0; d < c.head_dim; ++d) {
    double least = INFINITY;
    double largest = -INFINITY;
    double sum = 0.0;
    double magnitude = 0.0;
    double squares = 0.0;
    for (int t = begin; t < end; ++t) {
      const double key = k.at(batch, s, t, g, d);
      least = std::min(least, key);
      largest = std::max(largest, key);
      sum += key;
      magnitude += std::abs(key);
      squares += key * key;
    }
    const double x = q[d];
    if (page_score == PageScore::kMinMax) {
      score.value += std::max(x * least, x * largest);
      magnitudes += std::max(std::abs(x * least), std::abs(x * largest));
      continue;
    }
    const double mean = sum / n;
    const double variance = std::max(0.0, squares / n - mean * mean);
    const double mean_error = (n + 3) * kRoundF32 * magnitude / n;
    const double variance_error =
        (n + 4) * kRoundF32 * squares / n + 2 * std::abs(mean) * mean_error + 2 * kRoundF32 * mean * mean;
    const double deviation = std::sqrt(variance);
    const double deviation_error = std::min(std::sqrt(variance_error), variance_error / deviation);
    score.value += x * mean + std::abs(x) * deviation;
    score.bound += std::abs(x) * (mean_error + deviation_error + 2 * kRoundF32 * (std::abs(mean) + deviation));
    magnitudes += std::abs(x) * (std::abs(mean) + deviation);
  }
  score.bound += sum_bound(2 * c.head_dim, magnitudes);
  return score;
}

Bounded naive_group_score(const std::vector<Bounded>& of_heads, GroupScore group_score) {
  Bounded reduced{group_score == GroupScore::kMax ? -INFINITY : 0.0, 0.0};
  double magnitudes = 0.0;
  for (const Bounded& head : of_heads) {
    if (group_score == GroupScore::kMax) {
      reduced.value = std::max(reduced.value, head.value);
      reduced.bound = std::max(reduced.bound, head.bound);
    } else {
      reduced.value += head.value;
      reduced.bound += head.bound;
      magnitudes += std::abs(head.value);
    }
  }
  const auto group = static_cast<double>(of_heads.size());
  if (group_score != GroupScore::kMax) reduced.bound += sum_bound(group, magnitudes);
  if (group_score == GroupScore::kMean) {
    reduced.value /= group;
    reduced.bound = reduced.bound / group + kRoundF32 * std::abs(reduced.value);
  }
  return reduced;
}

void check_scores(const Case& c, const RaggedBatch& ragged, PageScore page_score, GroupScore group_score,
                  DenseLimit dense, std::mt19937& random) {
  const Batch& batch = ragged.batch;
  const int group = c.heads / c.kv_heads;
  PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  k.fill(batch, random);
  SideTensors tables(k);
  const LayerKv kv = tables.layer(k);
  const RaggedPrefill all(ragged);
  cpu::update_side_tables(all.batch, kv);
  std::vector<float> q = random_floats(random, static_cast<std::size_t>(batch.seqs * c.heads * c.head_dim));
  const std::int64_t capacity = batch.page_table.shape(1);
  std::vector<float> scores(static_cast<std::size_t>(batch.seqs * c.kv_heads * capacity), NAN);
  cpu::score_pages(c.shape(), TensorView<const float, 2>(q.data(), batch.seqs, c.heads * c.head_dim), kv, batch,
                   page_score, group_score, dense,
                   TensorView<float, 3>(scores.data(), batch.seqs, c.kv_heads, capacity));

  std::vector<float> found;
  std::vector<double> expected;
  std::vector<double> bound;
  int wrong = 0;  // written behind the end, or below the keys' own products
  for (int s = 0; s < batch.seqs; ++s) {
    for (int g = 0; g < c.kv_heads; ++g) {
      for (int p = 0; p < capacity; ++p) {
        const float score = scores[static_cast<std::size_t>((s * c.kv_heads + g) * capacity + p)];
        if (p * c.page_tokens >= batch.kv_len(s) || batch.kv_len(s) <= dense.tokens) {
          wrong += std::isnan(score) ? 0 : 1;
          continue;
        }
        std::vector<Bounded> of_heads;
        for (int h = g * group; h < (g + 1) * group; ++h) {
          of_heads.push_back(naive_score(k, batch, c, s, g, p,
                                         &q[static_cast<std::size_t>((s * c.heads + h) * c.head_dim)], page_score));
        }
        const Bounded naive = naive_group_score(of_heads, group_score);
        found.push_back(score);
        expected.push_back(naive.value);
        bound.push_back(naive.bound);
        if (page_score != PageScore::kMinMax || group_score != GroupScore::kMax) continue;
        for (int t = p * c.page_tokens; t < std::min((p + 1) * c.page_tokens, batch.kv_len(s)); ++t) {
          for (int h = g * group; h < (g + 1) * group; ++h) {
            double product = 0.0;
            for (int d = 0; d < c.head_dim; ++d) {
              product += static_cast<double>(q[static_cast<std::size_t>((s * c.heads + h) * c.head_dim + d)]) *
                         k.at(batch, s, t, g, d);
            }
            wrong += product <= score + naive.bound ? 0 : 1;
          }
        }
      }
    }
  }
  expect_within(found, expected, bound, c.words());
  EXPECT_EQ(wrong, 0) << c.words();
}

TEST(ScorePages, BoundTheProductsOfAPage) {
  std::mt19937 random(1);
  for (const Case& c : {Case{4, 4, 64, 16}, Case{8, 1, 128, 32}, Case{6, 2, 20, 16}, Case{5, 1, 6, 64}}) {
    const RaggedBatch ragged(random, Phase::kDecode, {1, 16, 17, 300, 64}, {1, 1, 1, 1, 1}, c.page_tokens);
    for (const PageScore page_score : {PageScore::kMinMax, PageScore::kMeanStd}) {
      for (const GroupScore group_score : {GroupScore::kMax, GroupScore::kSum, GroupScore::kMean}) {
        check_scores(c, ragged, page_score, group_score, {0}, random);
        check_scores(c, ragged, page_score, group_score, {17}, random);
      }
    }
  }
}

TEST(ScorePages, OfEveryGroup) {
  std::mt19937 random(5);
  for (int group = 1; group <= 8; ++group) {
    const Case c{2 * group, 2, 64, 16};
    const RaggedBatch ragged(random, Phase::kDecode, {1, 33, 4000}, {1, 1, 1}, c.page_tokens);
    check_scores(c, ragged, PageScore::kMinMax, GroupScore::kMax, {0}, random);
  }
}

// Every score of bounds in 8 bits is at least that of the bounds themselves, to the last bit: the terms of both sums
// come in one order, and rounding to nearest is monotone. BoundTheProductsOfAPage has the latter over the keys.
TEST(ScorePages, OfBoundsInEightBitsAreNoLess) {
  std::mt19937 random(6);
  for (const Case& c : {Case{4, 4, 64, 16}, Case{8, 1, 128, 32}, Case{6, 2, 20, 16}, Case{5, 1, 6, 64}}) {
    const RaggedBatch ragged(random, Phase::kDecode, {1, 16, 17, 300, 64}, {1, 1, 1, 1, 1}, c.page_tokens);
    const Batch& batch = ragged.batch;
    PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
    k.fill(batch, random);
    for (std::size_t i = 0; i < k.data.size(); i += 7) k.data[i] *= 30.0F;  // some channels of some keys stand out
    SideTensors tables(k);
    const LayerKv kv = tables.layer(k);
    const RaggedPrefill all(ragged);
    cpu::update_side_tables(all.batch, kv);
    const std::vector<float> q = random_floats(random, static_cast<std::size_t>(batch.seqs * c.heads * c.head_dim));
    const std::int64_t capacity = batch.page_table.shape(1);
    const auto scores = [&](PageScore page_score, GroupScore group_score) {
      std::vector<float> found(static_cast<std::size_t>(batch.seqs * c.kv_heads * capacity), NAN);
      cpu::score_pages(c.shape(), TensorView<const float, 2>(q.data(), batch.seqs, c.heads * c.head_dim), kv, batch,
                       page_score, group_score, {0},
                       TensorView<float, 3>(found.data(), batch.seqs, c.kv_heads, capacity));
      return found;
    };
    for (const GroupScore group_score : {GroupScore::kMax, GroupScore::kSum, GroupScore::kMean}) {
      const std::vector<float> exact = scores(PageScore::kMinMax, group_score);
      const std::vector<float> int8 = scores(PageScore::kMinMaxInt8, group_score);
      int less = 0;
      int above = 0;
      for (std::size_t i = 0; i < exact.size(); ++i) {
        less += int8[i] < exact[i] || std::isnan(int8[i]) != std::isnan(exact[i]) ? 1 : 0;
        above += int8[i] > exact[i] ? 1 : 0;
      }
      EXPECT_EQ(less, 0) << c.words();
      EXPECT_GT(above, 0) << c.words();
    }
  }
}

// Keys, a query and scores that are worked out by hand.
TEST(ScorePages, WorkedByHand) {
  std::mt19937 random(2);
  const Case c{2, 1, 2, 16};
  const RaggedBatch ragged(random, Phase::kDecode, {2}, {1}, c.page_tokens);
  PagedTensor k(ragged.pages, 1, 16, 2);
  k.at(ragged.batch, 0, 0, 0, 0) = 1.0F;
  k.at(ragged.batch, 0, 0, 0, 1) = -3.0F;
  k.at(ragged.batch, 0, 1, 0, 0) = 5.0F;
  k.at(ragged.batch, 0, 1, 0, 1) = 1.0F;
  SideTensors tables(k);
  const LayerKv kv = tables.layer(k);
  const RaggedPrefill all(ragged);
  cpu::update_side_tables(all.batch, kv);
  const std::vector<float> q = {1.0F, -2.0F, -1.0F, 0.5F};
  const auto score = [&](PageScore page_score, GroupScore group_score) {
    float result = NAN;
    cpu::score_pages(c.shape(), TensorView<const float, 2>(q.data(), 1, 4), kv, ragged.batch, page_score, group_score,
                     {0}, TensorView<float, 3>(&result, 1, 1, 1));
    return result;
  };
  // Head 0: 1 * 5 + -2 * -3 = 11; head 1: -1 * 1 + 0.5 * 1 = -0.5.
  EXPECT_EQ(score(PageScore::kMinMax, GroupScore::kMax), 11.0F);
  EXPECT_EQ(score(PageScore::kMinMax, GroupScore::kSum), 10.5F);
  EXPECT_EQ(score(PageScore::kMinMax, GroupScore::kMean), 5.25F);
  // In steps of bf16(5 / 127) = 0.039551, -3 ... 1 of bf16(3 / 127) = 0.023682: 127 and 26 steps up, 43 and 127 down.
  // Head 0: 127 * 0.039551 + 2 * 127 * 0.023682; head 1: least key of channel 0 is 42 steps, largest of channel 1
  // is 26.
  EXPECT_EQ(score(PageScore::kMinMaxInt8, GroupScore::kMax), 127 * 0.03955078125F + 2 * 127 * 0.023681640625F);
  EXPECT_EQ(score(PageScore::kMinMaxInt8, GroupScore::kSum),
            127 * 0.03955078125F + 2 * 127 * 0.023681640625F - 42 * 0.023681640625F + 13 * 0.03955078125F);
  // Means 3 and -1, deviations 2 and 2. Head 0: 3 + 2 + 2 + 4 = 11; head 1: -3 + 2 - 0.5 + 1 = -0.5.
  EXPECT_EQ(score(PageScore::kMeanStd, GroupScore::kMax), 11.0F);
  EXPECT_EQ(score(PageScore::kMeanStd, GroupScore::kMean), 5.25F);
}

TEST(SelectPages, AsASortWould) {
  std::mt19937 random(3);
  for (const ScoreKind kind : kScoreKinds) {
    for (const int page_tokens : {16, 64}) {
      const AttentionShape shape{.heads = 4, .kv_heads = 2, .head_dim = 64, .page_tokens = page_tokens, .scale = 1.0F};
      const RaggedBatch ragged(random, Phase::kDecode, {1, 15, 16, 17, 64, 65, 1000, 40000}, {1, 1, 1, 1, 1, 1, 1, 1},
                               page_tokens);
      const std::vector<float> scores = make_scores(random, kind, ragged.batch, shape.kv_heads);
      for (const PageBudget& budget : kBudgets) {
        for (const DenseLimit dense : {DenseLimit{0}, DenseLimit{64}}) {
          PageLists lists(ragged.batch, shape.kv_heads);
          cpu::select_pages(shape, ragged.batch, view_scores(scores, ragged.batch, shape.kv_heads), budget, dense,
                            lists.selection());
          expect_as_sorted(shape, ragged.batch, scores, budget, dense, lists, describe(kind, budget, page_tokens));
        }
      }
    }
  }
}

// A budget that covers the context takes every page, also where the last is not full; one token is one page.
TEST(SelectPages, CountsTheBudgetInWholePages) {
  std::mt19937 random(4);
  const AttentionShape shape{.heads = 1, .kv_heads = 1, .head_dim = 64, .page_tokens = 16, .scale = 1.0F};
  const RaggedBatch ragged(random, Phase::kDecode, {100}, {1}, 16);  // 7 pages
  const std::vector<float> scores = {3.0F, 1.0F, 5.0F, 5.0F, 2.0F, 4.0F, 0.0F};
  const auto select = [&](const PageBudget& budget) {
    PageLists lists(ragged.batch, 1);
    cpu::select_pages(shape, ragged.batch, TensorView<const float, 3>(scores.data(), 1, 1, 7), budget, {0},
                      lists.selection());
    return std::vector<std::int32_t>(lists.index.begin(), lists.index.begin() + lists.count[0]);
  };
  using List = std::vector<std::int32_t>;
  EXPECT_EQ(select({.tokens = {1.0}}), List({6}));
  EXPECT_EQ(select({.tokens = {31.0}}), List({6}));
  EXPECT_EQ(select({.tokens = {32.0}}), List({2, 6}));
  EXPECT_EQ(select({.tokens = {63.0}}), List({2, 3, 6}));
  EXPECT_EQ(select({.tokens = {64.0}}), List({2, 3, 5, 6}));
  EXPECT_EQ(select({.tokens = {0.5}}), List({2, 3, 6}));  // 50 tokens
  EXPECT_EQ(select({.tokens = {99.0}}), List({0, 2, 3, 4, 5, 6}));
  EXPECT_EQ(select({.tokens = {100.0}}), List({0, 1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(select({.tokens = {48.0}, .sink_tokens = {1.0}}), List({0, 2, 6}));
  EXPECT_EQ(select({.tokens = {48.0}, .sink_tokens = {1.0}, .window_tokens = {5.0}}), List({0, 5, 6}));
  EXPECT_EQ(select({.tokens = {16.0}, .sink_tokens = {17.0}, .window_tokens = {4.0}}), List({0, 1, 6}));
  EXPECT_EQ(select({.tokens = {16.0}, .sink_tokens = {90.0}, .window_tokens = {90.0}}), List({0, 1, 2, 3, 4, 5, 6}));
}

}  // namespace
}  // namespace vesper
