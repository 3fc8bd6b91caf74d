// The append pass against a plain rotation in double precision.
#include "kvcache/append.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "tests/compare.h"
#include "tests/paged.h"

namespace vesper {
namespace {

// Channel d of rotate(x) in double precision at the contract's fp32 angle, and the bound of an fp32 rotation: sine and
// cosine within one ulp (two half-ulps), their product with the attention factor, two products, one sum.
struct Rotated {
  double value = 0.0;
  double bound = 0.0;
};

Rotated rotate(const float* x, int d, int head_dim, int position, const float* inv_freq, float factor) {
  const int half = head_dim / 2;
  const int pair = d % half;
  const double angle = static_cast<float>(position) * inv_freq[pair];
  const double along = x[d] * std::cos(angle);
  const double across = d < half ? -x[d + half] * std::sin(angle) : x[d - half] * std::sin(angle);
  return {factor * (along + across), 5.5 * factor * kRoundF32 * (std::abs(along) + std::abs(across))};
}

struct Case {
  int heads, kv_heads, head_dim, page_tokens;
};

// `own_frequencies`: each sequence has a row of them, and they are scaled differently.
void check(const Case& c, const RaggedBatch& ragged, std::mt19937& random, bool own_frequencies = false,
           float attention_factor = 1.0F) {
  const Batch& batch = ragged.batch;
  const int columns = (c.heads + 2 * c.kv_heads) * c.head_dim;
  std::vector<float> qkv = random_floats(random, static_cast<std::size_t>(batch.tokens * columns));
  const int pairs = c.head_dim / 2;
  std::vector<float> inv_freq;
  for (int s = 0; s < (own_frequencies ? batch.seqs : 1); ++s) {
    for (int d = 0; d < pairs; ++d) {
      inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * d / c.head_dim) / (s + 1)));
    }
  }
  PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  PagedTensor v(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  std::vector<float> q(static_cast<std::size_t>(batch.tokens * c.heads * c.head_dim));
  const Rope rope{.inv_freq = TensorView<const float, 1>(inv_freq.data(), inv_freq.size()),
                  .seq_stride = own_frequencies ? pairs : 0,
                  .attention_factor = attention_factor};
  cpu::append_kv(TensorView<const float, 2>(qkv.data(), batch.tokens, columns), rope, batch, {k.ref(), v.ref()},
                 TensorView<float, 2>(q.data(), batch.tokens, c.heads * c.head_dim));

  std::vector<float> found;
  std::vector<double> expected;
  std::vector<double> bound;
  std::size_t stored = 0;
  for (int t = 0; t < batch.tokens; ++t) {
    const int s = batch.seq_of_token(t);
    const int position = batch.positions(t);
    const float* row = qkv.data() + static_cast<std::ptrdiff_t>(t) * columns;
    const auto expect = [&](float value, const float* x, int d) {
      const Rotated rotated =
          rotate(x, d, c.head_dim, position, inv_freq.data() + s * rope.seq_stride, attention_factor);
      found.push_back(value);
      expected.push_back(rotated.value);
      bound.push_back(rotated.bound);
    };
    for (int h = 0; h < c.heads; ++h) {
      for (int d = 0; d < c.head_dim; ++d) {
        expect(q[static_cast<std::size_t>((t * c.heads + h) * c.head_dim + d)], row + h * c.head_dim, d);
      }
    }
    for (int g = 0; g < c.kv_heads; ++g) {
      for (int d = 0; d < c.head_dim; ++d) {
        expect(k.at(batch, s, position, g, d), row + (c.heads + g) * c.head_dim, d);
        ASSERT_EQ(v.at(batch, s, position, g, d), row[(c.heads + c.kv_heads + g) * c.head_dim + d]);
        ++stored;
      }
    }
  }
  expect_within(found, expected, bound,
                "head_dim " + std::to_string(c.head_dim) + ", page_tokens " + std::to_string(c.page_tokens));
  // Nothing else was written.
  const auto count_written = [](const PagedTensor& tensor) {
    return static_cast<std::size_t>(
        std::count_if(tensor.data.begin(), tensor.data.end(), [](float x) { return !std::isnan(x); }));
  };
  EXPECT_EQ(count_written(k), stored);
  EXPECT_EQ(count_written(v), stored);
}

TEST(AppendCpu, PrefillChunksOfRaggedSequences) {
  std::mt19937 random(1);
  for (const Case& c : {Case{4, 4, 64, 16}, Case{6, 2, 128, 32}, Case{7, 1, 20, 16}, Case{8, 1, 64, 64},
                        Case{2, 1, 2, 16}, Case{3, 3, 96, 32}}) {
    // Chunks from the start, from mid-page, of one token, and across pages.
    const RaggedBatch ragged(random, Phase::kPrefill, {40, 1, 70, 129}, {40, 1, 33, 60}, c.page_tokens);
    check(c, ragged, random);
  }
}

TEST(AppendCpu, DecodeStep) {
  std::mt19937 random(2);
  for (const Case& c : {Case{4, 2, 64, 16}, Case{8, 1, 128, 16}, Case{5, 5, 6, 64}}) {
    const RaggedBatch ragged(random, Phase::kDecode, {1, 16, 17, 1000, 64}, {1, 1, 1, 1, 1}, c.page_tokens);
    check(c, ragged, random);
  }
}

// Far positions: the angle is large, and the fp32 angle is what the contract states.
TEST(AppendCpu, FarPosition) {
  std::mt19937 random(3);
  const RaggedBatch ragged(random, Phase::kDecode, {131072}, {1}, 16);
  check({2, 1, 64, 16}, ragged, random);
}

TEST(AppendCpu, FrequenciesOfEachSequenceAndAnAttentionFactor) {
  std::mt19937 random(4);
  const RaggedBatch prefill(random, Phase::kPrefill, {40, 1, 70}, {40, 1, 33}, 16);
  check({4, 2, 64, 16}, prefill, random, true, 1.2772589F);
  const RaggedBatch decode(random, Phase::kDecode, {17, 1000, 64}, {1, 1, 1}, 16);
  check({4, 2, 64, 16}, decode, random, true);
  check({4, 2, 64, 16}, decode, random, false, 0.75F);
}

TEST(TileOffset, IsAPermutationOfTheTile) {
  for (const int head_dim : {20, 64, 96, 128, 192}) {
    for (const int page_tokens : {16, 32, 64}) {
      std::vector<int> seen(static_cast<std::size_t>(page_tokens * head_dim));
      for (int t = 0; t < page_tokens; ++t) {
        for (int d = 0; d < head_dim; ++d) {
          const int offset = tile_offset(t, d, head_dim);
          ASSERT_EQ(offset / head_dim, t);
          ASSERT_EQ(offset % 8, head_dim % 8 == 0 ? d % 8 : offset % 8);
          ++seen[static_cast<std::size_t>(offset)];
        }
      }
      for (const int times : seen) ASSERT_EQ(times, 1);
    }
  }
}

}  // namespace
}  // namespace vesper
