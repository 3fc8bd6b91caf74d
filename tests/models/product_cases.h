// What the tests of products on CUDA share, whatever the weight is stored in: their cases, the CPU's product in f32,
// and the check of integers.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "models/linear.h"

namespace vesper {

struct ProductShape {
  std::int64_t tokens, columns, rows;
};

// out [tokens, rows] = x [tokens, columns] W^T, W [rows, columns].
struct ProductCase {
  DType dtype;
  DType out_dtype;
  std::int64_t tokens;
  std::int64_t columns;
  std::int64_t rows;
  std::int64_t offset = 0;  // of tensors of 16-bit elements, in elements

  [[nodiscard]] std::string text() const {
    return std::string(dtype_name(dtype)) + " to " + std::string(dtype_name(out_dtype)) + ", " +
           std::to_string(tokens) + " tokens, " + std::to_string(columns) + " columns, " + std::to_string(rows) +
           " rows, offset " + std::to_string(offset);
  }
};

// `shapes`, all tokens from 1 to past the GEMV's limit on one shape, and 30 random shapes of up to `most_tokens`; each
// in both types and both outputs.
inline std::vector<ProductCase> product_cases(std::vector<ProductShape> shapes, std::int64_t most_tokens) {
  for (std::int64_t tokens = 1; tokens <= 12; ++tokens) shapes.push_back({tokens, 192, 80});
  std::mt19937 random(5);
  const auto any = [&](std::int64_t most) { return std::uniform_int_distribution<std::int64_t>(1, most)(random); };
  for (int i = 0; i < 30; ++i) {
    shapes.push_back({any(most_tokens), any(2) == 1 ? any(900) : 8 * any(200), any(600)});
  }
  std::vector<ProductCase> all;
  for (const ProductShape& shape : shapes) {
    for (const DType dtype : {DType::kBf16, DType::kF16}) {
      for (const DType out : {dtype, DType::kF32}) {
        all.push_back({dtype, out, shape.tokens, shape.columns, shape.rows});
      }
    }
  }
  return all;
}

inline std::vector<float> product_on_cpu(const ProductCase& c, const std::vector<float>& x, std::vector<float> weight) {
  std::vector<float> out(static_cast<std::size_t>(c.tokens * c.rows));
  const LinearWeight dense{.blocks = {tensor_ref(weight.data(), DType::kF32, c.rows, c.columns)}, .count = 1};
  cpu::linear(TensorView<const float, 2>(x.data(), c.tokens, c.columns), dense,
              TensorView<float, 2>(out.data(), c.tokens, c.rows));
  return out;
}

// `count` integers from `least` to `most`. Sums of their products below 2^24 are exact in fp32 in any order, so that
// nothing but the output's rounding may differ between devices: a wrong index shows as a wrong bit.
inline std::vector<float> random_integers(std::mt19937& random, std::int64_t count, int least, int most) {
  std::uniform_int_distribution<int> uniform(least, most);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(uniform(random));
  return values;
}

// Of a product [tokens, rows] every bit.
inline void expect_same_product(const ProductCase& c, const std::vector<float>& found,
                                const std::vector<float>& expected) {
  ASSERT_EQ(found.size(), expected.size()) << c.text();
  std::size_t wrong = 0;
  std::size_t first = 0;
  for (std::size_t i = expected.size(); i-- > 0;) {
    if (found[i] == expected[i]) continue;
    ++wrong;
    first = i;
  }
  EXPECT_EQ(wrong, 0U) << c.text() << ": first at token " << static_cast<std::int64_t>(first) / c.rows << ", row "
                       << static_cast<std::int64_t>(first) % c.rows << ": expected " << expected[first] << ", found "
                       << found[first];
}

}  // namespace vesper
