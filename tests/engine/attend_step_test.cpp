// One attention step against the formula in double precision, and what it refuses.
#include "engine/attend_step.h"

#include <gtest/gtest.h>

#include <array>
#include <numeric>

#include "engine/core/error.h"
#include "tests/attend_reference.h"
#include "tests/engine/device.h"

namespace vesper {
namespace {

class AttendStep : public DeviceTest {};

constexpr bool kOnCuda = kTestDevice == DeviceKind::kCuda;

struct StoredInput {
  std::vector<std::byte> q, k, v;
  AttendInput input;

  explicit StoredInput(const AttendTensors& tensors)
      : q(tensors.bytes(tensors.q)), k(tensors.bytes(tensors.k)), v(tensors.bytes(tensors.v)) {
    const AttendCase& shape = tensors.shape;
    input = {.source = "a test",
             .q = tensor_ref(q.data(), shape.dtype, shape.heads, shape.head_dim),
             .k = tensor_ref(k.data(), shape.dtype, shape.tokens, shape.kv_heads, shape.head_dim),
             .v = tensor_ref(v.data(), shape.dtype, shape.tokens, shape.kv_heads, shape.head_dim)};
  }
};

// What attention runs in: on CUDA f32 is rounded to bf16.
DType running_type(DType stored) {
  if constexpr (!kOnCuda) return DType::kF32;
  return stored == DType::kF16 ? DType::kF16 : DType::kBf16;
}

void check(const AttendCase& shape, int page_tokens) {
  const AttendTensors tensors(shape);
  const StoredInput stored(tensors);
  const std::string what = shape.text() + ", pages of " + std::to_string(page_tokens);
  const AttendOutput found = attend_step(stored.input, "dense", page_tokens, 0, kTestDevice);
  const AttendTruth truth = attend_truth(tensors, running_type(shape.dtype));
  expect_within(found.out, truth.out, truth.out_bound, what + ", out");
  expect_within(found.lse, truth.lse, truth.lse_bound, what + ", lse");

  std::vector<std::int32_t> everything(static_cast<std::size_t>(shape.tokens));
  std::iota(everything.begin(), everything.end(), 0);
  ASSERT_EQ(found.index_columns, shape.tokens) << what;
  ASSERT_EQ(found.index.size(), everything.size() * static_cast<std::size_t>(shape.kv_heads)) << what;
  for (int g = 0; g < shape.kv_heads; ++g) {
    const auto row = found.index.begin() + static_cast<std::ptrdiff_t>(g) * shape.tokens;
    EXPECT_TRUE(std::equal(everything.begin(), everything.end(), row)) << what << ", KV head " << g;
  }
  const std::vector<std::int32_t> counts(static_cast<std::size_t>(shape.kv_heads), shape.tokens);
  EXPECT_EQ(found.count, counts) << what;
  EXPECT_EQ(found.tail_begin, counts) << what;
}

TEST_F(AttendStep, IsTheFormulaForEveryTypePageSizeAndGroup) {
  constexpr std::array<std::array<int, 2>, 7> kHeads = {{{1, 1}, {4, 4}, {6, 2}, {8, 2}, {7, 1}, {8, 1}, {32, 2}}};
  int number = 0;
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const int page_tokens : {16, 32, 64}) {
      for (const auto& [heads, kv_heads] : kHeads) {
        constexpr std::array<int, 8> kTokens = {1, 15, 16, 17, 64, 65, 333, 1000};
        check({heads, kv_heads, number % 2 == 0 ? 64 : 128, kTokens[static_cast<std::size_t>(number) % 8], dtype},
              page_tokens);
        ++number;
      }
    }
  }
}

TEST_F(AttendStep, TakesAnyEvenHeadDimOnTheCpu) {
  if constexpr (kOnCuda) GTEST_SKIP() << "CUDA has kernels for head_dim 64 and 128";
  for (const int head_dim : {2, 6, 16, 34, 80, 256}) check({6, 3, head_dim, 50, DType::kF32}, 16);
}

TEST_F(AttendStep, DoesNotDependOnThePageSize) {
  if constexpr (kOnCuda) GTEST_SKIP() << "CUDA splits differ with the pages";
  const AttendTensors tensors({8, 2, 64, 200, DType::kF32});
  const StoredInput stored(tensors);
  EXPECT_EQ(attend_step(stored.input, "dense", 16, 0, kTestDevice).out,
            attend_step(stored.input, "dense", 64, 0, kTestDevice).out);
}

// The refusal of an input that `spoil` has changed.
template <typename Spoil>
std::string refusal(const Spoil& spoil, const std::string& attention = "dense") {
  const AttendTensors tensors({4, 2, 64, 20, DType::kF32});
  StoredInput stored(tensors);
  spoil(stored.input);
  try {
    (void)attend_step(stored.input, attention, 16, 0, kTestDevice);
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was refused";
  return "";
}

void expect_part(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << "no \"" << part << "\" in: " << message;
}

TEST_F(AttendStep, RefusesTensorsThatDoNotGoTogether) {
  expect_part(refusal([](AttendInput& input) { input.k.dtype = DType::kBf16; }), "f32, bf16, f32 for q, k, v");
  expect_part(refusal([](AttendInput& input) { input.q.dtype = input.k.dtype = input.v.dtype = DType::kI32; }), "i32");
  expect_part(refusal([](AttendInput& input) { input.q.rank = 1; }), "q [4]");
  expect_part(refusal([](AttendInput& input) { input.v.shape[0] = 19; }), "v [19, 2, 64]");
  expect_part(refusal([](AttendInput& input) { input.k.shape[0] = input.v.shape[0] = 0; }), "none empty");
  expect_part(refusal([](AttendInput& input) { input.q.shape[1] = 32; }), "head_dim 32 in q and 64 in k");
  expect_part(refusal([](AttendInput& input) { input.q.shape[1] = input.k.shape[2] = input.v.shape[2] = 63; }),
              "expected one even head_dim");
  expect_part(refusal([](AttendInput& input) { input.q.shape[0] = 3; }), "3 heads and 2 KV heads");
  expect_part(refusal([](AttendInput& input) { input.q.shape[0] = 3; }), "of a test");
  expect_part(refusal([](AttendInput&) {}, "sparse"), "expected one of: dense, quest, twilight, vattention");
  if constexpr (kOnCuda) {
    expect_part(refusal([](AttendInput& input) { input.q.shape[1] = input.k.shape[2] = input.v.shape[2] = 32; }), "64");
  }
}

}  // namespace
}  // namespace vesper
