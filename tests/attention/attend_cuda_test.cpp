// Prefill and decode attention on CUDA against the CPU's, on the same 16-bit inputs, under a bound derived from the
// number formats.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention/attend.h"
#include "engine/core/error.h"
#include "engine/core/parallel.h"
#include "tests/gpu.h"
#include "tests/paged_device.h"

namespace vesper {
namespace {

// Tensor cores keep the products exact but cut their fp32 sums instead of rounding them: twice the error of an
// addition. Source: Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
// Science 7:e330.
constexpr double kTensorAdd = 2 * kRoundF32;
constexpr double kExp2Approx = 0x1p-22;    // PTX ISA, ex2.approx: relative error
constexpr double kLeastWeight = 0x1p-125;  // below, either device's exponential may answer 0
constexpr double kKeysPerRescale = 16.0;   // at least; a rescaling is a weight and a product

// The error that a CUDA and a CPU result together may have, for one query head.
struct Bound {
  double relative = 0.0;  // of a sum of weighted values, against the sum of their magnitudes; both devices together
  double lse = 0.0;
  std::vector<double> spread;     // [head_dim] sum_i w_i |v_i|, the w_i summing to 1
  std::vector<double> magnitude;  // [head_dim] sum_i |v_i|
};

Bound bound_of(const AttentionShape& shape, const float* q, PagedTensor& k, PagedTensor& v, const Batch& batch, int s,
               int g, int keys) {
  std::vector<double> score(static_cast<std::size_t>(keys));
  double largest = -INFINITY;
  double largest_magnitude = 0.0;
  double reach = 0.0;
  for (int t = 0; t < keys; ++t) {
    double sum = 0.0;
    double magnitude = 0.0;
    for (int d = 0; d < shape.head_dim; ++d) {
      const double product = static_cast<double>(q[d]) * k.at(batch, s, t, g, d);
      sum += product;
      magnitude += std::abs(product);
    }
    sum *= shape.scale;
    score[static_cast<std::size_t>(t)] = sum;
    largest = std::max(largest, sum);
    reach = std::max(reach, std::abs(sum));
    largest_magnitude = std::max(largest_magnitude, magnitude * shape.scale);
  }
  Bound bound;
  bound.spread.resize(static_cast<std::size_t>(shape.head_dim));
  bound.magnitude.resize(bound.spread.size());
  double total = 0.0;
  for (int t = 0; t < keys; ++t) {
    const double weight = std::exp(score[static_cast<std::size_t>(t)] - largest);
    total += weight;
    for (int d = 0; d < shape.head_dim; ++d) {
      const double value = std::abs(static_cast<double>(v.at(batch, s, t, g, d)));
      bound.spread[static_cast<std::size_t>(d)] += weight * value;
      bound.magnitude[static_cast<std::size_t>(d)] += value;
    }
  }
  for (double& spread : bound.spread) spread /= total;

  // A weight e^x: the score's sum of head_dim products; x itself, which passes as (score, maximum, log-sum-exp of a
  // split) through a dozen roundings of numbers no larger than |score| + log(keys); the exponential; and each
  // rescaling.
  const double score_error = (shape.head_dim + 1) * kTensorAdd * largest_magnitude;
  const double exponent_error = 16 * kRoundF32 * (reach + std::log(keys) + 1);
  const double rescalings = 2 + keys / kKeysPerRescale;
  const double weight = score_error + exponent_error + (rescalings + 2) * (kExp2Approx + 2 * kRoundF32);
  const double sums = (keys + 8.0) * kTensorAdd;
  // Numerator and denominator each; the CPU has the same terms, none larger.
  bound.relative = 2 * (2 * std::expm1(weight) + 2 * sums);
  bound.lse = 2 * (weight + sums + 4 * kRoundF32 * (reach + std::log(keys) + 1));
  return bound;
}

template <typename T>
struct World {
  Stream stream{DeviceKind::kCuda};
  AttentionShape shape;
  RaggedBatch ragged;
  PagedTensor k, v;
  std::vector<float> q, expected, expected_lse, out, lse;
  std::vector<Bound> bounds;  // [tokens * heads]

  World(std::mt19937& random, Phase phase, const AttentionShape& sizes, const std::vector<int>& lengths,
        const std::vector<int>& query_tokens, float q_range = 4.0F)
      : shape(sizes),
        ragged(random, phase, lengths, query_tokens, sizes.page_tokens),
        k(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim),
        v(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim) {
    k.fill(ragged.batch, random);
    v.fill(ragged.batch, random);
    round_to<T>(k.data);
    round_to<T>(v.data);
    q = random_floats(random, elements(), -q_range, q_range);
    round_to<T>(q);
  }

  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(ragged.batch.tokens) * shape.heads; }
  [[nodiscard]] std::size_t elements() const { return rows() * static_cast<std::size_t>(shape.head_dim); }
  TensorView<float, 2> view(std::vector<float>& data) const {
    return TensorView<float, 2>(data.data(), ragged.batch.tokens, shape.heads * shape.head_dim);
  }

  // Runs `attend(q, kv, batch, out)` on the device, over a poisoned out with one row more than asked for.
  template <typename F>
  void on_device(const F& attend) {
    const DType dtype = DTypeOf<T>::value;
    const std::size_t guard = static_cast<std::size_t>(shape.heads) * shape.head_dim;
    const Buffer device_q = upload_as<T>(stream, q);
    const Buffer device_k = upload_as<T>(stream, k.data);
    const Buffer device_v = upload_as<T>(stream, v.data);
    const Buffer device_out = upload_as<T>(stream, std::vector<float>(elements() + guard, NAN));
    const DeviceBatch device(stream, ragged);
    const auto tiles = [&](const Buffer& buffer) {
      return buffer.ref(dtype, ragged.pages, shape.kv_heads, shape.page_tokens, shape.head_dim);
    };
    attend(device_q.ref(dtype, ragged.batch.tokens, shape.heads * shape.head_dim),
           LayerKv{tiles(device_k), tiles(device_v)}, device.batch,
           device_out.ref(dtype, ragged.batch.tokens, shape.heads * shape.head_dim));
    out = download_floats<T>(stream, device_out, elements() + guard);
    for (std::size_t i = elements(); i < out.size(); ++i) ASSERT_TRUE(std::isnan(out[i])) << "wrote behind out";
    out.resize(elements());
  }

  void prefill() {
    on_device([&](const TensorRef& dq, const LayerKv& kv, const Batch& batch, const TensorRef& dout) {
      attend_prefill(stream.exec(), shape, dq, kv, batch, dout);
    });
  }

  void decode(const SplitPlan& plan, bool with_lse = true) {
    const int seqs = ragged.batch.seqs;
    const auto partial_rows = static_cast<std::size_t>(seqs) * shape.heads * plan.splits;
    const Buffer partial_out =
        upload(stream, std::vector<float>(partial_rows * static_cast<std::size_t>(shape.head_dim), NAN));
    const Buffer partial_lse = upload(stream, std::vector<float>(partial_rows, NAN));
    const Buffer device_lse = upload(stream, std::vector<float>(rows(), NAN));
    const SplitPartials partials{partial_out.view<float>(seqs, shape.heads, plan.splits, shape.head_dim),
                                 partial_lse.view<float>(seqs, shape.heads, plan.splits)};
    on_device([&](const TensorRef& dq, const LayerKv& kv, const Batch& batch, const TensorRef& dout) {
      attend_decode(stream.exec(), shape, dq, kv, batch, plan, partials, dout,
                    with_lse ? device_lse.view<float>(seqs, shape.heads) : TensorView<float, 2>());
    });
    lse = download<float>(stream, device_lse, rows());
  }

  // What the CPU finds, and how far a device may be from it.
  void find_expected() {
    expected.assign(elements(), NAN);
    expected_lse.assign(rows(), NAN);
    if (ragged.batch.phase == Phase::kPrefill) {
      cpu::attend_prefill(shape, view(q), {k.ref(), v.ref()}, ragged.batch, view(expected));
    } else {
      const int seqs = ragged.batch.seqs;
      const SplitPlan plan = plan_splits(shape, seqs, ragged.batch.max_kv_len, 1, 1);
      std::vector<float> partial_out(elements());
      std::vector<float> partial_lse(rows());
      cpu::attend_decode(shape, view(q), {k.ref(), v.ref()}, ragged.batch, plan,
                         {TensorView<float, 4>(partial_out.data(), seqs, shape.heads, 1, shape.head_dim),
                          TensorView<float, 3>(partial_lse.data(), seqs, shape.heads, 1)},
                         view(expected), TensorView<float, 2>(expected_lse.data(), seqs, shape.heads));
    }
    bounds.resize(rows());
    parallel_for(static_cast<std::int64_t>(rows()), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t t = i / shape.heads;
        const auto g = static_cast<int>(i % shape.heads) / shape.group();
        bounds[static_cast<std::size_t>(i)] = bound_of(shape, q.data() + i * shape.head_dim, k, v, ragged.batch,
                                                       ragged.batch.seq_of_token(t), g, ragged.batch.positions(t) + 1);
      }
    });
  }

  // Weights are rounded to T for their product with V, once relative and, where subnormal in f16, once absolute (the
  // largest weight is 1, so the denominator is no smaller); the result is rounded to T.
  void check(const std::string& what, bool with_lse) {
    std::vector<double> truth(expected.begin(), expected.end());
    std::vector<double> allowed(elements());
    for (std::size_t i = 0; i < elements(); ++i) {
      const Bound& bound = bounds[i / static_cast<std::size_t>(shape.head_dim)];
      const std::size_t d = i % static_cast<std::size_t>(shape.head_dim);
      const double before_rounding =
          bound.spread[d] * (bound.relative + kRound<T>)+bound.magnitude[d] * (kRoundSubnormal<T> + kLeastWeight);
      allowed[i] = before_rounding + kRound<T> * (std::abs(truth[i]) + before_rounding) + kRoundSubnormal<T>;
    }
    expect_within(out, truth, allowed, what + ", out");
    if (!with_lse) return;
    std::vector<double> lse_allowed(rows());
    for (std::size_t i = 0; i < rows(); ++i) lse_allowed[i] = bounds[i].lse;
    expect_within(lse, std::vector<double>(expected_lse.begin(), expected_lse.end()), lse_allowed, what + ", lse");
  }
};

AttentionShape make_shape(int kv_heads, int group, int head_dim, int page_tokens) {
  return {.heads = kv_heads * group,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .page_tokens = page_tokens,
          .scale = 1.0F / std::sqrt(static_cast<float>(head_dim))};
}

std::string describe(const AttentionShape& shape) {
  return "group " + std::to_string(shape.group()) + ", kv_heads " + std::to_string(shape.kv_heads) + ", head_dim " +
         std::to_string(shape.head_dim) + ", page_tokens " + std::to_string(shape.page_tokens);
}

constexpr int kGroups[] = {1, 2, 3, 4, 7, 8, 16};
constexpr int kPages[] = {16, 32, 64};

int draw(std::mt19937& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

template <typename T>
class AttendCuda : public testing::Test {};
using Types = testing::Types<bf16, f16>;
TYPED_TEST_SUITE(AttendCuda, Types);

TYPED_TEST(AttendCuda, DecodeOverRandomShapes) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(1);
  int i = 0;
  for (const int group : kGroups) {
    for (const int head_dim : {64, 128}) {
      const AttentionShape shape = make_shape(draw(random, 1, 3), group, head_dim, kPages[i++ % 3]);
      std::vector<int> lengths = {1, draw(random, 1, 5000)};
      while (static_cast<int>(lengths.size()) < i % 9 + 1) lengths.push_back(draw(random, 1, 600));
      lengths.resize(static_cast<std::size_t>(i % 9 + 1));
      World<TypeParam> world(random, Phase::kDecode, shape, lengths, std::vector<int>(lengths.size(), 1));
      world.find_expected();
      const int longest = world.ragged.batch.max_kv_len;
      const int whole = (longest + 63) / 64 * 64;
      // One split; what plan_splits says; borders on every page, one split more than there are pages; uneven thirds.
      const int pages = (longest + shape.page_tokens - 1) / shape.page_tokens;
      for (const SplitPlan& plan :
           {SplitPlan{1, whole}, plan_splits(shape, world.ragged.batch.seqs, longest, 264, 64),
            SplitPlan{pages + 1, shape.page_tokens}, SplitPlan{3, (longest / 3 / 64 + 1) * 64}}) {
        world.decode(plan);
        world.check("decode, " + describe(shape) + ", seqs " + std::to_string(lengths.size()) + ", longest " +
                        std::to_string(longest) + ", splits " + std::to_string(plan.splits),
                    true);
      }
    }
  }
}

TYPED_TEST(AttendCuda, PrefillOverRandomShapes) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(2);
  int i = 0;
  for (const int group : kGroups) {
    for (const int head_dim : {64, 128}) {
      const AttentionShape shape = make_shape(draw(random, 1, 2), group, head_dim, kPages[i++ % 3]);
      // From the start, one token, a chunk from mid-page after earlier context, one that ends on a page border.
      std::vector<int> lengths = {65, 1, 150, 192, draw(random, 300, 700)};
      std::vector<int> queries = {65, 1, 37, 64, draw(random, 1, 90)};
      World<TypeParam> world(random, Phase::kPrefill, shape, lengths, queries);
      world.find_expected();
      world.prefill();
      world.check("prefill, " + describe(shape), false);
    }
  }
}

TYPED_TEST(AttendCuda, PrefillOfALongContext) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(3);
  const AttentionShape shape = make_shape(2, 4, 128, 16);
  World<TypeParam> world(random, Phase::kPrefill, shape, {5000, 900}, {70, 300});
  world.find_expected();
  world.prefill();
  world.check("prefill of a long context", false);
}

// A row meets the same tiles of keys in the same order, whichever chunk it comes in.
TYPED_TEST(AttendCuda, PrefillInChunksIsPrefillAtOnce) {
  VESPER_NEEDS_GPU();
  for (const int group : {1, 3, 8}) {
    std::mt19937 random(4);
    const AttentionShape shape = make_shape(2, group, 128, 16);
    World<TypeParam> whole(random, Phase::kPrefill, shape, {500}, {500});
    whole.prefill();
    const std::size_t row = whole.elements() / 500;
    int first = 0;
    for (const int chunk : {1, 77, 128, 200, 94}) {
      World<TypeParam> part(random, Phase::kPrefill, shape, {first + chunk}, {chunk});
      for (int t = 0; t < first + chunk; ++t) {
        for (int g = 0; g < shape.kv_heads; ++g) {
          for (int d = 0; d < shape.head_dim; ++d) {
            part.k.at(part.ragged.batch, 0, t, g, d) = whole.k.at(whole.ragged.batch, 0, t, g, d);
            part.v.at(part.ragged.batch, 0, t, g, d) = whole.v.at(whole.ragged.batch, 0, t, g, d);
          }
        }
      }
      const auto begin = whole.q.begin() + static_cast<std::ptrdiff_t>(row) * first;
      part.q.assign(begin, begin + static_cast<std::ptrdiff_t>(row) * chunk);
      part.prefill();
      for (std::size_t i = 0; i < part.out.size(); ++i) {
        ASSERT_EQ(part.out[i], whole.out[row * static_cast<std::size_t>(first) + i])
            << "group " << group << ", chunk of " << chunk << " from " << first << ", element " << i;
      }
      first += chunk;
    }
  }
}

// Under one plan a sequence's result does not depend on its neighbours in the batch.
TYPED_TEST(AttendCuda, DecodeAloneIsDecodeInABatch) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(5);
  const AttentionShape shape = make_shape(2, 4, 128, 32);
  World<TypeParam> batched(random, Phase::kDecode, shape, {70, 900, 1}, {1, 1, 1});
  World<TypeParam> alone(random, Phase::kDecode, shape, {900}, {1});
  for (int t = 0; t < 900; ++t) {
    for (int g = 0; g < shape.kv_heads; ++g) {
      for (int d = 0; d < shape.head_dim; ++d) {
        alone.k.at(alone.ragged.batch, 0, t, g, d) = batched.k.at(batched.ragged.batch, 1, t, g, d);
        alone.v.at(alone.ragged.batch, 0, t, g, d) = batched.v.at(batched.ragged.batch, 1, t, g, d);
      }
    }
  }
  const auto row = static_cast<std::ptrdiff_t>(alone.q.size());
  alone.q.assign(batched.q.begin() + row, batched.q.begin() + 2 * row);
  for (const SplitPlan& plan : {SplitPlan{1, 960}, SplitPlan{4, 256}}) {
    batched.decode(plan, false);
    alone.decode(plan, false);
    for (std::size_t i = 0; i < alone.out.size(); ++i) ASSERT_EQ(alone.out[i], batched.out[alone.out.size() + i]);
    for (const float value : alone.lse) ASSERT_TRUE(std::isnan(value)) << "lse was written without being asked for";
  }
}

// Scores of hundreds: the running maximum keeps every weight in range, and few keys take all.
TYPED_TEST(AttendCuda, LargeScoresStayFinite) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(6);
  const AttentionShape shape = make_shape(1, 4, 64, 16);
  World<TypeParam> decode(random, Phase::kDecode, shape, {900}, {1}, 300.0F);
  decode.find_expected();
  decode.decode({4, 256});
  decode.check("decode of large scores", true);
  World<TypeParam> prefill(random, Phase::kPrefill, shape, {300}, {300}, 300.0F);
  prefill.find_expected();
  prefill.prefill();
  prefill.check("prefill of large scores", false);
}

// A layer's K may hold more than 2^31 elements: the same pages at the far end of a large pool give the same bits.
TYPED_TEST(AttendCuda, PagesBehindTwoToThe31stElement) {
  VESPER_NEEDS_GPU();
  const AttentionShape shape = make_shape(2, 4, 128, 16);
  const std::int64_t page_elements = std::int64_t{shape.kv_heads} * shape.page_tokens * shape.head_dim;
  const std::int64_t far_pages = (std::int64_t{1} << 31) / page_elements + 1;
  std::mt19937 random(7);
  World<TypeParam> world(random, Phase::kPrefill, shape, {300}, {40});
  const std::int64_t pages = far_pages + world.ragged.pages;
  const std::int64_t tensor_bytes = pages * page_elements * 2;
  if (device_info(DeviceKind::kCuda).free_bytes < 3 * tensor_bytes) GTEST_SKIP() << "needs 13 GB of device memory";
  world.prefill();
  const std::vector<float> near = world.out;
  const Buffer far_k(Memory::kDevice, tensor_bytes, "K far away");
  const Buffer far_v(Memory::kDevice, tensor_bytes, "V far away");
  for (std::int32_t& page : world.ragged.page_table) page += static_cast<std::int32_t>(far_pages);
  world.on_device([&](const TensorRef& q, const LayerKv& kv, const Batch& batch, const TensorRef& out) {
    const auto move = [&](const TensorRef& from, const Buffer& to) {
      copy_bytes(world.stream.exec(), static_cast<char*>(to.data()) + far_pages * page_elements * 2, from.data,
                 from.bytes());
      return to.ref(from.dtype, pages, shape.kv_heads, shape.page_tokens, shape.head_dim);
    };
    attend_prefill(world.stream.exec(), shape, q, {move(kv.k, far_k), move(kv.v, far_v)}, batch, out);
    world.stream.synchronize();
  });
  EXPECT_EQ(std::memcmp(near.data(), world.out.data(), near.size() * sizeof(float)), 0);
}

TEST(AttendCudaShapes, ListsWhatTheKernelsTake) {
  EXPECT_NO_THROW(cuda::check_attention_shape(make_shape(8, 4, 128, 16)));
  EXPECT_NO_THROW(cuda::check_attention_shape(make_shape(1, 16, 64, 64)));
  const auto message = [](const AttentionShape& shape) -> std::string {
    try {
      cuda::check_attention_shape(shape);
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::kInput);
      return error.what();
    }
    return "nothing was refused";
  };
  EXPECT_NE(message(make_shape(8, 4, 96, 16)).find("64 or 128"), std::string::npos);
  EXPECT_NE(message(make_shape(1, 17, 64, 16)).find("1 to 16"), std::string::npos);
  AttentionShape uneven = make_shape(2, 2, 64, 16);
  uneven.heads = 5;
  EXPECT_NE(message(uneven).find("1 to 16"), std::string::npos);
  EXPECT_NE(message(make_shape(8, 4, 128, 48)).find("16, 32 or 64"), std::string::npos);
}

}  // namespace
}  // namespace vesper
