#include "engine/core/philox.h"

#include <gtest/gtest.h>

namespace vesper {
namespace {

// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
TEST(Philox, KnownAnswers) {
  const PhiloxCounter zeros = philox({{0, 0, 0, 0}}, {{0, 0}});
  EXPECT_EQ(zeros.word[0], 0x6627e8d5U);
  EXPECT_EQ(zeros.word[1], 0xe169c58dU);
  EXPECT_EQ(zeros.word[2], 0xbc57ac4cU);
  EXPECT_EQ(zeros.word[3], 0x9b00dbd8U);
  const PhiloxCounter ones = philox({{~0U, ~0U, ~0U, ~0U}}, {{~0U, ~0U}});
  EXPECT_EQ(ones.word[0], 0x408f276dU);
  EXPECT_EQ(ones.word[1], 0x41c83b0eU);
  EXPECT_EQ(ones.word[2], 0xa20bc7c6U);
  EXPECT_EQ(ones.word[3], 0x6d5451fdU);
}

TEST(Philox, UnitIntervalIsOpen) {
  EXPECT_GT(unit_interval(0), 0.0F);
  EXPECT_LT(unit_interval(~0U), 1.0F);
}

}  // namespace
}  // namespace vesper
