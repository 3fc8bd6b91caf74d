// The decoder's operations on the CPU against double precision, under bounds derived from fp32.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "engine/core/lanes.h"
#include "models/linear.h"
#include "models/linear_lanes.h"
#include "models/norm.h"
#include "models/rows.h"
#include "tests/compare.h"
#include "tests/paged.h"

namespace vesper {
namespace {

// Random weights of one type, and their exact values.
struct Weights {
  std::vector<std::uint16_t> narrow;
  std::vector<float> exact;
  DType dtype;

  Weights(std::mt19937& random, DType type, std::size_t count) : exact(random_floats(random, count)), dtype(type) {
    if (type == DType::kF32) return;
    for (float& value : exact) {
      narrow.push_back(type == DType::kBf16 ? to_bf16(value).bits : to_f16(value).bits);
      value = type == DType::kBf16 ? to_float(bf16{narrow.back()}) : to_float(f16{narrow.back()});
    }
  }
  void* data() { return dtype == DType::kF32 ? static_cast<void*>(exact.data()) : static_cast<void*>(narrow.data()); }
};

// The first `rows` rows of a matrix.
TensorView<float, 2> matrix(std::vector<float>& data, std::int64_t rows, std::int64_t columns) {
  return TensorView<float, 2>(data.data(), rows, columns);
}

TEST(LinearCpu, MatchesDoublePrecision) {
  std::mt19937 random(1);
  struct Case {
    int tokens, columns;
    std::vector<int> rows;
  };
  for (const Case& c : {Case{1, 256, {256, 128, 128}}, Case{1, 5, {1}}, Case{2, 64, {7, 3}}, Case{3, 703, {31}},
                        Case{4, 8, {9}}, Case{5, 9, {2, 2, 2}}, Case{13, 257, {65, 1}}, Case{130, 96, {50, 25, 100}}}) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      std::vector<float> x = random_floats(random, static_cast<std::size_t>(c.tokens * c.columns));
      std::vector<Weights> blocks;
      LinearWeight weight;
      std::int64_t rows = 0;
      for (const int block_rows : c.rows) {
        blocks.emplace_back(random, dtype, static_cast<std::size_t>(block_rows * c.columns));
        rows += block_rows;
      }
      for (std::size_t b = 0; b < blocks.size(); ++b) {
        weight.blocks[b] = tensor_ref(blocks[b].data(), dtype, c.rows[b], c.columns);
      }
      weight.count = static_cast<int>(blocks.size());
      std::vector<float> out(static_cast<std::size_t>(c.tokens * rows), NAN);
      cpu::linear(matrix(x, c.tokens, c.columns), weight, matrix(out, c.tokens, rows));

      std::vector<double> expected;
      std::vector<double> bound;
      for (int t = 0; t < c.tokens; ++t) {
        for (std::size_t b = 0; b < blocks.size(); ++b) {
          for (int r = 0; r < c.rows[b]; ++r) {
            double sum = 0.0;
            double magnitude = 0.0;
            for (int column = 0; column < c.columns; ++column) {
              const double product = static_cast<double>(x[static_cast<std::size_t>(t * c.columns + column)]) *
                                     blocks[b].exact[static_cast<std::size_t>(r * c.columns + column)];
              sum += product;
              magnitude += std::abs(product);
            }
            expected.push_back(sum);
            bound.push_back(sum_bound(c.columns / 8.0 + 4, magnitude));  // 8 lanes and their joining tree
          }
        }
      }
      expect_within(out, expected, bound,
                    std::to_string(c.tokens) + " tokens, " + std::to_string(c.columns) + " columns, " +
                        std::string(dtype_name(dtype)));
    }
  }
}

// The order of summation that models/linear.h states, to the bit.
TEST(LinearCpu, SumsInEightFixedLanes) {
  std::mt19937 random(2);
  for (const int columns : {3, 8, 20, 256, 701}) {
    const int rows = 37;
    const int tokens = 11;
    std::vector<float> x = random_floats(random, static_cast<std::size_t>(tokens * columns));
    Weights weights(random, DType::kBf16, static_cast<std::size_t>(rows * columns));
    LinearWeight weight;
    weight.blocks[0] = tensor_ref(weights.data(), weights.dtype, rows, columns);
    weight.count = 1;
    std::vector<float> out(static_cast<std::size_t>(tokens * rows));
    cpu::linear(matrix(x, tokens, columns), weight, matrix(out, tokens, rows));
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < rows; ++r) {
        float lane[8] = {};
        for (int c = 0; c < columns; ++c) {
          lane[c % 8] +=
              x[static_cast<std::size_t>(t * columns + c)] * weights.exact[static_cast<std::size_t>(r * columns + c)];
        }
        const float sum = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
        ASSERT_EQ(out[static_cast<std::size_t>(t * rows + r)], sum)
            << "token " << t << ", row " << r << ", columns " << columns;
      }
    }
  }
}

TEST(LinearCpu, ARowAloneIsARowInABatch) {
  std::mt19937 random(3);
  const int columns = 96;
  const int rows = 70;
  std::vector<float> x = random_floats(random, 67 * columns);
  Weights weights(random, DType::kF16, static_cast<std::size_t>(rows * columns));
  LinearWeight weight;
  weight.blocks[0] = tensor_ref(weights.data(), weights.dtype, rows, columns);
  weight.count = 1;
  std::vector<float> whole(static_cast<std::size_t>(67 * rows));
  cpu::linear(matrix(x, 67, columns), weight, matrix(whole, 67, rows));
  for (const int tokens : {1, 2, 3, 4, 5, 9}) {
    std::vector<float> first(static_cast<std::size_t>(tokens * rows));
    cpu::linear(matrix(x, tokens, columns), weight, matrix(first, tokens, rows));
    for (std::size_t i = 0; i < first.size(); ++i) ASSERT_EQ(first[i], whole[i]) << tokens << " tokens, element " << i;
  }
}

// The baseline and the AVX2 build, to the bit; every f16 and bf16 that is a number is among the weights.
TEST(LinearLanes, BothBuildsGiveTheSameBits) {
  if (!cpu::has_avx2()) GTEST_SKIP() << "this machine has no AVX2";
  std::mt19937 random(8);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const int columns : {256, 131, 5}) {
      const int rows = 65536 / columns;
      Weights weights(random, dtype, static_cast<std::size_t>(rows * columns));
      for (std::size_t i = 0; i < weights.narrow.size(); ++i) {
        const auto bits = static_cast<std::uint16_t>(i);
        const float value = dtype == DType::kBf16 ? to_float(bf16{bits}) : to_float(f16{bits});
        weights.narrow[i] = std::isfinite(value) ? bits : std::uint16_t{0};
      }
      for (int tokens = 1; tokens <= 13; ++tokens) {
        std::vector<float> x = random_floats(random, static_cast<std::size_t>(tokens * columns));
        std::vector<float> narrow(static_cast<std::size_t>(tokens * rows), NAN);
        std::vector<float> wide(narrow);
        cpu::LinearTile tile{.x = x.data(),
                             .tokens = tokens,
                             .columns = columns,
                             .weight = weights.data(),
                             .dtype = dtype,
                             .rows = rows,
                             .out = narrow.data(),
                             .out_stride = rows};
        cpu::baseline::multiply(tile);
        tile.out = wide.data();
        cpu::avx2::multiply(tile);
        for (std::size_t i = 0; i < wide.size(); ++i) {
          ASSERT_EQ(std::bit_cast<std::uint32_t>(wide[i]), std::bit_cast<std::uint32_t>(narrow[i]))
              << dtype_name(dtype) << ", " << tokens << " tokens, element " << i;
        }
      }
    }
  }
}

TEST(NormCpu, MatchesDoublePrecisionAndAddsTheResidual) {
  std::mt19937 random(4);
  for (const int hidden : {256, 64, 7, 1000}) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      const int tokens = 37;
      const float eps = 1e-5F;
      std::vector<float> x = random_floats(random, static_cast<std::size_t>(tokens * hidden), -3.0F, 3.0F);
      std::vector<float> addend = random_floats(random, x.size());
      Weights weights(random, dtype, static_cast<std::size_t>(hidden));
      const TensorRef weight = tensor_ref(weights.data(), dtype, hidden);
      std::vector<float> summed(x.size());
      std::vector<float> out(x.size());
      std::vector<float> out_added(x.size());
      cpu::rms_norm(matrix(x, tokens, hidden), weight, eps, matrix(out, tokens, hidden));
      cpu::add_rms_norm(matrix(x, tokens, hidden), matrix(addend, tokens, hidden), weight, eps,
                        matrix(summed, tokens, hidden), matrix(out_added, tokens, hidden));
      for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(summed[i], x[i] + addend[i]);

      const auto check = [&](const std::vector<float>& input, const std::vector<float>& found, const char* what) {
        std::vector<double> expected;
        std::vector<double> bound;
        for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
          double squares = 0.0;
          const std::size_t first = t * static_cast<std::size_t>(hidden);
          for (std::size_t d = 0; d < static_cast<std::size_t>(hidden); ++d) {
            squares += static_cast<double>(input[first + d]) * input[first + d];
          }
          const double scale = 1.0 / std::sqrt(squares / hidden + static_cast<double>(eps));
          for (std::size_t d = 0; d < static_cast<std::size_t>(hidden); ++d) {
            expected.push_back(input[first + d] * scale * weights.exact[d]);
            // The square root halves the relative error of the sum; mean, eps, root, reciprocal and two products round.
            bound.push_back((0.5 * (hidden + 1) + 6) * kRoundF32 * std::abs(expected.back()));
          }
        }
        expect_within(found, expected, bound, std::string(what) + ", hidden " + std::to_string(hidden));
      };
      check(x, out, "rms_norm");
      check(summed, out_added, "add_rms_norm");
    }
  }
}

// Decode runs these on one token; it must give the bits that a batch gives.
TEST(NormCpu, ARowAloneIsARowInABatch) {
  std::mt19937 random(5);
  std::vector<float> x = random_floats(random, 50 * 257);
  Weights weights(random, DType::kBf16, 257);
  const TensorRef weight = tensor_ref(weights.data(), DType::kBf16, 257);
  std::vector<float> whole(x.size());
  std::vector<float> alone(257);
  cpu::rms_norm(matrix(x, 50, 257), weight, 1e-6F, matrix(whole, 50, 257));
  cpu::rms_norm(matrix(x, 1, 257), weight, 1e-6F, matrix(alone, 1, 257));
  for (std::size_t d = 0; d < alone.size(); ++d) ASSERT_EQ(alone[d], whole[d]);
}

TEST(RowsCpu, GathersRowsOfAnyType) {
  std::mt19937 random(6);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    Weights table(random, dtype, 91 * 33);
    std::vector<std::int32_t> index(150);
    for (std::int32_t& row : index) row = static_cast<std::int32_t>(random() % 91);
    index[0] = 90;
    std::vector<float> out(index.size() * 33);
    cpu::gather_rows(tensor_ref(table.data(), dtype, 91, 33),
                     TensorView<const std::int32_t, 1>(index.data(), index.size()), matrix(out, 150, 33));
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_EQ(out[i], table.exact[static_cast<std::size_t>(index[i / 33]) * 33 + i % 33]);
    }
  }
}

TEST(RowsCpu, SiluMulMatchesDoublePrecision) {
  std::mt19937 random(7);
  for (const int ffn : {704, 5, 64}) {
    const int tokens = 9;
    std::vector<float> gate_up = random_floats(random, static_cast<std::size_t>(tokens * 2 * ffn), -20.0F, 20.0F);
    gate_up[0] = 0.0F;
    gate_up[1] = -200.0F;  // e^200 is beyond fp32: silu is 0 there
    gate_up[2] = 200.0F;
    gate_up[3] = -88.5F;
    std::vector<float> out(static_cast<std::size_t>(tokens * ffn));
    cpu::silu_mul(matrix(gate_up, tokens, 2 * ffn), matrix(out, tokens, ffn));
    std::vector<double> expected;
    std::vector<double> bound;
    for (int t = 0; t < tokens; ++t) {
      for (int d = 0; d < ffn; ++d) {
        const double gate = gate_up[static_cast<std::size_t>(t * 2 * ffn + d)];
        const double up = gate_up[static_cast<std::size_t>(t * 2 * ffn + ffn + d)];
        expected.push_back(gate / (1.0 + std::exp(-gate)) * up);
        // 2 ulp of the exponential, then a sum, a quotient and a product. Past e^88.7 the sum is infinite or the
        // quotient subnormal, and an absolute error below the smallest normal number remains.
        bound.push_back(7 * kRoundF32 * std::abs(expected.back()) + 200.0 * 0x1p-126);
      }
    }
    expect_within(out, expected, bound, "silu_mul, ffn " + std::to_string(ffn));
  }
}

// By hand: the 8B model's gate and up for one token, and small operations on [3, 10].
TEST(Costs, CountEachByteOnce) {
  const Cost product = linear_cost(DType::kBf16, DType::kF32, 1, 28672, 4096);
  EXPECT_EQ(product.bytes, 2 * 28672LL * 4096 + 2 * 4096 + 4 * 28672);
  EXPECT_EQ(product.flops, 2 * 28672LL * 4096);
  EXPECT_EQ(rms_norm_cost(DType::kBf16, 3, 10).bytes, 2 * (30 + 30 + 10));
  EXPECT_EQ(add_rms_norm_cost(DType::kBf16, 3, 10).bytes, 2 * (30 + 30 + 30 + 30 + 10));
  EXPECT_EQ(gather_rows_cost(DType::kF16, 3, 10).bytes, 2 * (30 + 30) + 3 * 4);
  EXPECT_EQ(silu_mul_cost(DType::kF32, 3, 10).bytes, 4 * (60 + 30));
}

}  // namespace
}  // namespace vesper
