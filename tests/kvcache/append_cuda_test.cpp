// The append pass on CUDA against the CPU's, on the same 16-bit inputs.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "engine/core/error.h"
#include "kvcache/append.h"
#include "tests/gpu.h"
#include "tests/paged_device.h"

namespace vesper {
namespace {

struct Case {
  int heads, kv_heads, head_dim, page_tokens;
};

std::string describe(const Case& c) {
  return "heads " + std::to_string(c.heads) + ", kv_heads " + std::to_string(c.kv_heads) + ", head_dim " +
         std::to_string(c.head_dim) + ", page_tokens " + std::to_string(c.page_tokens);
}

// The reach of channel d in a rotation: |x[d]| + |x[its partner]|.
double reach(const float* x, int d, int head_dim) {
  const int half = head_dim / 2;
  return std::abs(static_cast<double>(x[d])) + std::abs(static_cast<double>(x[d < half ? d + half : d - half]));
}

// `own_frequencies`: each sequence has a row of them, and they are scaled differently.
template <typename T>
void check(const Case& c, const RaggedBatch& ragged, std::mt19937& random, bool own_frequencies = false,
           float attention_factor = 1.0F) {
  const Stream stream(DeviceKind::kCuda);
  const Batch& batch = ragged.batch;
  const int columns = (c.heads + 2 * c.kv_heads) * c.head_dim;
  std::vector<float> qkv = random_floats(random, static_cast<std::size_t>(batch.tokens) * columns);
  round_to<T>(qkv);
  const int pairs = c.head_dim / 2;
  std::vector<float> inv_freq;
  for (int s = 0; s < (own_frequencies ? batch.seqs : 1); ++s) {
    for (int d = 0; d < pairs; ++d) {
      inv_freq.push_back(static_cast<float>(std::pow(500000.0, -2.0 * d / c.head_dim) / (s + 1)));
    }
  }
  const auto rope_at = [&](const float* frequencies) {
    return Rope{.inv_freq = TensorView<const float, 1>(frequencies, inv_freq.size()),
                .seq_stride = own_frequencies ? pairs : 0,
                .attention_factor = attention_factor};
  };
  PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  PagedTensor v(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  const std::size_t q_count = static_cast<std::size_t>(batch.tokens) * c.heads * c.head_dim;
  const std::size_t guard = static_cast<std::size_t>(c.heads) * c.head_dim;  // one row behind the last
  const std::vector<float> poison(q_count + guard, NAN);

  const Buffer device_qkv = upload_as<T>(stream, qkv);
  const Buffer device_freq = upload(stream, inv_freq);
  const Buffer device_k = upload_as<T>(stream, k.data);
  const Buffer device_v = upload_as<T>(stream, v.data);
  const Buffer device_q = upload_as<T>(stream, poison);
  const DeviceBatch device(stream, ragged);
  const DType dtype = DTypeOf<T>::value;
  const auto tiles = [&](const Buffer& buffer) {
    return buffer.ref(dtype, ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  };
  append_kv(stream.exec(), device_qkv.ref(dtype, batch.tokens, columns),
            rope_at(static_cast<const float*>(device_freq.data())), device.batch, {tiles(device_k), tiles(device_v)},
            device_q.ref(dtype, batch.tokens, c.heads * c.head_dim));
  const std::vector<float> got_q = download_floats<T>(stream, device_q, q_count + guard);
  const std::vector<float> got_k = download_floats<T>(stream, device_k, k.data.size());
  const std::vector<float> got_v = download_floats<T>(stream, device_v, v.data.size());

  std::vector<float> q(q_count, NAN);
  cpu::append_kv(TensorView<const float, 2>(qkv.data(), batch.tokens, columns), rope_at(inv_freq.data()), batch,
                 {k.ref(), v.ref()}, TensorView<float, 2>(q.data(), batch.tokens, c.heads * c.head_dim));

  // Angles are the same fp32 product. CUDA's sinf and cosf stay within 2 ulp (CUDA programming guide, "Mathematical
  // functions"), which is 4 half ulps of a value up to 1, the CPU's within 1 ulp; each side then rounds the product
  // with the attention factor, two more products and their sum: 8 and 6 half ulps of the channel's reach. Rounding to T
  // adds half an ulp of the result.
  std::vector<float> found;
  std::vector<double> expected;
  std::vector<double> bound;
  const auto expect = [&](float value, float truth, const float* x, int d) {
    const double fp32 = 14 * attention_factor * kRoundF32 * reach(x, d, c.head_dim);
    found.push_back(value);
    expected.push_back(truth);
    bound.push_back(fp32 + kRound<T> * (std::abs(static_cast<double>(truth)) + fp32) + kRoundSubnormal<T>);
  };
  std::size_t stored = 0;
  std::size_t wrong_values = 0;
  for (int t = 0; t < batch.tokens; ++t) {
    const float* row = qkv.data() + static_cast<std::ptrdiff_t>(t) * columns;
    for (int i = 0; i < c.heads * c.head_dim; ++i) {
      const std::size_t at = static_cast<std::size_t>(t) * guard + static_cast<std::size_t>(i);
      expect(got_q[at], q[at], row + i / c.head_dim * c.head_dim, i % c.head_dim);
    }
    for (int g = 0; g < c.kv_heads; ++g) {
      for (int d = 0; d < c.head_dim; ++d) {
        const float& truth = k.at(batch, batch.seq_of_token(t), batch.positions(t), g, d);
        const auto at = static_cast<std::size_t>(&truth - k.data.data());
        expect(got_k[at], truth, row + (c.heads + g) * c.head_dim, d);
        wrong_values += got_v[at] == row[(c.heads + c.kv_heads + g) * c.head_dim + d] ? 0 : 1;
        ++stored;
      }
    }
  }
  expect_within(found, expected, bound, describe(c));
  EXPECT_EQ(wrong_values, 0U) << describe(c) << ": values must be stored as they are";
  const auto count_written = [](const std::vector<float>& data) {
    return static_cast<std::size_t>(std::count_if(data.begin(), data.end(), [](float x) { return !std::isnan(x); }));
  };
  EXPECT_EQ(count_written(got_q), q_count) << describe(c) << ": wrote behind q";
  EXPECT_EQ(count_written(got_k), stored) << describe(c) << ": wrote other rows of K";
  EXPECT_EQ(count_written(got_v), stored) << describe(c) << ": wrote other rows of V";
}

template <typename T>
class AppendCuda : public testing::Test {};
using Types = testing::Types<bf16, f16>;
TYPED_TEST_SUITE(AppendCuda, Types);

TYPED_TEST(AppendCuda, PrefillChunksOfRaggedSequences) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(1);
  for (const Case& c : {Case{4, 4, 64, 16}, Case{32, 8, 128, 16}, Case{6, 2, 128, 32}, Case{7, 1, 64, 64},
                        Case{8, 1, 96, 16}, Case{3, 3, 16, 32}, Case{16, 1, 128, 64}}) {
    // Chunks from the start, of one token, from mid-page, and across pages.
    const RaggedBatch ragged(random, Phase::kPrefill, {40, 1, 70, 129}, {40, 1, 33, 60}, c.page_tokens);
    check<TypeParam>(c, ragged, random);
  }
}

TYPED_TEST(AppendCuda, DecodeStep) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(2);
  for (const Case& c : {Case{4, 2, 64, 16}, Case{32, 8, 128, 16}, Case{5, 5, 128, 64}}) {
    const RaggedBatch ragged(random, Phase::kDecode, {1, 16, 17, 1000, 64, 5000}, {1, 1, 1, 1, 1, 1}, c.page_tokens);
    check<TypeParam>(c, ragged, random);
  }
}

TYPED_TEST(AppendCuda, FrequenciesOfEachSequenceAndAnAttentionFactor) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(4);
  const RaggedBatch prefill(random, Phase::kPrefill, {40, 1, 70}, {40, 1, 33}, 16);
  check<TypeParam>({4, 2, 64, 16}, prefill, random, true, 1.2772589F);
  const RaggedBatch decode(random, Phase::kDecode, {17, 1000, 64}, {1, 1, 1}, 16);
  check<TypeParam>({32, 8, 128, 16}, decode, random, true);
  check<TypeParam>({32, 8, 128, 16}, decode, random, false, 0.75F);
}

// Angles beyond 105615 take sincosf's slow path of argument reduction.
TYPED_TEST(AppendCuda, FarPosition) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(3);
  const RaggedBatch ragged(random, Phase::kDecode, {131072, 500001}, {1, 1}, 64);
  check<TypeParam>({2, 1, 64, 64}, ragged, random);
}

TEST(AppendCudaShapes, RefusesWhatItCannotStore) {
  std::vector<float> none(1);
  const TensorRef tiles = tensor_ref(none.data(), DType::kBf16, 1, 1, 16, 24);
  const TensorRef qkv = tensor_ref(none.data(), DType::kBf16, 1, 72);
  const TensorRef q = tensor_ref(none.data(), DType::kBf16, 1, 24);
  EXPECT_THROW(cuda::append_kv({DeviceKind::kCuda, nullptr}, qkv, {}, {}, {tiles, tiles}, q), Error);
}

}  // namespace
}  // namespace vesper
