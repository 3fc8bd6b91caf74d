// 4-bit weights on CUDA: made to the CPU's bits, and products with them, integers to the bit and reals under a derived
// bound, through the GEMV kernel and through dequantised panels.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "models/linear.h"
#include "tests/compare.h"
#include "tests/device_tensor.h"
#include "tests/gpu.h"
#include "tests/models/int4_reference.h"
#include "tests/models/product_cases.h"

namespace vesper {
namespace {

std::string shape_text(DType dtype, std::int64_t rows, std::int64_t columns) {
  return std::string(dtype_name(dtype)) + ", " + std::to_string(rows) + " rows, " + std::to_string(columns) +
         " columns";
}

// A 4-bit matrix on the device, between guards, with the bytes of `host`.
DeviceTensor on_device(const Exec& exec, const HostInt4& host) {
  DeviceTensor device(exec, 0, DType::kU8, host.matrix.bytes());
  device.write_bytes(host.bytes.data());
  return device;
}
Int4Matrix view_of(const DeviceTensor& device, const HostInt4& host) {
  return {.data = device.data<std::byte>(), .rows = host.matrix.rows, .columns = host.matrix.columns};
}

// What rounds, overflows and ties, among ordinary weights.
std::vector<float> awkward_weights(std::mt19937& random, std::int64_t rows, std::int64_t columns) {
  std::vector<float> values = uneven_weights(random, rows, columns);
  const float infinity = std::numeric_limits<float>::infinity();
  const float special[] = {0.0F, -0.0F,      1e-7F, -1e-42F,  3e-5F,     65504.0F, -70000.0F, 524031.0F,
                           5e5F, -524033.0F, 1e30F, infinity, -infinity, NAN,      -NAN,      0x1p-24F};
  std::uniform_int_distribution<std::size_t> place(0, values.size() - 1);
  for (const float value : special) values[place(random)] = value;
  for (int i = 0; i < 20; ++i) {  // both signs of one magnitude in a span
    const std::size_t at = place(random);
    const std::size_t other = std::min(at + 3, values.size() - 1);
    values[at] = 3.0F;
    values[other] = i % 2 == 0 ? -3.0F : 3.0F;
  }
  for (std::size_t i = values.size() / 2; i < std::min(values.size() / 2 + 256, values.size()); ++i) values[i] = 0.0F;
  return values;
}

TEST(Int4Cuda, QuantisesToTheBitsOfTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(1);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const auto& [rows, columns] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {1, 1}, {16, 128}, {17, 129}, {40, 300}, {100, 1000}, {33, 4096}, {513, 511}}) {
      for (const std::int64_t offset : {0, 1}) {
        const std::vector<float> weights = rounded(dtype, awkward_weights(random, rows, columns));
        const HostInt4 expected = HostInt4::quantised(weights, rows, columns);
        DeviceTensor from(stream.exec(), offset, dtype, rows, columns);
        from.write(weights);
        HostInt4 found(rows, columns);
        DeviceTensor device = on_device(stream.exec(), found);
        const Int4Matrix matrix = view_of(device, found);
        const std::int64_t first = rows / 3;  // in two parts
        clear_int4_padding(stream.exec(), matrix);
        quantise_int4(stream.exec(), first_rows(from.ref(), first), 0, matrix);
        TensorRef rest = first_rows(from.ref(), rows - first);
        rest.data = from.data<std::byte>() + first * columns * dtype_bytes(dtype);
        quantise_int4(stream.exec(), rest, first, matrix);
        const std::string what = shape_text(dtype, rows, columns);
        const auto bytes = device.read_bytes(what);
        std::memcpy(found.bytes.data(), bytes.data(), bytes.size());
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t c = 0; c < columns; ++c) {
            ASSERT_EQ(found.scale(r, c).bits, expected.scale(r, c).bits) << what << ": scale of row " << r << ", " << c;
            ASSERT_EQ(found.code(r, c), expected.code(r, c))
                << what << ": row " << r << ", column " << c << ": "
                << weights[static_cast<std::size_t>(r * columns + c)] << " at scale " << to_float(found.scale(r, c));
          }
        }
        ASSERT_EQ(found.bytes, expected.bytes) << what << ": the padding";
      }
    }
  }
}

TEST(Int4Cuda, DequantisesToTheBitsOfTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(2);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const auto& [rows, columns, first, offset] : std::vector<std::array<std::int64_t, 4>>{{1, 1, 0, 0},
                                                                                               {16, 128, 0, 0},
                                                                                               {50, 200, 0, 0},
                                                                                               {50, 200, 16, 0},
                                                                                               {49, 130, 48, 0},
                                                                                               {64, 256, 32, 1},
                                                                                               {35, 1000, 0, 0}}) {
      const HostInt4 host = HostInt4::quantised(uneven_weights(random, rows, columns), rows, columns);
      const DeviceTensor device = on_device(stream.exec(), host);
      DeviceTensor out(stream.exec(), offset, dtype, rows - first, columns);
      dequantise_int4(stream.exec(), view_of(device, host), first, out.ref());
      const std::vector<float> all = host.values();
      const std::vector<float> expected =
          rounded(dtype, std::span(all).subspan(static_cast<std::size_t>(first * columns)));
      const std::vector<float> found = out.read(shape_text(dtype, rows, columns));
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ASSERT_EQ(found[i], expected[i]) << shape_text(dtype, rows, columns) << ", from row " << first << ", element "
                                         << i;
      }
    }
  }
}

std::vector<ProductCase> cases() {
  std::vector<ProductCase> all =
      product_cases({{1, 1, 1},      {2, 3, 2},       {1, 8, 15},      {3, 31, 16},     {8, 128, 17},   {5, 40, 33},
                     {1, 255, 100},  {4, 256, 703},   {7, 257, 64},    {8, 1023, 48},   {1, 4096, 96},  {2, 4104, 40},
                     {6, 1000, 7},   {1, 264, 9000},  {8, 1024, 9001}, {1, 14336, 64},  {1, 11008, 64}, {9, 64, 64},
                     {17, 256, 704}, {32, 4096, 136}, {33, 8, 8},      {33, 4096, 136}, {40, 72, 40},   {64, 703, 65},
                     {130, 257, 33}, {33, 4096, 5000}},
                    48);
  for (const std::int64_t tokens : {1, 8, 40}) all.push_back({DType::kBf16, DType::kF32, tokens, 256, 96, 1});
  return all;
}

std::vector<float> on_cuda(const Stream& stream, const LinearContext& context, const ProductCase& c,
                           const std::vector<float>& x, const HostInt4& weight) {
  DeviceTensor input(stream.exec(), c.offset, c.dtype, c.tokens, c.columns);
  DeviceTensor out(stream.exec(), c.offset, c.out_dtype, c.tokens, c.rows);
  input.write(x);
  const DeviceTensor packed = on_device(stream.exec(), weight);
  LinearWeight matrix;
  matrix.int4 = view_of(packed, weight);
  linear(stream.exec(), context, input.ref(), matrix, out.ref());
  return out.read(c.text());
}

// Most bytes that a case's panel wants; 5000 rows of 4096 columns are two panels.
LinearContext context_for_cases() {
  std::int64_t most = 0;
  for (const ProductCase& c : cases()) most = std::max(most, LinearContext::panel_bytes(c.rows, c.columns));
  return LinearContext(DeviceKind::kCuda, most);
}

// Weights that are integers with -8 in every span have the scale 1.
TEST(LinearInt4Cuda, IntegersAreExact) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const LinearContext context = context_for_cases();
  std::mt19937 random(3);
  for (const ProductCase& c : cases()) {
    std::vector<float> weight = random_integers(random, c.rows * c.columns, -8, 7);
    const std::vector<float> x = random_integers(random, c.tokens * c.columns, -4, 4);
    for (std::int64_t r = 0; r < c.rows; ++r) {
      for (std::int64_t column = 0; column < c.columns; column += kInt4SpanColumns) {
        weight[static_cast<std::size_t>(r * c.columns + column)] = -8.0F;
      }
    }
    const HostInt4 packed = HostInt4::quantised(weight, c.rows, c.columns);
    ASSERT_EQ(packed.values(), weight) << c.text();
    expect_same_product(c, on_cuda(stream, context, c, x, packed), rounded(c.out_dtype, product_on_cpu(c, x, weight)));
  }
}

TEST(LinearInt4Cuda, MatchesTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const LinearContext context = context_for_cases();
  std::mt19937 random(4);
  for (const ProductCase& c : cases()) {
    std::vector<float> x = rounded(c.dtype, random_floats(random, static_cast<std::size_t>(c.tokens * c.columns)));
    const HostInt4 packed = HostInt4::quantised(uneven_weights(random, c.rows, c.columns), c.rows, c.columns);
    std::vector<float> weight = packed.values();
    const std::vector<float> expected = product_on_cpu(c, x, weight);
    const std::vector<float> found = on_cuda(stream, context, c, x, packed);
    for (float& value : x) value = std::abs(value);
    for (float& value : weight) value = std::abs(value);
    const std::vector<float> magnitude = product_on_cpu(c, x, weight);
    const double narrow = c.dtype == DType::kBf16 ? kRoundBf16 : kRoundF16;
    std::vector<double> bound;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      // Sums in fp32 as in linear_cuda_test.cpp; the scale and its product are two roundings more. Above the GEMV's
      // rows each weight is rounded to x's type, f16 ones below 2^-14 to a multiple of 2^-24.
      const auto sum = static_cast<double>(magnitude[i]);
      double error = 5 * sum_bound(static_cast<double>(c.columns + 2), sum);
      if (c.tokens > kMaxInt4GemvRows) {
        error +=
            narrow * sum * (1 + 0x1p-8) + (c.dtype == DType::kF16 ? static_cast<double>(c.columns) * 0x1p-25 : 0.0);
      }
      const double half_ulp = c.out_dtype == DType::kF32 ? 0.0 : narrow;
      bound.push_back(error + half_ulp * (std::abs(static_cast<double>(expected[i])) + error) + 0x1p-25);
    }
    expect_within(found, {std::vector<double>(expected.begin(), expected.end())}, bound, c.text());
  }
}

// Through the GEMV a token's product depends neither on how many tokens there are nor on the others.
TEST(LinearInt4Cuda, GemvRowsDoNotMeet) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const LinearContext context(DeviceKind::kCuda);
  std::mt19937 random(5);
  const ProductCase all{DType::kBf16, DType::kF32, kMaxInt4GemvRows, 1000, 300, 0};
  std::vector<float> x = rounded(all.dtype, random_floats(random, static_cast<std::size_t>(all.tokens * all.columns)));
  const HostInt4 packed = HostInt4::quantised(uneven_weights(random, all.rows, all.columns), all.rows, all.columns);
  for (std::int64_t column = 0; column < all.columns; ++column)
    x[static_cast<std::size_t>(3 * all.columns + column)] = NAN;
  const std::vector<float> together = on_cuda(stream, context, all, x, packed);
  for (std::int64_t t = 0; t < all.tokens; ++t) {
    ProductCase one = all;
    one.tokens = 1;
    const auto row = x.begin() + t * all.columns;
    const std::vector<float> alone = on_cuda(stream, context, one, {row, row + all.columns}, packed);
    for (std::int64_t r = 0; r < all.rows; ++r) {
      const float found = together[static_cast<std::size_t>(t * all.rows + r)];
      if (t == 3) {
        ASSERT_TRUE(std::isnan(found)) << "row " << r;
      } else {
        ASSERT_EQ(found, alone[static_cast<std::size_t>(r)]) << "token " << t << ", row " << r;
      }
    }
  }
}

// A span whose scale is NaN shows in its own row alone.
TEST(LinearInt4Cuda, ABadScaleShowsInItsRow) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(6);
  for (const std::int64_t tokens : {1, 8, 40}) {
    const ProductCase c{DType::kF16, DType::kF32, tokens, 520, 70, 0};
    std::vector<float> weight = uneven_weights(random, c.rows, c.columns);
    weight[static_cast<std::size_t>(41 * c.columns + 300)] = NAN;
    const LinearContext context(DeviceKind::kCuda, LinearContext::panel_bytes(c.rows, c.columns));
    const std::vector<float> x = random_floats(random, static_cast<std::size_t>(tokens * c.columns));
    const std::vector<float> found = on_cuda(stream, context, c, x, HostInt4::quantised(weight, c.rows, c.columns));
    for (std::size_t i = 0; i < found.size(); ++i) {
      ASSERT_EQ(std::isnan(found[i]), static_cast<std::int64_t>(i) % c.rows == 41) << c.text() << ", element " << i;
    }
  }
}

TEST(LinearInt4Cuda, WorkspaceAndPanelAreAllThatIsAllocated) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  std::mt19937 random(7);
  const HostInt4 packed = HostInt4::quantised(uneven_weights(random, 256, 512), 256, 512);
  const DeviceTensor weight = on_device(exec, packed);
  const DeviceTensor x(exec, 0, DType::kBf16, 64, 512);
  const DeviceTensor out(exec, 0, DType::kF32, 64, 256);
  const AllocationCount before = allocation_count(Memory::kDevice);
  const std::int64_t panel = LinearContext::panel_bytes(256, 512);
  EXPECT_EQ(panel, 256 * 512 * 2);
  const LinearContext context(DeviceKind::kCuda, panel);
  EXPECT_EQ(allocation_count(Memory::kDevice).live_bytes - before.live_bytes,
            LinearContext::workspace_bytes(DeviceKind::kCuda) + panel);
  LinearWeight matrix;
  matrix.int4 = view_of(weight, packed);
  for (const std::int64_t tokens : {1, 8, 9, 33, 64, 1}) {
    linear(exec, context, first_rows(x.ref(), tokens), matrix, first_rows(out.ref(), tokens));
  }
  stream.synchronize();
  EXPECT_EQ(allocation_count(Memory::kDevice).allocations - before.allocations, 2);
}

}  // namespace
}  // namespace vesper
