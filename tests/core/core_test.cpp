#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "engine/core/buffer.h"
#include "engine/core/clocks.h"
#include "engine/core/dtype.h"
#include "engine/core/error.h"
#include "engine/core/mapped_file.h"
#include "engine/core/read_probe.h"
#include "engine/core/stream.h"
#include "engine/core/tensor.h"

namespace vesper {
namespace {

TEST(Error, SaysTheFourPartsInOneSentence) {
  try {
    refuse({"reading a.json", "3 heads", "a multiple of 2", "change num_attention_heads"});
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "reading a.json: found 3 heads, expected a multiple of 2; change num_attention_heads");
    EXPECT_EQ(error.fault(), Fault::kInput);
  }
}

TEST(DType, Bf16RoundsToNearestEven) {
  EXPECT_EQ(to_bf16(1.0F).bits, 0x3F80);
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x3F808000U)).bits, 0x3F80);  // tie, even below
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x3F818000U)).bits, 0x3F82);  // tie, even above
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x3F808001U)).bits, 0x3F81);
  EXPECT_TRUE(std::isnan(to_float(to_bf16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_EQ(to_float(to_bf16(std::numeric_limits<float>::infinity())), std::numeric_limits<float>::infinity());
}

TEST(DType, EveryF16SurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const f16 half{static_cast<std::uint16_t>(bits)};
    const float wide = to_float(half);
    if (std::isnan(wide)) {
      EXPECT_TRUE((bits & 0x7FFFU) > 0x7C00U);
      continue;
    }
    EXPECT_EQ(to_f16(wide).bits, bits);
  }
}

TEST(DType, F16RoundsToNearestEvenBetweenNeighbours) {
  for (std::uint32_t bits = 0; bits + 1 < 0x7C00U; ++bits) {
    const float low = to_float(f16{static_cast<std::uint16_t>(bits)});
    const float high = to_float(f16{static_cast<std::uint16_t>(bits + 1)});
    const float middle = 0.5F * (low + high);  // exact in binary32
    EXPECT_EQ(to_f16(middle).bits, bits % 2 == 0 ? bits : bits + 1);
    EXPECT_EQ(to_f16(std::nextafter(middle, 0.0F)).bits, bits);
    EXPECT_EQ(to_f16(std::nextafter(middle, 1e9F)).bits, bits + 1);
  }
  EXPECT_EQ(to_f16(65504.0F).bits, 0x7BFF);
  EXPECT_EQ(to_f16(65519.9F).bits, 0x7BFF);
  EXPECT_EQ(to_f16(65520.0F).bits, 0x7C00);
}

TEST(TensorView, IndexesRowMajor) {
  float data[24];
  for (int i = 0; i < 24; ++i) data[i] = static_cast<float>(i);
  const TensorView<float, 3> view(data, 2, 3, 4);
  EXPECT_EQ(view(1, 2, 3), 23.0F);
  EXPECT_EQ(view(1, 0, 1), 13.0F);
  const TensorView<const float, 3> constant = view;
  EXPECT_EQ(constant.size(), 24);
  EXPECT_EQ((tensor_ref(data, DType::kF32, 6, 4).as<float, 2>()(5, 3)), 23.0F);
}

TEST(Buffer, IsCountedAndFreed) {
  const AllocationCount before = allocation_count(Memory::kHost);
  {
    Buffer buffer(Memory::kHost, 1000, "a test buffer");
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 256, 0U);
    Buffer moved = std::move(buffer);
    EXPECT_EQ(moved.bytes(), 1000);
    EXPECT_EQ(allocation_count(Memory::kHost).live_bytes, before.live_bytes + 1000);
  }
  EXPECT_EQ(allocation_count(Memory::kHost).live_bytes, before.live_bytes);
  EXPECT_EQ(allocation_count(Memory::kHost).allocations, before.allocations + 1);
}

TEST(MappedFile, RefusesWhatIsNoFile) {
  EXPECT_THROW(MappedFile("/nonexistent/file"), Error);
  EXPECT_THROW(MappedFile("/tmp"), Error);
}

TEST(ReadProbe, MeasuresTheCpu) {
  const ReadRate rate = probe_read_rate(Exec{});
  EXPECT_GT(rate.bytes, 1 << 20);
  EXPECT_GT(rate.bytes_per_s, 1e8);
  EXPECT_LT(rate.bytes_per_s, 1e13);
}

TEST(Clocks, AreNotAvailableWithoutAGpu) {
  EXPECT_EQ(describe_clocks(std::nullopt), "not available");
  ClockState state;
  state.sm_mhz = 1500;
  state.max_sm_mhz = 1980;
  state.power_w = 350.4;
  EXPECT_EQ(describe_clocks(state), "1500 of 1980 MHz, memory 0 of 0 MHz, 0 C, 350 W, not throttled");
  state.throttled_by = {"power cap", "hardware thermal"};
  EXPECT_TRUE(describe_clocks(state).ends_with(", throttled by power cap and hardware thermal"));
}

TEST(DeviceInfo, KnowsTheCpu) {
  const DeviceInfo info = device_info(DeviceKind::kCpu);
  EXPECT_GT(info.total_bytes, 1 << 20);
  EXPECT_GT(info.free_bytes, 0);
  EXPECT_LE(info.free_bytes, info.total_bytes);
}

}  // namespace
}  // namespace vesper
