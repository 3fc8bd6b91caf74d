// Values made on the CPU: the formula element by element, what they depend on, and their moments.
#include "models/fill.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace vesper {
namespace {

constexpr std::uint64_t kSeed = 0x1234567890ABCDEFULL;

template <typename T>
std::vector<T> uniform(std::int64_t count, std::uint64_t seed, std::uint32_t tensor, float half_range) {
  std::vector<T> data(static_cast<std::size_t>(count));
  cpu::fill_uniform(tensor_ref(data.data(), DTypeOf<T>::value, count), seed, tensor, half_range);
  return data;
}

TEST(FillCpu, EveryElementIsTheFormula) {
  constexpr std::int64_t kCount = 100003;  // three elements in the last group
  const std::vector<float> as_f32 = uniform<float>(kCount, kSeed, 7, 0.03F);
  const std::vector<bf16> as_bf16 = uniform<bf16>(kCount, kSeed, 7, 0.03F);
  const std::vector<f16> as_f16 = uniform<f16>(kCount, kSeed, 7, 0.03F);
  for (std::uint32_t i = 0; i < kCount; ++i) {
    const PhiloxCounter draw = philox({{i / 4, 0, 7, 0}}, {{0x90ABCDEFU, 0x12345678U}});
    const double u = static_cast<double>(unit_interval(draw.word[i % 4]));
    const auto expected = static_cast<float>(static_cast<double>(0.03F) * (2.0 * u - 1.0));
    ASSERT_EQ(as_f32[i], expected) << "element " << i;
    ASSERT_EQ(as_bf16[i].bits, to_bf16(expected).bits) << "element " << i;
    ASSERT_EQ(as_f16[i].bits, to_f16(expected).bits) << "element " << i;
  }
}

TEST(FillCpu, MomentsAreThoseOfTheUniformDistribution) {
  constexpr std::int64_t kCount = 1 << 20;
  double sum = 0.0;
  double squares = 0.0;
  for (const float value : uniform<float>(kCount, kSeed, 0, 1.5F)) {
    ASSERT_LE(std::abs(value), 1.5F);
    sum += value;
    squares += static_cast<double>(value) * value;
  }
  const double variance = 1.5 * 1.5 / 3.0;
  EXPECT_LT(std::abs(sum / kCount), 5.0 * std::sqrt(variance / kCount));
  // Var(x^2) = E x^4 - (E x^2)^2 = a^4 (1/5 - 1/9).
  EXPECT_LT(std::abs(squares / kCount - variance), 5.0 * std::sqrt(std::pow(1.5, 4) * (0.2 - 1.0 / 9.0) / kCount));
}

TEST(FillCpu, SeedAndTensorDrawApart) {
  const std::vector<float> base = uniform<float>(1000, kSeed, 7, 1.0F);
  for (const std::vector<float>& other :
       {uniform<float>(1000, kSeed + 1, 7, 1.0F), uniform<float>(1000, kSeed, 8, 1.0F),
        uniform<float>(1000, kSeed + (1ULL << 32), 7, 1.0F)}) {
    int equal = 0;
    for (std::size_t i = 0; i < base.size(); ++i) equal += base[i] == other[i] ? 1 : 0;
    EXPECT_LT(equal, 3);
  }
}

TEST(FillCpu, ConstantIsRoundedToTheType) {
  std::vector<bf16> data(37, bf16{0xFFFFU});
  cpu::fill_constant(tensor_ref(data.data(), DType::kBf16, 37), 1.003F);
  for (const bf16 value : data) EXPECT_EQ(value.bits, to_bf16(1.003F).bits);
}

}  // namespace
}  // namespace vesper
