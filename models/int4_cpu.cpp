// 4-bit weights on the CPU: the truth of the format; see models/int4.h.
#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstring>

#include "engine/core/dispatch.h"
#include "engine/core/parallel.h"
#include "models/int4.h"
#include "models/widen.h"

namespace vesper::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr std::uint32_t kInfinity = 0x7F800000U;
constexpr std::uint16_t kNanF16 = 0x7E00U;
constexpr std::uint16_t kInfinityF16 = 0x7C00U;
constexpr std::uint32_t kZeroWord = 0x88888888U;  // eight codes of 8

using Span = std::array<float, kInt4SpanColumns>;

// A row's place in the cell of one span.
struct CellRow {
  std::byte* codes;
  std::byte* scale;
};

CellRow cell_row(const Int4Matrix& matrix, std::int64_t row, std::int64_t span) {
  const auto within = static_cast<int>(row % kInt4CellRows);
  std::byte* cell = matrix.data + row / kInt4CellRows * matrix.band_bytes() + span * kInt4CellBytes;
  return {cell + std::int64_t{within} * kInt4RowBytes, cell + kInt4CodesBytes + std::int64_t{2} * int4_scale(within)};
}

// By magnitude, then negative before positive, NaN above all: an order of integers, so that the largest does not depend
// on who compares first.
f16 scale_of(const Span& weights) {
  std::uint32_t largest = 0;
  for (const float weight : weights) largest = std::max(largest, std::rotl(std::bit_cast<std::uint32_t>(weight), 1));
  if (largest >> 1 >= kInfinity) return f16{kNanF16};
  const f16 scale = to_f16(std::bit_cast<float>(std::rotr(largest, 1)) * -0.125F);
  return (scale.bits & kInfinityF16) == kInfinityF16 ? f16{kNanF16} : scale;
}

void quantise_span(const Span& weights, const CellRow& to) {
  const f16 scale = scale_of(weights);
  const float step = to_float(scale);
  std::array<std::uint32_t, kInt4SpanColumns> codes{};
  codes.fill(8);
  if (std::abs(step) > 0.0F) {  // neither 0 nor NaN
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
    constexpr float kToInteger = 0x1.8p23F;
    for (std::size_t c = 0; c < codes.size(); ++c) {
      const float level = std::min(std::max(weights[c] / step, -8.0F), 7.0F);
      codes[c] = std::bit_cast<std::uint32_t>(level + (kToInteger + 8.0F)) & 0xFU;
    }
  }
  std::array<std::uint32_t, kInt4RowWords> words{};
  for (int octet = 0; octet < kInt4RowWords; ++octet) {
    std::uint32_t word = 0;
    const std::uint32_t* eight = &codes[static_cast<std::size_t>(octet) * 8];
    for (int i = 0; i < 8; ++i) word |= eight[i] << int4_shift(i);
    words[static_cast<std::size_t>(int4_word(octet))] = word;
  }
  std::memcpy(to.codes, words.data(), sizeof(words));
  std::memcpy(to.scale, &scale.bits, sizeof(scale.bits));
}

}  // namespace

void quantise_int4(const TensorRef& from, std::int64_t first_row, const Int4Matrix& out) {
  assert(from.shape[1] == out.columns && first_row + from.shape[0] <= out.rows);
  parallel_for(from.shape[0], kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t span = 0; span < out.spans(); ++span) {
        const std::int64_t column = span * kInt4SpanColumns;
        Span weights{};  // zeros beyond the last column
        widen_row(from, r * out.columns + column, std::min<std::int64_t>(kInt4SpanColumns, out.columns - column),
                  weights.data());
        quantise_span(weights, cell_row(out, first_row + r, span));
      }
    }
  });
}

void clear_int4_padding(const Int4Matrix& matrix) {
  constexpr std::uint16_t kZeroScale = 0;
  for (std::int64_t row = matrix.rows; row % kInt4CellRows != 0; ++row) {
    for (std::int64_t span = 0; span < matrix.spans(); ++span) {
      const CellRow to = cell_row(matrix, row, span);
      std::memset(to.codes, kZeroWord & 0xFF, kInt4RowBytes);
      std::memcpy(to.scale, &kZeroScale, sizeof(kZeroScale));
    }
  }
}

void dequantise_int4(const Int4Matrix& matrix, std::int64_t first_row, const TensorRef& out) {
  assert(out.shape[1] == matrix.columns && first_row + out.shape[0] <= matrix.rows);
  assert(first_row % kInt4CellRows == 0);
  dispatch_float(out.dtype, "dequantise_int4", [&](auto element) {
    using T = decltype(element);
    parallel_for(out.shape[0], kRowGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        T* to = static_cast<T*>(out.data) + r * matrix.columns;
        for (std::int64_t column = 0; column < matrix.columns; ++column) {
          const CellRow from = cell_row(matrix, first_row + r, column / kInt4SpanColumns);
          const auto within = static_cast<int>(column % kInt4SpanColumns);
          std::uint32_t word = 0;
          f16 scale{};
          std::memcpy(&word, from.codes + std::int64_t{4} * int4_word(within / 8), sizeof(word));
          std::memcpy(&scale.bits, from.scale, sizeof(scale.bits));
          const int code = static_cast<int>(word >> int4_shift(within % 8) & 0xFU);
          to[column] = from_float<T>(to_float(scale) * static_cast<float>(code - 8));
        }
      }
    });
  });
}

}  // namespace vesper::cpu
