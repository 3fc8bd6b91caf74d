// Scores of single tokens against the dot product in double precision, under a bound derived from fp32.
#include "attention/score_tokens.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "tests/compare.h"
#include "tests/int4_keys.h"
#include "tests/page_lists.h"
#include "tests/paged.h"

namespace vesper {
namespace {

constexpr float kUntouched = 12345.0F;

struct World {
  AttentionShape shape;
  RaggedBatch ragged;
  PagedTensor k;
  std::vector<float> q;
  Int4Keys int4;

  World(std::mt19937& random, const AttentionShape& sizes, const std::vector<int>& lengths)
      : shape(sizes),
        ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), sizes.page_tokens),
        k(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim),
        q(random_floats(random, lengths.size() * static_cast<std::size_t>(sizes.heads * sizes.head_dim), -4, 4)),
        int4(filled(k, ragged.batch, random), ragged.batch) {}

  static PagedTensor& filled(PagedTensor& k, const Batch& batch, std::mt19937& random) {
    k.fill(batch, random);
    return k;
  }

  std::vector<float> scores(const Selection& pages, KeySource source, DenseLimit dense = {}) {
    const Batch& batch = ragged.batch;
    const std::int64_t capacity = candidate_capacity(pages, batch, shape.page_tokens);
    std::vector<float> result(static_cast<std::size_t>(batch.seqs * shape.heads * capacity), kUntouched);
    const LayerKv kv{.k = k.ref(), .v = {}, .int4 = int4.codes_ref(), .int4_params = int4.params_ref()};
    score_tokens({}, shape, tensor_ref(q.data(), DType::kF32, batch.seqs, shape.heads * shape.head_dim), kv, batch,
                 pages, source, dense, TensorView<float, 3>(result.data(), batch.seqs, shape.heads, capacity));
    return result;
  }

  // What score_tokens should say of one token, and how far fp32 sums in any order may be from it.
  void reference(KeySource source, int s, int h, int t, double& expected, double& bound) {
    const int g = h / shape.group();
    const std::size_t line = int4.line_of(ragged.batch, s, t, g);
    const bool exact = source == KeySource::kExact;
    const double factor = exact ? 1.0 : int4.scale(line);
    const double offset = exact ? 0.0 : int4.zero(line);
    double dot = 0.0;
    double sum = 0.0;
    double dot_magnitude = 0.0;
    double sum_magnitude = 0.0;
    for (int d = 0; d < shape.head_dim; ++d) {
      const double x = q[static_cast<std::size_t>((s * shape.heads + h) * shape.head_dim + d)];
      const double row = exact ? k.at(ragged.batch, s, t, g, d) : int4.code(line, d);
      dot += x * row;
      sum += x;
      dot_magnitude += std::abs(x * row);
      sum_magnitude += std::abs(x);
    }
    expected = shape.scale * (factor * dot + offset * sum);
    // Four more roundings: two products, their sum, the scale.
    bound = shape.scale * sum_bound(shape.head_dim + 4, factor * dot_magnitude + std::abs(offset) * sum_magnitude);
  }

  void check(const Selection& pages, KeySource source, const std::string& what) {
    const std::vector<float> all = scores(pages, source);
    const Batch& batch = ragged.batch;
    const std::int64_t capacity = candidate_capacity(pages, batch, shape.page_tokens);
    std::vector<float> found;
    std::vector<double> expected, bound;
    for (int s = 0; s < batch.seqs; ++s) {
      for (int h = 0; h < shape.heads; ++h) {
        const int g = h / shape.group();
        const int candidates = candidate_count(pages, batch, shape.page_tokens, s, g);
        for (int j = 0; j < capacity; ++j) {
          const float score = all[static_cast<std::size_t>((s * shape.heads + h) * capacity + j)];
          if (j >= candidates) {
            ASSERT_EQ(score, kUntouched) << what << ": wrote behind the candidates, sequence " << s << " head " << h;
            continue;
          }
          const std::int32_t t = candidate_token(pages, shape.page_tokens, s, g, j);
          if (t >= batch.kv_len(s)) {
            ASSERT_EQ(score, -INFINITY) << what << ": candidate " << j << " lies behind the end";
            continue;
          }
          found.push_back(score);
          reference(source, s, h, t, expected.emplace_back(), bound.emplace_back());
        }
      }
    }
    expect_within(found, expected, bound, what);
  }
};

AttentionShape shape_of(int kv_heads, int group, int head_dim, int page_tokens) {
  return {.heads = kv_heads * group,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .page_tokens = page_tokens,
          .scale = 1.0F / std::sqrt(static_cast<float>(head_dim))};
}

TEST(ScoreTokens, AreTheDotProductsWithKeysAndWithTheirFourBitCopies) {
  std::mt19937 random(1);
  for (const auto& [kv_heads, group, head_dim, page_tokens] :
       {std::array{2, 4, 64, 16}, {1, 1, 128, 16}, {3, 2, 128, 32}, {2, 8, 64, 64}, {1, 16, 64, 16}, {2, 3, 20, 4}}) {
    World world(random, shape_of(kv_heads, group, head_dim, page_tokens), {1, 15, 16, 17, 300, 777});
    const PageLists lists(random, world.ragged.batch, kv_heads, page_tokens, 0.4);
    const std::string sizes = std::to_string(kv_heads) + " KV heads, group " + std::to_string(group) + ", head_dim " +
                              std::to_string(head_dim) + ", page_tokens " + std::to_string(page_tokens);
    world.check({}, KeySource::kInt4, "int4, all tokens, " + sizes);
    world.check({}, KeySource::kExact, "exact, all tokens, " + sizes);
    world.check(lists.pages, KeySource::kInt4, "int4, listed pages, " + sizes);
    world.check(lists.pages, KeySource::kExact, "exact, listed pages, " + sizes);
  }
}

// By hand: codes 0 ... 15 at scale 1 and zero 0 are the key itself, so both sources agree to the bit.
TEST(ScoreTokens, OfAKeyThatFourBitsHoldAreExact) {
  std::mt19937 random(2);
  const AttentionShape shape{.heads = 1, .kv_heads = 1, .head_dim = 16, .page_tokens = 16, .scale = 0.25F};
  World world(random, shape, {1});
  for (int d = 0; d < 16; ++d) {
    world.k.at(world.ragged.batch, 0, 0, 0, d) = static_cast<float>(15 - d);
    world.q[static_cast<std::size_t>(d)] = static_cast<float>(d);
  }
  world.int4 = Int4Keys(world.k, world.ragged.batch);
  const double by_hand = 0.25 * (15.0 * 120.0 - 1240.0);  // sum d (15 - d) = 15 sum d - sum d^2
  EXPECT_EQ(world.scores({}, KeySource::kExact)[0], by_hand);
  EXPECT_EQ(world.scores({}, KeySource::kInt4)[0], by_hand);
}

// A row of equal channels has scale 0: its score is zero * sum(q).
TEST(ScoreTokens, OfAConstantKeyAreItsZeroTimesTheSum) {
  std::mt19937 random(3);
  World world(random, shape_of(1, 2, 64, 16), {5});
  for (int d = 0; d < 64; ++d) world.k.at(world.ragged.batch, 0, 3, 0, d) = 0.5F;
  world.int4 = Int4Keys(world.k, world.ragged.batch);
  world.check({}, KeySource::kInt4, "a constant key");
}

TEST(ScoreTokens, OfSequencesUnderTheDenseLimitAreNotWritten) {
  std::mt19937 random(4);
  World world(random, shape_of(2, 2, 64, 16), {40, 41, 39});
  const std::vector<float> found = world.scores({}, KeySource::kInt4, {.tokens = 40});
  constexpr std::size_t kCapacity = 48;  // whole pages
  constexpr std::size_t kOfOne = 4 * kCapacity;
  ASSERT_EQ(found.size(), 3 * kOfOne);
  for (std::size_t i = 0; i < kOfOne; ++i) {
    ASSERT_EQ(found[i], kUntouched);
    ASSERT_EQ(found[kOfOne + i] != kUntouched, i % kCapacity < 41);
    ASSERT_EQ(found[2 * kOfOne + i], kUntouched);
  }
}

TEST(ScoreTokens, DoNotDependOnTheBatch) {
  std::mt19937 random(5);
  World world(random, shape_of(2, 4, 64, 16), {600, 33, 1500});
  const std::vector<float> together = world.scores({}, KeySource::kInt4);
  std::vector<std::int32_t> kv_len{0, 0, 1500};  // alone: the others are under the limit
  world.ragged.batch.kv_len = TensorView<const std::int32_t, 1>(kv_len.data(), 3);
  const std::vector<float> alone = world.scores({}, KeySource::kInt4);
  for (std::size_t i = 2U * 8 * 1500; i < together.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(together[i]), std::bit_cast<std::uint32_t>(alone[i])) << i;
  }
}

}  // namespace
}  // namespace vesper
