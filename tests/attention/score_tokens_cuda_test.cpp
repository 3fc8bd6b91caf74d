// Scores of single tokens on CUDA against the CPU's, on the same 16-bit inputs and 4-bit keys, under a bound derived
// from the number formats.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention/score_tokens.h"
#include "engine/core/error.h"
#include "tests/gpu.h"
#include "tests/int4_keys.h"
#include "tests/page_lists.h"
#include "tests/paged_device.h"

namespace vesper {
namespace {

// Tensor cores cut their fp32 sums instead of rounding them: twice the error of an addition (attend_cuda_test.cpp).
constexpr double kTensorAdd = 2 * kRoundF32;
constexpr float kUntouched = 12345.0F;

template <typename T>
struct World {
  Stream stream{DeviceKind::kCuda};
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
        int4(filled(k, ragged.batch, random), ragged.batch) {
    round_to<T>(q);
  }

  static PagedTensor& filled(PagedTensor& k, const Batch& batch, std::mt19937& random) {
    k.fill(batch, random);
    round_to<T>(k.data);
    return k;
  }

  [[nodiscard]] std::size_t elements(std::int64_t capacity) const {
    return static_cast<std::size_t>(ragged.batch.seqs * shape.heads * capacity);
  }

  std::vector<float> on_cpu(const Selection& pages, KeySource source, DenseLimit dense, std::int64_t capacity) {
    std::vector<float> scores(elements(capacity), kUntouched);
    const Batch& batch = ragged.batch;
    const LayerKv kv{.k = k.ref(), .v = {}, .int4 = int4.codes_ref(), .int4_params = int4.params_ref()};
    cpu::score_tokens(shape, TensorView<float, 2>(q.data(), batch.seqs, shape.heads * shape.head_dim), kv, batch, pages,
                      source, dense, TensorView<float, 3>(scores.data(), batch.seqs, shape.heads, capacity));
    return scores;
  }

  std::vector<float> on_device(const Selection& pages, KeySource source, DenseLimit dense, std::int64_t capacity) {
    constexpr std::size_t kGuard = 1024;
    const DType dtype = DTypeOf<T>::value;
    const int seqs = ragged.batch.seqs;
    const Buffer device_q = upload_as<T>(stream, q);
    const Buffer device_k = upload_as<T>(stream, k.data);
    const Buffer codes = upload(stream, int4.codes);
    const Buffer params = upload(stream, int4.params);
    const Buffer scores = upload(stream, std::vector<float>(elements(capacity) + kGuard, kUntouched));
    const DeviceBatch device(stream, ragged);
    Selection listed = pages;
    Buffer index;
    Buffer count;
    if (pages.index.data() != nullptr) {
      const auto lists = static_cast<std::size_t>(pages.count.size());
      index = upload(stream, std::vector<std::int32_t>(pages.index.data(), pages.index.data() + pages.index.size()));
      count = upload(stream, std::vector<std::int32_t>(pages.count.data(), pages.count.data() + lists));
      listed.index = index.view<std::int32_t>(seqs, shape.kv_heads, pages.index.shape(2));
      listed.count = count.view<std::int32_t>(seqs, shape.kv_heads);
      listed.tail_begin = listed.count;
    }
    const auto line = [&](const Buffer& buffer, DType type, int elements_of_line) {
      return buffer.ref(type, ragged.pages, shape.kv_heads, shape.page_tokens, elements_of_line);
    };
    const LayerKv kv{.k = line(device_k, dtype, shape.head_dim),
                     .v = {},
                     .int4 = line(codes, DType::kU8, shape.head_dim / 2),
                     .int4_params = line(params, DType::kF16, 2)};
    score_tokens(stream.exec(), shape, device_q.ref(dtype, seqs, shape.heads * shape.head_dim), kv, device.batch,
                 listed, source, dense, scores.view<float>(seqs, shape.heads, capacity));
    std::vector<float> found = download<float>(stream, scores, elements(capacity) + kGuard);
    for (std::size_t i = elements(capacity); i < found.size(); ++i) EXPECT_EQ(found[i], kUntouched) << "behind scores";
    found.resize(elements(capacity));
    return found;
  }

  // How far the two devices' results for one token may lie apart.
  double bound(KeySource source, int s, int h, int t) {
    const int g = h / shape.group();
    const std::size_t line = int4.line_of(ragged.batch, s, t, g);
    const bool exact = source == KeySource::kExact;
    double dot_magnitude = 0.0;
    double sum_magnitude = 0.0;
    for (int d = 0; d < shape.head_dim; ++d) {
      const double x = q[static_cast<std::size_t>((s * shape.heads + h) * shape.head_dim + d)];
      const double row = exact ? k.at(ragged.batch, s, t, g, d) : int4.code(line, d);
      dot_magnitude += std::abs(x * row);
      sum_magnitude += std::abs(x);
    }
    const double magnitude =
        exact ? dot_magnitude : int4.scale(line) * dot_magnitude + std::abs(int4.zero(line)) * sum_magnitude;
    return static_cast<double>(shape.scale) * (shape.head_dim + 5) * (kTensorAdd + kRoundF32) * magnitude;
  }

  void check(const Selection& pages, KeySource source, DenseLimit dense, const std::string& what) {
    const Batch& batch = ragged.batch;
    // More room than candidates: the last blocks have nothing to do.
    const std::int64_t capacity = candidate_capacity(pages, batch, shape.page_tokens) + 700;
    const std::vector<float> expected = on_cpu(pages, source, dense, capacity);
    const std::vector<float> found = on_device(pages, source, dense, capacity);
    std::vector<float> scores;
    std::vector<double> truths, bounds;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const auto j = static_cast<int>(i % static_cast<std::size_t>(capacity));
      const auto h = static_cast<int>(i / static_cast<std::size_t>(capacity)) % shape.heads;
      const auto s = static_cast<int>(i / static_cast<std::size_t>(capacity)) / shape.heads;
      if (expected[i] == kUntouched || expected[i] == -INFINITY) {
        ASSERT_EQ(found[i], expected[i]) << what << ": sequence " << s << ", head " << h << ", candidate " << j;
        continue;
      }
      scores.push_back(found[i]);
      truths.push_back(expected[i]);
      bounds.push_back(bound(source, s, h, candidate_token(pages, shape.page_tokens, s, h / shape.group(), j)));
    }
    expect_within(scores, truths, bounds, what);
  }
};

AttentionShape shape_of(int kv_heads, int group, int head_dim, int page_tokens) {
  return {.heads = kv_heads * group,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .page_tokens = page_tokens,
          .scale = 1.0F / std::sqrt(static_cast<float>(head_dim))};
}

template <typename T>
class ScoreTokensCuda : public testing::Test {};
using Elements = testing::Types<bf16, f16>;
TYPED_TEST_SUITE(ScoreTokensCuda, Elements);

TYPED_TEST(ScoreTokensCuda, EqualTheCpusWithinTheRoundings) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(1);
  for (const auto& [kv_heads, group, head_dim, page_tokens] : {std::array{2, 4, 128, 16},
                                                               {2, 4, 64, 16},
                                                               {1, 1, 128, 32},
                                                               {3, 2, 64, 32},
                                                               {2, 7, 128, 64},
                                                               {1, 8, 64, 64},
                                                               {1, 9, 128, 16},
                                                               {2, 16, 128, 16},
                                                               {1, 16, 64, 32}}) {
    World<TypeParam> world(random, shape_of(kv_heads, group, head_dim, page_tokens),
                           {1, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1300});
    const std::string sizes = std::to_string(kv_heads) + " KV heads, group " + std::to_string(group) + ", head_dim " +
                              std::to_string(head_dim) + ", page_tokens " + std::to_string(page_tokens);
    for (const KeySource source : {KeySource::kInt4, KeySource::kExact}) {
      const std::string keys = source == KeySource::kInt4 ? "int4, " : "exact, ";
      world.check({}, source, {}, keys + "all tokens, " + sizes);
      for (const double share : {0.0, 0.3, 1.0}) {
        const PageLists lists(random, world.ragged.batch, kv_heads, page_tokens, share);
        world.check(lists.pages, source, {}, keys + "share " + std::to_string(share) + " of the pages, " + sizes);
      }
      world.check({}, source, {.tokens = 64}, keys + "a dense limit of 64, " + sizes);
    }
  }
}

TYPED_TEST(ScoreTokensCuda, OfLongContextsEqualTheCpus) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(2);
  World<TypeParam> world(random, shape_of(2, 4, 128, 16), {40000, 1, 12345});
  const PageLists lists(random, world.ragged.batch, 2, 16, 0.25);
  world.check({}, KeySource::kInt4, {}, "int4, 40000 tokens");
  world.check(lists.pages, KeySource::kInt4, {}, "int4, a quarter of 40000 tokens");
  world.check(lists.pages, KeySource::kExact, {}, "exact, a quarter of 40000 tokens");
}

// One channel at a time: a wrong place in the packing shows as the number of the channel.
TYPED_TEST(ScoreTokensCuda, TakeEveryChannelFromItsPlace) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(3);
  for (const int head_dim : {64, 128}) {
    AttentionShape shape = shape_of(1, 16, head_dim, 16);
    shape.scale = 1.0F;
    for (int first = 0; first < head_dim; first += 16) {
      World<TypeParam> world(random, shape, {32});
      std::fill(world.q.begin(), world.q.end(), 0.0F);
      for (int h = 0; h < 16; ++h) world.q[static_cast<std::size_t>(h * head_dim + first + h)] = 1.0F;
      // A token's keys are small whole numbers from 0 to 15, which its 4-bit copy holds exactly.
      for (int t = 0; t < 32; ++t) {
        for (int d = 0; d < head_dim; ++d) {
          world.k.at(world.ragged.batch, 0, t, 0, d) =
              static_cast<float>(d < 2 ? 15 * d : (7 * d + 5 * t + d / 16) % 16);
        }
      }
      world.int4 = Int4Keys(world.k, world.ragged.batch);
      for (const KeySource source : {KeySource::kInt4, KeySource::kExact}) {
        const std::vector<float> found = world.on_device({}, source, {}, 32);
        for (int h = 0; h < 16; ++h) {
          for (int t = 0; t < 32; ++t) {
            ASSERT_EQ(found[static_cast<std::size_t>(h * 32 + t)], world.k.at(world.ragged.batch, 0, t, 0, first + h))
                << (source == KeySource::kInt4 ? "int4" : "exact") << ", head_dim " << head_dim << ", channel "
                << first + h << ", token " << t;
          }
        }
      }
    }
  }
}

TYPED_TEST(ScoreTokensCuda, AreTheSameBitsInEveryBatchAndEveryRun) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(4);
  World<TypeParam> world(random, shape_of(2, 4, 128, 16), {700, 33, 1500});
  const std::vector<float> first = world.on_device({}, KeySource::kInt4, {}, 1500);
  const std::vector<float> again = world.on_device({}, KeySource::kInt4, {}, 1500);
  EXPECT_EQ(std::memcmp(first.data(), again.data(), first.size() * sizeof(float)), 0);
  const std::vector<float> alone = world.on_device({}, KeySource::kInt4, {.tokens = 700}, 1500);  // the last sequence
  const std::size_t others = 2U * 8 * 1500;
  EXPECT_EQ(std::memcmp(first.data() + others, alone.data() + others, (first.size() - others) * sizeof(float)), 0);
}

TEST(ScoreTokensCuda, RefusesShapesThatItHasNoKernelFor) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(5);
  for (const AttentionShape& shape : {shape_of(1, 1, 80, 16), shape_of(1, 17, 64, 16), shape_of(1, 1, 64, 8)}) {
    World<bf16> world(random, shape, {20});
    EXPECT_THROW(world.on_device({}, KeySource::kInt4, {}, 20), Error);
  }
}

}  // namespace
}  // namespace vesper
