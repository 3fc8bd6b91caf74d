// The decoder's small operations on CUDA against the CPU's, on inputs that the 16-bit types hold exactly, under bounds
// derived from fp32 and one rounding of the output.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "models/norm.h"
#include "models/rows.h"
#include "tests/compare.h"
#include "tests/device_tensor.h"
#include "tests/gpu.h"
#include "tests/paged.h"

namespace vesper {
namespace {

constexpr float kEps = 1e-5F;

double round_of(DType dtype) {
  return dtype == DType::kBf16 ? kRoundBf16 : kRoundF16;
}

// What rounding to the type may add to a value: a relative part, and half the smallest step among subnormals.
double rounding(DType dtype, double value) {
  return round_of(dtype) * std::abs(value) + (dtype == DType::kF16 ? 0x1p-25 : 0x1p-134);
}

// `relative` is what fp32 may add on both devices together; the result is then rounded to `dtype`.
std::vector<double> bounds(DType dtype, const std::vector<double>& expected, double relative) {
  std::vector<double> bound;
  for (const double value : expected) {
    const double before = relative * std::abs(value);
    bound.push_back(before + rounding(dtype, std::abs(value) + before));
  }
  return bound;
}

std::vector<double> widened(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

struct Case {
  DType dtype;
  std::int64_t tokens;
  std::int64_t columns;
  std::int64_t offset;  // of every tensor, in elements: 1 forbids wide accesses

  [[nodiscard]] std::string text() const {
    return std::string(dtype_name(dtype)) + ", " + std::to_string(tokens) + " tokens, " + std::to_string(columns) +
           " columns, offset " + std::to_string(offset);
  }
};

std::vector<Case> cases() {
  std::vector<Case> all;
  std::mt19937 random(11);
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    for (const std::int64_t columns :
         {1, 2, 7, 8, 9, 64, 96, 100, 255, 256, 703, 704, 4096, 6152, 8192, 8200, 14336, 14337}) {
      const std::int64_t tokens = std::uniform_int_distribution<std::int64_t>(1, 40)(random);
      all.push_back({dtype, 1, columns, 0});
      all.push_back({dtype, tokens, columns, 0});
      all.push_back({dtype, tokens, columns, 1});
    }
  }
  return all;
}

// Each of the two sums of squares is off by (n + 1) roundings, the root halves that; rsqrtf is within 2 units in the
// last place, the other operations (a division, an addition, a root, products) within one rounding each.
double norm_relative(std::int64_t hidden) {
  return (static_cast<double>(hidden) + 1 + 14) * kRoundF32;
}

TEST(RmsNormCuda, MatchesTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  std::mt19937 random(1);
  for (const Case& c : cases()) {
    const auto count = static_cast<std::size_t>(c.tokens * c.columns);
    std::vector<float> x = rounded(c.dtype, random_floats(random, count, -3.0F, 3.0F));
    std::vector<float> weight = rounded(c.dtype, random_floats(random, static_cast<std::size_t>(c.columns)));
    std::vector<float> expected(count);
    cpu::rms_norm(TensorView<const float, 2>(x.data(), c.tokens, c.columns),
                  tensor_ref(weight.data(), DType::kF32, c.columns), kEps,
                  TensorView<float, 2>(expected.data(), c.tokens, c.columns));

    DeviceTensor device_x(exec, c.offset, c.dtype, c.tokens, c.columns);
    DeviceTensor device_weight(exec, c.offset, c.dtype, c.columns);
    DeviceTensor out(exec, c.offset, c.dtype, c.tokens, c.columns);
    device_x.write(x);
    device_weight.write(weight);
    rms_norm(exec, device_x.ref(), device_weight.ref(), kEps, out.ref());
    expect_within(out.read(c.text()), widened(expected), bounds(c.dtype, widened(expected), norm_relative(c.columns)),
                  c.text());
    EXPECT_EQ(device_x.read(c.text()), x) << c.text() << ": x was changed";
  }
}

TEST(AddRmsNormCuda, MatchesTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  std::mt19937 random(2);
  for (const Case& c : cases()) {
    const auto count = static_cast<std::size_t>(c.tokens * c.columns);
    const std::vector<float> x = rounded(c.dtype, random_floats(random, count, -3.0F, 3.0F));
    const std::vector<float> addend = rounded(c.dtype, random_floats(random, count, -3.0F, 3.0F));
    std::vector<float> weight = rounded(c.dtype, random_floats(random, static_cast<std::size_t>(c.columns)));
    // One fp32 addition and one rounding to 16 bits: the same bits on both devices.
    std::vector<float> sum(count);
    std::transform(x.begin(), x.end(), addend.begin(), sum.begin(), std::plus<>());
    sum = rounded(c.dtype, sum);
    std::vector<float> expected(count);
    cpu::rms_norm(TensorView<const float, 2>(sum.data(), c.tokens, c.columns),
                  tensor_ref(weight.data(), DType::kF32, c.columns), kEps,
                  TensorView<float, 2>(expected.data(), c.tokens, c.columns));

    DeviceTensor device_x(exec, c.offset, c.dtype, c.tokens, c.columns);
    DeviceTensor device_addend(exec, c.offset, c.dtype, c.tokens, c.columns);
    DeviceTensor device_weight(exec, c.offset, c.dtype, c.columns);
    DeviceTensor out(exec, c.offset, c.dtype, c.tokens, c.columns);
    device_x.write(x);
    device_addend.write(addend);
    device_weight.write(weight);
    add_rms_norm(exec, device_x.ref(), device_addend.ref(), device_weight.ref(), kEps, device_x.ref(), out.ref());
    EXPECT_EQ(device_x.read(c.text()), sum) << c.text();
    expect_within(out.read(c.text()), widened(expected), bounds(c.dtype, widened(expected), norm_relative(c.columns)),
                  c.text());
  }
}

TEST(GatherRowsCuda, CopiesBits) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  std::mt19937 random(3);
  constexpr std::int32_t kRows = 37;
  for (Case c : cases()) {
    // f32 rows take the 2-byte path where they are odd: their address is a multiple of 4 only.
    for (const DType dtype : {c.dtype, DType::kF32}) {
      c.dtype = dtype;
      const auto row_bytes = static_cast<std::size_t>(c.columns * dtype_bytes(dtype));
      std::vector<char> table(row_bytes * kRows);
      for (char& byte : table) byte = static_cast<char>(random());
      std::vector<std::int32_t> index(static_cast<std::size_t>(c.tokens));
      for (std::int32_t& row : index) row = std::uniform_int_distribution<std::int32_t>(0, kRows - 1)(random);
      DeviceTensor device_table(exec, c.offset, dtype, kRows, c.columns);
      DeviceTensor device_index(exec, 0, DType::kI32, c.tokens);
      DeviceTensor out(exec, c.offset, dtype, c.tokens, c.columns);
      device_table.write_bytes(table.data());
      device_index.write_bytes(index.data());
      gather_rows(exec, device_table.ref(), device_index.ref().as<const std::int32_t, 1>(), out.ref());
      const std::span<const char> found = out.read_bytes(c.text());
      for (std::size_t t = 0; t < index.size(); ++t) {
        const char* expected = table.data() + static_cast<std::size_t>(index[t]) * row_bytes;
        ASSERT_EQ(std::memcmp(found.data() + t * row_bytes, expected, row_bytes), 0) << c.text() << ", row " << t;
      }
    }
  }
}

TEST(SiluMulCuda, MatchesTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  std::mt19937 random(4);
  for (const Case& c : cases()) {
    std::vector<float> gate_up = random_floats(random, static_cast<std::size_t>(2 * c.tokens * c.columns), -9.0F, 9.0F);
    gate_up[0] = -200.0F;  // e^200 overflows, and the result is zero
    if (c.columns > 1) gate_up[1] = 80.0F;
    gate_up = rounded(c.dtype, gate_up);
    std::vector<float> expected(static_cast<std::size_t>(c.tokens * c.columns));
    cpu::silu_mul(TensorView<const float, 2>(gate_up.data(), c.tokens, 2 * c.columns),
                  TensorView<float, 2>(expected.data(), c.tokens, c.columns));
    DeviceTensor device_gate_up(exec, c.offset, c.dtype, c.tokens, 2 * c.columns);
    DeviceTensor out(exec, c.offset, c.dtype, c.tokens, c.columns);
    device_gate_up.write(gate_up);
    silu_mul(exec, device_gate_up.ref(), out.ref());
    // In units of 2^-24, on CUDA and CPU: the exponential 4 (CUDA guide, expf) and 2.6 (engine/core/lanes.h), then an
    // addition, a division and a product each.
    expect_within(out.read(c.text()), widened(expected), bounds(c.dtype, widened(expected), 14 * kRoundF32), c.text());
  }
}

TEST(RowsCuda, NoRowsIsNoWork) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const DeviceTensor table(stream.exec(), 0, DType::kBf16, 4, 64);
  const DeviceTensor index(stream.exec(), 0, DType::kI32, 0);
  const DeviceTensor none(stream.exec(), 0, DType::kBf16, 0, 64);
  gather_rows(stream.exec(), table.ref(), index.ref().as<const std::int32_t, 1>(), none.ref());
  stream.synchronize();
}

}  // namespace
}  // namespace vesper
