// Top-p pruning against a sort in double precision: never less mass than asked for, never more tokens than the smallest
// set of a mass that is larger by the documented tolerance, ties and forced tokens apart.
#include "attention/prune_top_p.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention/mass.h"
#include "tests/score_rows.h"

namespace vesper {
namespace {

constexpr int kPageTokens = 16;

// As attention/mass.h says of a set that is one score too small.
double tolerance(int candidates) {
  return 0x1p-19 + candidates * 0x1p-39;
}

// One head's scores, NaN read as -inf, with their probabilities in double.
struct Oracle {
  std::vector<float> score;
  std::vector<double> probability;
  std::vector<float> sorted;  // descending
  std::vector<double> mass;   // of the sorted scores up to and with this one

  explicit Oracle(std::vector<float> row) : score(std::move(row)) {
    for (float& x : score) x = std::isnan(x) ? -INFINITY : x;
    sorted = score;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const double largest = sorted[0];
    const auto weight = [largest](double x) { return x == largest ? 1.0 : std::exp(x - largest); };
    double total = 0.0;
    for (const float x : sorted) mass.push_back(total += weight(x));
    for (double& sum : mass) sum /= total;
    for (const float x : score) probability.push_back(weight(x) / total);
  }

  // The largest tau whose {score >= tau} has a mass of p; -inf where only all of it has.
  [[nodiscard]] float threshold(double p) const {
    if (p >= 1.0) return -INFINITY;
    const auto reached = std::lower_bound(mass.begin(), mass.end(), p);
    return reached == mass.end() ? -INFINITY : sorted[static_cast<std::size_t>(reached - mass.begin())];
  }
  [[nodiscard]] float best(int count) const {
    return count >= static_cast<int>(sorted.size()) ? -INFINITY
                                                    : sorted[static_cast<std::size_t>(std::max(count, 1) - 1)];
  }
};

struct World : ScoredBatch {
  std::unique_ptr<TokenLists> lists;
  Selection tokens;

  World(std::mt19937& random, int kv_heads, int group, const std::vector<int>& lengths)
      : ScoredBatch(random, kv_heads, group, kPageTokens, lengths) {}

  void prune(const TopPRule& rule, DenseLimit dense = {}) {
    const int seqs = ragged.batch.seqs;
    lists = std::make_unique<TokenLists>(seqs, shape.kv_heads, capacity);
    tokens = lists->tokens;
    prune_top_p({}, shape, ragged.batch, TensorView<const float, 3>(scores.data(), seqs, shape.heads, capacity), pages,
                rule, dense, tokens);
  }

  // Compares every list with what the sort says that it must and may hold.
  void check(const TopPRule& rule, const std::string& what) {
    prune(rule);
    for (int s = 0; s < ragged.batch.seqs; ++s) {
      for (int g = 0; g < shape.kv_heads; ++g) {
        check_list(rule, s, g,
                   what + ", p " + std::to_string(rule.top_p) + ", sequence " + std::to_string(s) + ", KV head " +
                       std::to_string(g));
        if (testing::Test::HasFailure()) return;
      }
    }
  }

  void check_list(const TopPRule& rule, int s, int g, const std::string& what) {
    const std::int32_t kv_len = ragged.batch.kv_len(s);
    std::vector<std::int32_t> candidates;  // those before the end
    for (int j = 0; j < ScoredBatch::candidates(s, g); ++j) {
      if (token(s, g, j) < kv_len) candidates.push_back(token(s, g, j));
    }
    ASSERT_EQ(tokens.tail_begin(s, g), tokens.count(s, g)) << what;
    const std::int32_t* list = &tokens.index(s, g, 0);
    const std::int32_t kept = tokens.count(s, g);
    ASSERT_GE(kept, 1) << what;
    ASSERT_LE(kept, static_cast<std::int32_t>(candidates.size())) << what;
    ASSERT_TRUE(std::is_sorted(list, list + kept, std::less_equal<>())) << what << ": not ascending or not unique";
    ASSERT_EQ(list[kept - 1], kv_len - 1) << what << ": the newest token is missing";
    ASSERT_TRUE(std::includes(candidates.begin(), candidates.end(), list, list + kept)) << what << ": no candidate";

    std::vector<Oracle> heads;
    for (int h = g * shape.group(); h < (g + 1) * shape.group(); ++h) {
      std::vector<float> row;
      for (std::size_t j = 0; j < candidates.size(); ++j) row.push_back(at(s, h, static_cast<int>(j)));
      heads.emplace_back(std::move(row));
    }
    const std::int32_t sink_end = tokens_of(rule.sink_tokens, kv_len);
    const std::int32_t window_begin = kv_len - std::max(1, tokens_of(rule.window_tokens, kv_len));
    const double loose = rule.top_p + tolerance(static_cast<int>(candidates.size()) + kPageTokens);
    std::vector<double> mass(heads.size(), 0.0);
    for (std::size_t j = 0; j < candidates.size(); ++j) {
      const std::int32_t t = candidates[j];
      const bool listed = std::binary_search(list, list + kept, t);
      bool must = t < sink_end || t >= window_begin;
      bool may = must;
      for (std::size_t h = 0; h < heads.size(); ++h) {
        const Oracle& head = heads[h];
        // A sum in double may lie beside the exact one by far less than the two kinds of tolerance differ.
        must |= head.score[j] >= head.threshold(rule.top_p - 1e-12) || head.score[j] >= head.best(rule.min_tokens);
        may |= head.score[j] >= head.threshold(loose) || head.score[j] >= head.best(rule.min_tokens);
        if (listed) mass[h] += head.probability[j];
      }
      ASSERT_TRUE(listed || !must) << what << ": token " << t << " is missing, score " << heads[0].score[j];
      ASSERT_TRUE(!listed || may) << what << ": token " << t << " should have gone, score " << heads[0].score[j];
    }
    for (std::size_t h = 0; h < heads.size(); ++h) {
      ASSERT_GE(mass[h], static_cast<double>(rule.top_p) - 1e-12) << what << ": head " << h << " lost mass";
    }
  }
};

const std::vector<float> kProbabilities = {0.01F, 0.1F, 0.5F, 0.85F, 0.95F, 0.99F, 0.9999F, 0.9999999F, 1.0F};

TEST(PruneTopP, KeepsTheMassAndLittleMoreOnEveryKindOfRow) {
  std::mt19937 random(1);
  for (const ScoreRows& rows : score_rows()) {
    World world(random, 1, 1, {1, 2, 16, 17, 100, 1000, 8192});
    world.score(random, {}, [&](int) -> const ScoreRows& { return rows; });
    for (const float p : kProbabilities) world.check({.top_p = p, .min_tokens = 1}, rows.name);
  }
}

TEST(PruneTopP, HoldsForLongContexts) {
  std::mt19937 random(2);
  World world(random, 2, 2, {39999, 40000, 20001});
  for (const char* name : {"sink first", "no sink, narrow", "no sink", "heavy ties"}) {
    const auto rows = std::find_if(score_rows().begin(), score_rows().end(), [&](auto& r) { return r.name == name; });
    world.score(random, {}, [&](int) -> const ScoreRows& { return *rows; });
    for (const float p : {0.85F, 0.95F, 0.9999F}) world.check({.top_p = p}, rows->name);
  }
}

TEST(PruneTopP, UnitesTheHeadsOfAGroup) {
  std::mt19937 random(3);
  for (int group = 1; group <= 8; ++group) {
    World world(random, 2, group, {1, 40, 333, 2000});
    // Every head of a group has a row of another kind.
    for (std::size_t first = 0; first < score_rows().size(); first += 3) {
      world.score(random, {}, [&](int h) -> const ScoreRows& {
        return score_rows()[(first + static_cast<std::size_t>(h)) % score_rows().size()];
      });
      for (const float p : {0.1F, 0.85F, 0.95F}) world.check({.top_p = p}, "group " + std::to_string(group));
    }
  }
}

TEST(PruneTopP, ChoosesAmongTheCandidatesOnly) {
  std::mt19937 random(4);
  for (const bool with_first : {true, false}) {
    for (const double share : {0.0, 0.25, 0.9}) {
      World world(random, 2, 4, {1, 15, 16, 17, 500, 4001});
      const PageLists lists(random, world.ragged.batch, 2, kPageTokens, share, with_first);
      for (const ScoreRows& rows : score_rows()) {
        world.score(random, lists.pages, [&](int) -> const ScoreRows& { return rows; });
        for (const float p : {0.5F, 0.95F, 1.0F}) {
          world.check({.top_p = p}, rows.name + (with_first ? ", sink listed" : ", sink not listed"));
          world.check({.top_p = p, .sink_tokens = {20}, .window_tokens = {0.1}}, rows.name + ", sink and window");
        }
      }
    }
  }
}

TEST(PruneTopP, KeepsEveryCandidateAtOne) {
  std::mt19937 random(5);
  for (const ScoreRows& rows : score_rows()) {
    World world(random, 2, 3, {1, 31, 700});
    const PageLists lists(random, world.ragged.batch, 2, kPageTokens, 0.5);
    for (const Selection& pages : {Selection{}, lists.pages}) {
      world.score(random, pages, [&](int) -> const ScoreRows& { return rows; });
      world.prune({.top_p = 1.0F});
      for (int s = 0; s < 3; ++s) {
        for (int g = 0; g < 2; ++g) {
          const int behind = (kPageTokens - world.ragged.batch.kv_len(s) % kPageTokens) % kPageTokens;
          const int all = world.candidates(s, g) - (pages.index.data() == nullptr ? 0 : behind);
          ASSERT_EQ(world.tokens.count(s, g), all) << rows.name;
        }
      }
    }
  }
}

TEST(PruneTopP, KeepsAtLeastItsFloorOfTheBestCandidates) {
  std::mt19937 random(6);
  for (const ScoreRows& rows : score_rows()) {
    World world(random, 1, 2, {1, 15, 16, 17, 1000});
    world.score(random, {}, [&](int) -> const ScoreRows& { return rows; });
    for (const int floor : {0, 1, 2, 16, 500, 5000}) {
      world.check({.top_p = 0.3F, .min_tokens = floor}, rows.name + ", floor " + std::to_string(floor));
    }
  }
}

// One token of probability 1/2 and eight of together 1/2: under 1/2 the one is enough, above it all eight join.
TEST(PruneTopP, KeepsAllTiesOfItsThreshold) {
  std::mt19937 random(7);
  World world(random, 1, 1, {9});
  const ScoreRows rows{"ties", [](auto&, int t, int) { return t == 0 ? std::log(8.0F) : 0.0F; }};
  world.score(random, {}, [&](int) -> const ScoreRows& { return rows; });
  world.prune({.top_p = 0.49F, .min_tokens = 1});
  EXPECT_EQ(world.tokens.count(0, 0), 2);  // the best and the newest
  world.prune({.top_p = 0.51F, .min_tokens = 1});
  EXPECT_EQ(world.tokens.count(0, 0), 9);
}

TEST(PruneTopP, LeavesSequencesUnderTheDenseLimitAlone) {
  std::mt19937 random(8);
  World world(random, 1, 1, {40, 41});
  world.score(random, {}, [&](int) -> const ScoreRows& { return score_rows()[2]; });
  world.prune({}, {.tokens = 40});
  EXPECT_EQ(world.tokens.count(0, 0), -1);
  EXPECT_EQ(world.tokens.index(0, 0, 0), -1);
  EXPECT_GE(world.tokens.count(1, 0), 1);
}

// The integers behind the masses: within the errors that attention/mass.h states, over the whole range.
TEST(Mass, IsTheExponentialWithinItsBound) {
  std::mt19937 random(9);
  std::uniform_real_distribution<float> uniform(0.0F, 40.0F);
  for (int i = 0; i < 1000000; ++i) {
    const float largest = uniform(random) - 20.0F;
    const float score = largest - uniform(random);
    const double truth = std::exp(static_cast<double>(score) - largest) * 0x1p40;
    const auto mass = static_cast<double>(mass_of(score, largest));
    ASSERT_LE(mass * (1 - 0x1p-19), truth) << score << " below " << largest;
    ASSERT_LT(truth, (mass + 1) * (1 + 0x1p-19)) << score << " below " << largest;
  }
  EXPECT_EQ(mass_of(3.0F, 3.0F), std::uint64_t{1} << 40);
  EXPECT_EQ(mass_of(INFINITY, INFINITY), std::uint64_t{1} << 40);
  EXPECT_EQ(mass_of(0.0F, INFINITY), 0U);
  EXPECT_EQ(mass_of(-INFINITY, 0.0F), 0U);
  EXPECT_EQ(mass_of(NAN, 0.0F), 0U);
}

TEST(Mass, OrderIsThatOfTheScores) {
  const std::vector<float> ascending = {-INFINITY, -3e38F, -1.0F, -1e-40F, 0.0F, 1e-40F, 1.0F, 3e38F, INFINITY};
  for (std::size_t i = 1; i < ascending.size(); ++i) EXPECT_LT(order_of(ascending[i - 1]), order_of(ascending[i]));
  EXPECT_EQ(order_of(0.0F), order_of(-0.0F));
  EXPECT_EQ(order_of(NAN), kOrderOfMinusInfinity);
  EXPECT_EQ(order_of(-NAN), kOrderOfMinusInfinity);
  EXPECT_EQ(order_of(-INFINITY), kOrderOfMinusInfinity);
  float previous = INFINITY;
  for (int i = 0; i < 300; ++i) {
    const float score = 10.0F - 0.125F * static_cast<float>(i);
    EXPECT_EQ(distance_bin(score, 10.0F), std::min(i, kDistanceBins - 1));
    EXPECT_LT(score, previous);
    previous = score;
  }
}

}  // namespace
}  // namespace vesper
