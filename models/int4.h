// Matrices of 4-bit weights: what `--weights int4` holds instead of a checkpoint's own, and how it is made.
//
// Round to nearest, symmetric: the 128 columns of a span of a row share one fp16 scale,
//   e     = the weight of largest magnitude (of two that are equal in magnitude the negative one)
//   scale = e / -8, rounded to fp16
//   code  = clamp(round(w / scale), -8, 7) + 8, round to nearest even;  weight = scale * (code - 8)
// so that e takes the code that has no mirror image, -8, whatever its sign. That costs 4.125 bits a weight. What else
// was tried, with its error, is in docs/weights.md. A span with a weight that is no number, or one beyond what fp16
// scales reach (8 * 65504), gets the scale NaN and so shows in the logits.
//
// Layout, the same on every device: rows in sixteens, columns in spans; one cell of 1056 bytes holds 16 rows x 1 span,
// and the cells of the same rows follow each other. In a cell,
//   codes   [16 rows, 16 words]: word 4 (o mod 4) + o / 4 of a row holds its columns 8 o ... 8 o + 7; column 2 p lies
//           in bits 4 p ... 4 p + 3, column 2 p + 1 sixteen bits above
//   scales  [8, 2] fp16: of rows g and g + 8
// Made for models/gemv_int4.cuh: 16 bytes of a row are what one lane of a warp needs of a span, a warp's loads are
// contiguous, and one mask makes two neighbouring columns of a 16-bit pair. Columns and rows beyond the matrix, up to
// the end of a cell, are weights of zero: code 8; scales of absent rows are 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/core/exec.h"
#include "engine/core/tensor.h"

namespace vesper {

inline constexpr int kInt4SpanColumns = 128;
inline constexpr int kInt4CellRows = 16;
inline constexpr int kInt4RowWords = kInt4SpanColumns / 8;
inline constexpr int kInt4RowBytes = 4 * kInt4RowWords;
inline constexpr int kInt4CodesBytes = kInt4CellRows * kInt4RowBytes;
inline constexpr int kInt4CellBytes = kInt4CodesBytes + 2 * kInt4CellRows;

// Always inlined: files that are compiled for several instruction sets use them too (engine/core/lanes.h).
// The word of a row of a cell that holds columns 8 * octet ... 8 * octet + 7 of the span.
[[gnu::always_inline]] VESPER_HD constexpr int int4_word(int octet) {
  return octet % 4 * 4 + octet / 4;
}
// Where in that word column 8 * octet + i lies.
[[gnu::always_inline]] VESPER_HD constexpr int int4_shift(int i) {
  return i / 2 * 4 + i % 2 * 16;
}
// The place of a cell's row among its scales.
[[gnu::always_inline]] VESPER_HD constexpr int int4_scale(int row) {
  return row % 8 * 2 + row / 8;
}

// A view of a matrix [rows, columns] in this format. `data` is aligned to 16 bytes.
struct Int4Matrix {
  std::byte* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t columns = 0;

  [[nodiscard]] std::int64_t spans() const { return (columns + kInt4SpanColumns - 1) / kInt4SpanColumns; }
  // Of the cells of sixteen rows, from one sixteen to the next.
  [[nodiscard]] std::int64_t band_bytes() const { return spans() * kInt4CellBytes; }
  [[nodiscard]] std::int64_t bytes() const { return (rows + kInt4CellRows - 1) / kInt4CellRows * band_bytes(); }
};

// Quantises rows first_row, first_row + 1, ... of `out` from `from` [n, out.columns] (f32, bf16 or f16, dense, at any
// address that suits its type). The same bits on CPU and CUDA. Rows that no call writes stay as they are.
void quantise_int4(const Exec& exec, const TensorRef& from, std::int64_t first_row, const Int4Matrix& out);

// Gives the rows that fill up the last cells of `matrix` their zeros; quantise_int4 writes all others.
void clear_int4_padding(const Exec& exec, const Int4Matrix& matrix);

// out [n, matrix.columns] = rows first_row ... first_row + n - 1 (first_row a multiple of 16), each weight rounded to
// the type of `out` (f32, which is exact, bf16 or f16).
void dequantise_int4(const Exec& exec, const Int4Matrix& matrix, std::int64_t first_row, const TensorRef& out);

namespace cpu {
void quantise_int4(const TensorRef& from, std::int64_t first_row, const Int4Matrix& out);
void clear_int4_padding(const Int4Matrix& matrix);
void dequantise_int4(const Int4Matrix& matrix, std::int64_t first_row, const TensorRef& out);
}  // namespace cpu
namespace cuda {
void quantise_int4(const Exec& exec, const TensorRef& from, std::int64_t first_row, const Int4Matrix& out);
void clear_int4_padding(const Exec& exec, const Int4Matrix& matrix);
void dequantise_int4(const Exec& exec, const Int4Matrix& matrix, std::int64_t first_row, const TensorRef& out);
}  // namespace cuda

}  // namespace vesper
