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
#include "tests/attention/attend_world.h"
#include "tests/gpu.h"

namespace vesper {
namespace {

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
