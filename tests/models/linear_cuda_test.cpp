// Products on CUDA: integers to the bit, reals against the CPU under a derived bound, through both paths.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "models/linear.h"
#include "models/small_gemm.h"
#include "tests/compare.h"
#include "tests/device_tensor.h"
#include "tests/gpu.h"
#include "tests/models/product_cases.h"
#include "tests/paged.h"

namespace vesper {
namespace {

// x [tokens, columns] and W [rows, columns], exact in the case's type.
struct Factors {
  std::vector<float> x;
  std::vector<float> weight;
};

std::vector<float> on_cuda(const Stream& stream, const LinearContext& context, const ProductCase& c,
                           const Factors& factors) {
  const Exec exec = stream.exec();
  DeviceTensor x(exec, c.offset, c.dtype, c.tokens, c.columns);
  DeviceTensor weight(exec, c.offset, c.dtype, c.rows, c.columns);
  DeviceTensor out(exec, c.offset, c.out_dtype, c.tokens, c.rows);
  x.write(factors.x);
  weight.write(factors.weight);
  linear(exec, context, x.ref(), LinearWeight{.blocks = {weight.ref()}, .count = 1}, out.ref());
  return out.read(c.text());
}

// Aligned and not, with rows of every remainder, with one tile a block and many, with tokens to past small_gemm's.
std::vector<ProductCase> cases() {
  std::vector<ProductCase> all = product_cases(
      {{1, 1, 1},      {2, 3, 2},      {1, 8, 15},      {3, 31, 16},      {8, 32, 17},      {5, 40, 33},
       {1, 255, 100},  {4, 256, 703},  {7, 257, 64},    {8, 1023, 48},    {1, 4096, 96},    {2, 4104, 40},
       {6, 1000, 7},   {1, 264, 7000}, {8, 64, 7001},   {1, 14336, 64},   {9, 64, 64},      {9, 96, 100},
       {17, 256, 704}, {33, 8, 8},     {40, 4096, 136}, {16, 72, 40},     {12, 703, 65},    {130, 257, 33},
       {600, 128, 96}, {64, 1024, 57}, {31, 1032, 33},  {10, 2056, 4000}, {20, 128, 40000}, {9, 64, 30000},
       {65, 128, 96}},
      66);
  // Aligned shapes at unaligned addresses.
  for (const std::int64_t tokens : {1, 8, 20}) all.push_back({DType::kBf16, DType::kF32, tokens, 256, 96, 1});
  return all;
}

void expect_exact_integers(const std::vector<ProductCase>& products) {
  const Stream stream(DeviceKind::kCuda);
  const LinearContext context(DeviceKind::kCuda);
  std::mt19937 random(1);
  for (const ProductCase& c : products) {
    const Factors factors{random_integers(random, c.tokens * c.columns, -4, 4),
                          random_integers(random, c.rows * c.columns, -4, 4)};
    expect_same_product(c, on_cuda(stream, context, c, factors),
                        rounded(c.out_dtype, product_on_cpu(c, factors.x, factors.weight)));
  }
}

TEST(LinearCuda, IntegersAreExact) {
  VESPER_NEEDS_GPU();
  expect_exact_integers(cases());
}

// A few tiles, with the ring once around and more: so small that slow tools can watch.
TEST(LinearCuda, IntegersAreExactWhereABlockHasATile) {
  VESPER_NEEDS_GPU();
  expect_exact_integers({{DType::kBf16, DType::kF32, 9, 264, 40}, {DType::kBf16, DType::kF32, 60, 904, 33}});
}

TEST(LinearCuda, IntegersAreExactWhereTwoBlocksShareATile) {
  VESPER_NEEDS_GPU();
  expect_exact_integers({{DType::kBf16, DType::kBf16, 17, 2056, 33}});
}

TEST(LinearCuda, MatchesTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const LinearContext context(DeviceKind::kCuda);
  std::mt19937 random(2);
  for (const ProductCase& c : cases()) {
    Factors factors{rounded(c.dtype, random_floats(random, static_cast<std::size_t>(c.tokens * c.columns))),
                    rounded(c.dtype, random_floats(random, static_cast<std::size_t>(c.rows * c.columns)))};
    const std::vector<float> expected = product_on_cpu(c, factors.x, factors.weight);
    const std::vector<float> found = on_cuda(stream, context, c, factors);
    for (float& value : factors.x) value = std::abs(value);
    for (float& value : factors.weight) value = std::abs(value);
    const std::vector<float> magnitude = product_on_cpu(c, factors.x, factors.weight);
    std::vector<double> bound;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      // The CPU rounds each addition (sum_bound); tensor cores align the terms of a step and truncate, which is up to a
      // whole unit in the last place instead of half, for each term and again for each step's sum (Fasi et al.,
      // "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021): within four times the bound.
      const double in_fp32 = 5 * sum_bound(static_cast<double>(c.columns), static_cast<double>(magnitude[i]));
      const double half_ulp = c.out_dtype == DType::kF32 ? 0.0 : c.out_dtype == DType::kBf16 ? kRoundBf16 : kRoundF16;
      bound.push_back(in_fp32 + half_ulp * (std::abs(static_cast<double>(expected[i])) + in_fp32) + 0x1p-25);
    }
    expect_within(found, {std::vector<double>(expected.begin(), expected.end())}, bound, c.text());
  }
}

// A token's product depends neither on how many tokens there are (up to the GEMV's limit) nor on the others.
TEST(LinearCuda, GemvRowsDoNotMeet) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const LinearContext context(DeviceKind::kCuda);
  std::mt19937 random(3);
  const ProductCase all{DType::kBf16, DType::kF32, kMaxGemvRows, 1000, 300, 0};
  Factors factors{rounded(all.dtype, random_floats(random, static_cast<std::size_t>(all.tokens * all.columns))),
                  rounded(all.dtype, random_floats(random, static_cast<std::size_t>(all.rows * all.columns)))};
  for (std::int64_t column = 0; column < all.columns; ++column) {
    factors.x[static_cast<std::size_t>(3 * all.columns + column)] = NAN;
  }
  const std::vector<float> together = on_cuda(stream, context, all, factors);
  for (std::int64_t t = 0; t < all.tokens; ++t) {
    ProductCase one = all;
    one.tokens = 1;
    const auto x = factors.x.begin() + t * all.columns;
    const std::vector<float> alone = on_cuda(stream, context, one, {{x, x + all.columns}, factors.weight});
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

// Nor does it above that limit, where a block multiplies whole tiles, up to theirs; and a second run, out of a graph,
// gives the same bits.
TEST(LinearCuda, TilesDoNotMixTokens) {
  VESPER_NEEDS_GPU();
  if (!cuda::has_small_gemm()) GTEST_SKIP() << "cuBLASLt's order of sums may depend on the number of tokens";
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  const LinearContext context(DeviceKind::kCuda);
  std::mt19937 random(4);
  for (const std::int64_t columns : {1000, 2056}) {  // a block a tile, and two
    const ProductCase all{DType::kBf16, DType::kF32, kMaxSmallGemmRows, columns, 300, 0};
    Factors factors{rounded(all.dtype, random_floats(random, static_cast<std::size_t>(all.tokens * columns))),
                    rounded(all.dtype, random_floats(random, static_cast<std::size_t>(all.rows * columns)))};
    for (std::int64_t c = 0; c < columns; ++c) factors.x[static_cast<std::size_t>(3 * columns + c)] = NAN;
    DeviceTensor x(exec, 0, all.dtype, all.tokens, columns);
    DeviceTensor weight(exec, 0, all.dtype, all.rows, columns);
    x.write(factors.x);
    weight.write(factors.weight);
    const LinearWeight matrix{.blocks = {weight.ref()}, .count = 1};
    const std::vector<float> together = on_cuda(stream, context, all, factors);
    for (const std::int64_t tokens : {9, 16, 23, 32, 57, 64}) {
      DeviceTensor out(exec, 0, all.out_dtype, tokens, all.rows);
      const Graph graph =
          Graph::capture(exec, [&] { linear(exec, context, first_rows(x.ref(), tokens), matrix, out.ref()); });
      graph.launch(exec);
      const std::vector<float> some = out.read("some tokens");
      for (std::size_t i = 0; i < some.size(); ++i) {
        const auto t = static_cast<std::int64_t>(i) / all.rows;
        ASSERT_TRUE(t == 3 ? std::isnan(some[i]) && std::isnan(together[i]) : some[i] == together[i])
            << "token " << t << " of " << tokens << ", row " << static_cast<std::int64_t>(i) % all.rows << ", "
            << columns << " columns";
      }
    }
  }
}

TEST(LinearCuda, TheWorkspaceIsAllThatIsAllocated) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  const DeviceTensor x(exec, 0, DType::kBf16, 64, 512);
  const DeviceTensor weight(exec, 0, DType::kBf16, 256, 512);
  const DeviceTensor out(exec, 0, DType::kF32, 64, 256);
  const AllocationCount before = allocation_count(Memory::kDevice);
  const LinearContext context(DeviceKind::kCuda);
  EXPECT_EQ(allocation_count(Memory::kDevice).live_bytes - before.live_bytes,
            LinearContext::workspace_bytes(DeviceKind::kCuda));
  const LinearWeight matrix{.blocks = {weight.ref()}, .count = 1};
  for (const std::int64_t tokens : {1, 8, 9, 64, 9, 1}) {
    linear(exec, context, first_rows(x.ref(), tokens), matrix, first_rows(out.ref(), tokens));
  }
  stream.synchronize();
  EXPECT_EQ(allocation_count(Memory::kDevice).allocations - before.allocations, 1);
}

}  // namespace
}  // namespace vesper
