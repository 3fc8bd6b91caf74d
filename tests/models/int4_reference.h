// 4-bit weights as models/int4.h words them, one weight at a time, for tests that read or make them.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "models/int4.h"
#include "tests/paged.h"

namespace vesper {

// A host matrix in 4 bits, and its memory: bytes of 0xAA until something is written.
struct HostInt4 {
  std::vector<std::byte> bytes;
  Int4Matrix matrix;

  HostInt4(std::int64_t rows, std::int64_t columns) : matrix{.rows = rows, .columns = columns} {
    bytes.assign(static_cast<std::size_t>(matrix.bytes()), std::byte{0xAA});
    matrix.data = bytes.data();
  }
  HostInt4(const HostInt4&) = delete;
  HostInt4& operator=(const HostInt4&) = delete;
  HostInt4(HostInt4&& other) noexcept : bytes(std::move(other.bytes)), matrix(other.matrix) {}
  HostInt4& operator=(HostInt4&&) = delete;
  ~HostInt4() = default;

  // All of `values`, row by row.
  static HostInt4 quantised(const std::vector<float>& values, std::int64_t rows, std::int64_t columns) {
    HostInt4 made(rows, columns);
    std::vector<float> copy = values;
    cpu::clear_int4_padding(made.matrix);
    cpu::quantise_int4(tensor_ref(copy.data(), DType::kF32, rows, columns), 0, made.matrix);
    return made;
  }

  [[nodiscard]] const std::byte* cell(std::int64_t row, std::int64_t column) const {
    const std::int64_t spans = (matrix.columns + 127) / 128;
    return bytes.data() + (row / 16 * spans + column / 128) * 1056;
  }
  [[nodiscard]] int code(std::int64_t row, std::int64_t column) const {
    const std::int64_t octet = column % 128 / 8;
    const std::int64_t word_number = octet % 4 * 4 + octet / 4;
    std::uint32_t word = 0;
    std::memcpy(&word, cell(row, column) + row % 16 * 64 + word_number * 4, 4);
    const std::int64_t pair = column % 8 / 2;
    return static_cast<int>(word >> (4 * pair + 16 * (column % 2)) & 15);
  }
  [[nodiscard]] f16 scale(std::int64_t row, std::int64_t column) const {
    f16 found{};
    std::memcpy(&found.bits, cell(row, column) + 1024 + row % 8 * 4 + row % 16 / 8 * 2, 2);
    return found;
  }
  // scale * (code - 8), exact in fp32.
  [[nodiscard]] float value(std::int64_t row, std::int64_t column) const {
    return to_float(scale(row, column)) * static_cast<float>(code(row, column) - 8);
  }
  [[nodiscard]] std::vector<float> values() const {
    std::vector<float> all;
    for (std::int64_t r = 0; r < matrix.rows; ++r) {
      for (std::int64_t c = 0; c < matrix.columns; ++c) all.push_back(value(r, c));
    }
    return all;
  }
};

// Spans whose scales differ by orders of magnitude, as a matrix's own do.
inline std::vector<float> uneven_weights(std::mt19937& random, std::int64_t rows, std::int64_t columns) {
  std::vector<float> values = random_floats(random, static_cast<std::size_t>(rows * columns));
  std::uniform_int_distribution<int> exponent(-9, 2);
  for (std::int64_t i = 0; i < rows * columns; i += 100) {
    const float factor = std::ldexp(1.0F, exponent(random));
    for (std::int64_t j = i; j < std::min(i + 100, rows * columns); ++j) values[static_cast<std::size_t>(j)] *= factor;
  }
  return values;
}

}  // namespace vesper
