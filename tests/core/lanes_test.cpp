// The exponential and the widening of the CPU's lanes.
#include "engine/core/lanes.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "engine/core/dtype.h"
#include "tests/compare.h"

namespace vesper {
namespace {

using cpu::baseline::exponential;
using cpu::baseline::f32x4;
using cpu::baseline::f32x8;
using cpu::baseline::join;
using cpu::baseline::largest_lane;
using cpu::baseline::load;
using cpu::baseline::load_bf16;
using cpu::baseline::load_f16;
using cpu::baseline::splat;
using cpu::baseline::store;

TEST(Lanes, ExponentialIsWithinItsBound) {
  std::vector<float> found;
  std::vector<double> expected;
  std::vector<double> bound;
  // Every 1009th float of [-87, 88]; 1009 is prime, so all low bits occur.
  for (std::uint32_t bits = 0; bits <= std::bit_cast<std::uint32_t>(88.0F); bits += 8 * 1009) {
    for (const std::uint32_t sign : {0U, 0x80000000U}) {
      float x[8];
      for (std::uint32_t i = 0; i < 8; ++i) x[i] = std::bit_cast<float>((bits + 1009 * i) | sign);
      float y[8];
      store(y, exponential(load(x)));
      for (int i = 0; i < 8; ++i) {
        if (x[i] < -87.0F || x[i] > 88.0F) continue;
        found.push_back(y[i]);
        expected.push_back(std::exp(static_cast<double>(x[i])));
        bound.push_back(2.6 * kRoundF32 * expected.back());
      }
    }
  }
  EXPECT_GT(found.size(), 2000000U);
  expect_within(found, expected, bound, "exponential");
}

TEST(Lanes, ExponentialOfTheExtremes) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float x[8] = {0.0F, -0.0F, -87.5F, -kInfinity, 88.5F, kInfinity, NAN, -1e30F};
  float y[8];
  store(y, exponential(load(x)));
  EXPECT_EQ(y[0], 1.0F);
  EXPECT_EQ(y[1], 1.0F);
  EXPECT_EQ(y[2], 0.0F);
  EXPECT_EQ(y[3], 0.0F);
  EXPECT_EQ(y[4], kInfinity);
  EXPECT_EQ(y[5], kInfinity);
  EXPECT_TRUE(std::isnan(y[6]));
  EXPECT_EQ(y[7], 0.0F);
}

TEST(Lanes, WidenEverySixteenBitNumber) {
  for (std::uint32_t first = 0; first < 65536; first += 8) {
    std::uint16_t bits[8];
    for (std::uint32_t i = 0; i < 8; ++i) bits[i] = static_cast<std::uint16_t>(first + i);
    float from_bf16[8];
    float from_f16[8];
    store(from_bf16, load_bf16(bits));
    store(from_f16, load_f16(bits));
    for (int i = 0; i < 8; ++i) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(from_bf16[i]), std::bit_cast<std::uint32_t>(to_float(bf16{bits[i]})));
      ASSERT_EQ(std::bit_cast<std::uint32_t>(from_f16[i]), std::bit_cast<std::uint32_t>(to_float(f16{bits[i]})))
          << "f16 " << bits[i];
    }
  }
}

TEST(Lanes, JoinAddsInTheStatedOrder) {
  // Magnitudes so far apart that any other order rounds differently.
  const float x[8] = {1e8F, 3.0F, -1e8F, 7e3F, 1.5F, 1e-3F, 2e8F, -5.0F};
  const float sum = ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
  const f32x8 lanes = load(x);
  EXPECT_EQ(join(lanes), sum);
  const f32x4 four = join(lanes, splat(1.0F), -lanes, splat(0.0F));
  EXPECT_EQ(four[0], sum);
  EXPECT_EQ(four[1], 8.0F);
  EXPECT_EQ(four[2], -sum);
  EXPECT_EQ(four[3], 0.0F);
  EXPECT_EQ(largest_lane(lanes), 2e8F);
}

}  // namespace
}  // namespace vesper
