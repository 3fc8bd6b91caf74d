// 4-bit weights on the CPU: the format to the bit, its error, and products with it.
#include "models/int4.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "engine/core/json.h"
#include "engine/core/lanes.h"
#include "models/linear.h"
#include "models/linear_lanes.h"
#include "models/safetensors.h"
#include "models/weight_format.h"
#include "tests/device_tensor.h"
#include "tests/models/files.h"
#include "tests/models/int4_reference.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

TEST(Int4, TakesFourAndAnEighthBits) {
  EXPECT_EQ((Int4Matrix{.rows = 4096, .columns = 14336}.bytes()), 4096LL * 14336 * 33 / 64);
  EXPECT_EQ((Int4Matrix{.rows = 17, .columns = 129}.bytes()), 4 * 1056);
  EXPECT_EQ((linear_int4_cost(DType::kBf16, DType::kF32, 2, 4096, 14336).bytes),
            4096LL * 14336 * 33 / 64 + 2 * 2 * 14336 + 4 * 2 * 4096);
}

// By hand: -8 and -4 give the scale 1, and codes from 0 on; a positive extreme gives a negative scale.
TEST(Int4, QuantisesAsItIsWorded) {
  std::vector<float> weights(2 * 128, 0.0F);
  for (int c = 0; c < 16; ++c) weights[static_cast<std::size_t>(c)] = static_cast<float>(c - 8);
  weights[100] = 2.5F;  // ties go to the even integer
  weights[101] = 3.5F;
  weights[102] = -2.5F;
  weights[103] = 7.9F;  // has no code of its own
  weights[128 + 5] = 4.0F;
  weights[128 + 6] = -4.0F * 0.99F;
  const HostInt4 made = HostInt4::quantised(weights, 2, 128);
  EXPECT_EQ(made.scale(0, 0).bits, to_f16(1.0F).bits);
  for (int c = 0; c < 16; ++c) EXPECT_EQ(made.code(0, c), c) << c;
  EXPECT_EQ(made.code(0, 100), 10);
  EXPECT_EQ(made.code(0, 101), 12);
  EXPECT_EQ(made.code(0, 102), 6);
  EXPECT_EQ(made.code(0, 103), 15);
  EXPECT_EQ(made.scale(1, 0).bits, to_f16(-0.5F).bits);
  EXPECT_EQ(made.code(1, 5), 0);
  EXPECT_EQ(made.code(1, 6), 15);
  EXPECT_EQ(made.code(1, 7), 8);
  // The fourteen rows that fill up the cell.
  for (int r = 2; r < 16; ++r) {
    EXPECT_EQ(made.code(r, 77), 8) << r;
    EXPECT_EQ(made.scale(r, 77).bits, 0) << r;
  }
}

// Against the formula, one weight at a time, for every type, short last spans, and rows that come in parts.
TEST(Int4, FollowsTheFormulaBitForBit) {
  std::mt19937 random(1);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const auto& [rows, columns] : std::vector<std::pair<int, int>>{{1, 1}, {16, 128}, {37, 300}, {64, 256}}) {
      const std::vector<float> exact = rounded(dtype, uneven_weights(random, rows, columns));
      std::vector<std::uint16_t> narrow;
      for (const float value : exact) {
        narrow.push_back(dtype == DType::kBf16 ? to_bf16(value).bits : to_f16(value).bits);
      }
      auto* data = dtype == DType::kF32 ? static_cast<void*>(const_cast<float*>(exact.data()))
                                        : static_cast<void*>(narrow.data());
      HostInt4 made(rows, columns);
      cpu::clear_int4_padding(made.matrix);
      const int first = rows / 3;
      cpu::quantise_int4(tensor_ref(data, dtype, first, columns), 0, made.matrix);
      auto* rest = static_cast<std::byte*>(data) + std::int64_t{first} * columns * dtype_bytes(dtype);
      cpu::quantise_int4(tensor_ref(rest, dtype, rows - first, columns), first, made.matrix);
      EXPECT_EQ(made.bytes, HostInt4::quantised(exact, rows, columns).bytes) << "parts against the whole, as f32";

      for (int r = 0; r < rows; ++r) {
        for (int span = 0; span < columns; span += 128) {
          const int end = std::min(columns, span + 128);
          float extreme = 0.0F;
          for (int c = span; c < end; ++c) {
            const float weight = exact[static_cast<std::size_t>(r * columns + c)];
            if (std::abs(weight) > std::abs(extreme) || weight == -std::abs(extreme)) extreme = weight;
          }
          const f16 scale = to_f16(extreme / -8.0F);
          ASSERT_EQ(made.scale(r, span).bits, scale.bits) << "row " << r << ", span from " << span;
          for (int c = span; c < span + 128; ++c) {
            const float weight = c < columns ? exact[static_cast<std::size_t>(r * columns + c)] : 0.0F;
            const float level = std::nearbyint(weight / to_float(scale));
            const int expected = static_cast<int>(std::clamp(level, -8.0F, 7.0F)) + 8;
            ASSERT_EQ(made.code(r, c), expected) << "row " << r << ", column " << c << ": " << weight;
          }
        }
      }
    }
  }
}

// Half a step, but at the end that has no code of its own, where it is a whole one.
TEST(Int4, ErrsByHalfAStep) {
  std::mt19937 random(2);
  const std::vector<float> weights = uneven_weights(random, 48, 512);
  const HostInt4 made = HostInt4::quantised(weights, 48, 512);
  for (std::int64_t r = 0; r < 48; ++r) {
    for (std::int64_t c = 0; c < 512; ++c) {
      const float weight = weights[static_cast<std::size_t>(r * 512 + c)];
      const float scale = to_float(made.scale(r, c));
      const float bound = weight / scale > 7.5F ? 1.0F : 0.5F;
      // The scale's own rounding moves level 8 by 8 * 2^-11.
      ASSERT_LE(std::abs(weight - made.value(r, c)), std::abs(scale) * (bound + 0x1p-8F)) << r << ", " << c;
    }
  }
}

// Root mean square of a quantiser's error over that of the weights, over all matrices of the demo model's layers.
// quantise(span of weights) -> the numbers they become
template <typename Quantise>
double error_on_the_demo_model(const Quantise& quantise) {
  const SafetensorsFile file(source_dir() + "/configs/demo/model.safetensors");
  double error = 0.0;
  double square = 0.0;
  for (const auto& [name, stored] : file.tensors()) {
    if (stored.shape.size() != 2 || name.find("layers") == std::string::npos) continue;
    for (std::int64_t r = 0; r < stored.shape[0]; ++r) {
      for (std::int64_t begin = 0; begin < stored.shape[1]; begin += kInt4SpanColumns) {
        std::vector<float> span;
        for (std::int64_t c = begin; c < std::min(stored.shape[1], begin + kInt4SpanColumns); ++c) {
          bf16 weight{};
          std::memcpy(&weight, stored.data + 2 * (r * stored.shape[1] + c), 2);
          span.push_back(to_float(weight));
        }
        const std::vector<float> made = quantise(span);
        for (std::size_t i = 0; i < span.size(); ++i) {
          error += std::pow(static_cast<double>(made[i]) - static_cast<double>(span[i]), 2.0);
          square += std::pow(static_cast<double>(span[i]), 2.0);
        }
      }
    }
  }
  return std::sqrt(error / square);
}

// Steps of `scale` from `zero` on, from code `least` to `least` + 15.
std::vector<float> in_steps(const std::vector<float>& span, float scale, float zero, float least) {
  std::vector<float> made;
  for (const float weight : span) {
    const float level = std::nearbyint((weight - zero) / scale);
    made.push_back(std::clamp(level, least, least + 15.0F) * scale + zero);
  }
  return made;
}

// The figures of docs/weights.md, which the choice of the format rests on.
TEST(Int4, ErrsOnTheDemoModelAsDocumented) {
  const double chosen = error_on_the_demo_model([](const std::vector<float>& span) {
    return HostInt4::quantised(span, 1, static_cast<std::int64_t>(span.size())).values();
  });
  const double sevenths = error_on_the_demo_model([](const std::vector<float>& span) {
    float largest = 0.0F;
    for (const float weight : span) largest = std::max(largest, std::abs(weight));
    return in_steps(span, to_float(to_f16(largest / 7.0F)), 0.0F, -8.0F);
  });
  const double zero_point = error_on_the_demo_model([](const std::vector<float>& span) {
    const auto [least, most] = std::minmax_element(span.begin(), span.end());
    const float zero = to_float(to_f16(*least));
    return in_steps(span, to_float(to_f16((*most - zero) / 15.0F)), zero, 0.0F);
  });
  EXPECT_NEAR(chosen, 0.1095, 0.0001);
  EXPECT_NEAR(sevenths, 0.1244, 0.0001);
  EXPECT_NEAR(zero_point, 0.1063, 0.0001);
}

TEST(Int4, ShowsWhatIsNoNumber) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {std::nanf(""), -std::nanf(""), infinity, -infinity, 1e30F, 8.1F * 65504.0F}) {
    std::vector<float> weights(3 * 256, 0.25F);
    weights[256 + 130] = bad;
    const HostInt4 made = HostInt4::quantised(weights, 3, 256);
    EXPECT_EQ(made.scale(1, 128).bits, 0x7E00) << bad;
    EXPECT_TRUE(std::isnan(made.value(1, 255))) << bad;
    EXPECT_EQ(made.value(1, 127), 0.25F) << bad;
    EXPECT_EQ(made.value(2, 130), 0.25F) << bad;
  }
  // Weights below the smallest scale, and none at all, are zeros.
  for (const float small : {0.0F, -0.0F, 1e-7F, -1e-30F, 1e-42F}) {
    const HostInt4 made = HostInt4::quantised(std::vector<float>(128, small), 1, 128);
    for (int c = 0; c < 128; ++c) ASSERT_EQ(made.value(0, c), 0.0F) << small;
  }
}

TEST(Int4, DequantisesWithOneRounding) {
  std::mt19937 random(3);
  for (const auto& [rows, columns] : std::vector<std::pair<int, int>>{{50, 200}, {16, 128}, {3, 7}}) {
    const HostInt4 made = HostInt4::quantised(uneven_weights(random, rows, columns), rows, columns);
    const std::vector<float> exact = made.values();
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      for (const int first : {0, 16, 32}) {
        if (first >= rows) continue;
        std::vector<float> out(static_cast<std::size_t>((rows - first) * columns));
        std::vector<std::uint16_t> narrow(out.size());
        void* data = dtype == DType::kF32 ? static_cast<void*>(out.data()) : static_cast<void*>(narrow.data());
        cpu::dequantise_int4(made.matrix, first, tensor_ref(data, dtype, rows - first, columns));
        const std::vector<float> expected =
            rounded(dtype, std::span(exact).subspan(static_cast<std::size_t>(first * columns)));
        for (std::size_t i = 0; i < out.size(); ++i) {
          const float found = dtype == DType::kF32    ? out[i]
                              : dtype == DType::kBf16 ? to_float(bf16{narrow[i]})
                                                      : to_float(f16{narrow[i]});
          ASSERT_EQ(found, expected[i]) << dtype_name(dtype) << ", element " << i << " from row " << first;
        }
      }
    }
  }
}

// The product with 4-bit weights is the product with the same weights in fp32, to the bit: each of them is exact there.
TEST(LinearInt4Cpu, IsTheProductWithTheSameWeightsDequantised) {
  std::mt19937 random(4);
  for (const auto& [rows, columns] :
       std::vector<std::pair<int, int>>{{16, 128}, {1, 1}, {7, 5}, {40, 131}, {65, 256}, {703, 96}, {33, 704}}) {
    const HostInt4 made = HostInt4::quantised(uneven_weights(random, rows, columns), rows, columns);
    std::vector<float> dense = made.values();
    LinearWeight packed;
    packed.int4 = made.matrix;
    EXPECT_EQ(packed.rows(), rows);
    EXPECT_EQ(packed.columns(), columns);
    const LinearWeight same{.blocks = {tensor_ref(dense.data(), DType::kF32, rows, columns)}, .count = 1};
    for (const int tokens : {1, 2, 3, 4, 5, 6, 13, 97}) {
      const std::vector<float> x = random_floats(random, static_cast<std::size_t>(tokens * columns));
      std::vector<float> found(static_cast<std::size_t>(tokens * rows), NAN);
      std::vector<float> expected(found);
      const TensorView<const float, 2> input(x.data(), tokens, columns);
      cpu::linear(input, packed, TensorView<float, 2>(found.data(), tokens, rows));
      cpu::linear(input, same, TensorView<float, 2>(expected.data(), tokens, rows));
      for (std::size_t i = 0; i < found.size(); ++i) {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(found[i]), std::bit_cast<std::uint32_t>(expected[i]))
            << rows << " x " << columns << ", " << tokens << " tokens, element " << i;
      }
    }
  }
}

TEST(LinearInt4Lanes, BothBuildsGiveTheSameBits) {
  if (!cpu::has_avx2()) GTEST_SKIP() << "this machine has no AVX2";
  std::mt19937 random(5);
  for (const int columns : {128, 300, 5}) {
    const int rows = 50;
    const HostInt4 made = HostInt4::quantised(uneven_weights(random, rows, columns), rows, columns);
    for (int tokens = 1; tokens <= 13; ++tokens) {
      const std::vector<float> x = random_floats(random, static_cast<std::size_t>(tokens * columns));
      std::vector<float> narrow(static_cast<std::size_t>(tokens * rows), NAN);
      std::vector<float> wide(narrow);
      cpu::LinearTile tile{.x = x.data(),
                           .tokens = tokens,
                           .columns = columns,
                           .weight = made.bytes.data(),
                           .is_int4 = true,
                           .rows = rows,
                           .out = narrow.data(),
                           .out_stride = rows};
      cpu::baseline::multiply(tile);
      tile.out = wide.data();
      cpu::avx2::multiply(tile);
      for (std::size_t i = 0; i < wide.size(); ++i) {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(wide[i]), std::bit_cast<std::uint32_t>(narrow[i]))
            << columns << " columns, " << tokens << " tokens, element " << i;
      }
    }
  }
}

TEST(WeightFormat, IsNamed) {
  for (const WeightFormat format : {WeightFormat::kStored, WeightFormat::kInt4, WeightFormat::kInt4Head}) {
    EXPECT_EQ(weight_format_of(std::string(weight_format_name(format))), format);
  }
  for (const char* wrong : {"", "int8", "int4,", "INT4", "head"}) {
    expect_names(refusal([&] { (void)weight_format_of(wrong); }),
                 {"--weights", in_quotes(wrong), "stored, int4 or int4,head"});
  }
}

}  // namespace
}  // namespace vesper
