// The CPU product in registers: a block of kTokens x kRows sums, eight lanes each, runs down the columns, and each
// weight is loaded and widened once for the block's tokens. Compiled twice; see engine/core/lanes.h.
//
// Blocks: AVX2 has 16 registers, so 6 tokens x 2 rows are 12 sums, 2 weights, 1 token and 1 product; the baseline's are
// half as wide, so 2 x 2. Fewer tokens take more rows, whose independent sums hide the latency of the addition while
// the weights stream by.
#include "models/linear_lanes.h"

#include "engine/core/lanes.h"
#include "models/int4.h"

namespace vesper::cpu::VESPER_LANES {
namespace {

#ifdef __AVX2__
constexpr int kBlockTokens = 6;
constexpr int kRowsOfOneToken = 8;
#else
constexpr int kBlockTokens = 2;
constexpr int kRowsOfOneToken = 4;
#endif

struct WeightF32 {
  using Element = float;
  VESPER_INLINE f32x8 load8(const Element* from) { return load(from); }
};
struct WeightBf16 {
  using Element = std::uint16_t;
  VESPER_INLINE f32x8 load8(const Element* from) { return load_bf16(from); }
};
struct WeightF16 {
  using Element = std::uint16_t;
  VESPER_INLINE f32x8 load8(const Element* from) { return load_f16(from); }
};

// While a few tokens are multiplied by some rows, the weights of as many rows after them, which lie next in memory, are
// asked for: rows of a small model are too short for the hardware to see a stream in. One step of 8 columns asks for as
// many bytes as it reads; into the first-level cache where the rows fill no more than half of it, else the second.
template <int kRows, typename Element>
VESPER_INLINE void prefetch_next_rows(const Element* weight, std::int64_t columns, std::int64_t c) {
  constexpr std::int64_t kStepBytes = std::int64_t{kRows} * 8 * sizeof(Element);
  const bool near = columns / 8 * kStepBytes <= 16 << 10;
  const auto* next = reinterpret_cast<const char*>(weight + kRows * columns + kRows * c);
  for (std::int64_t byte = 0; byte < kStepBytes; byte += 64) {
    near ? __builtin_prefetch(next + byte, 0, 3) : __builtin_prefetch(next + byte, 0, 2);
  }
}

// A block's rows, eight columns of each at a time. The last columns of a row, fewer than eight, come with zeros.
template <typename Weight>
struct DenseRows {
  template <int kRows>
  struct Of {
    const typename Weight::Element* weight;
    std::int64_t columns;

    Of(const LinearTile& tile, std::int64_t r)
        : weight(static_cast<const typename Weight::Element*>(tile.weight) + r * tile.columns), columns(tile.columns) {}
    [[gnu::always_inline]] void prefetch(std::int64_t c) const { prefetch_next_rows<kRows>(weight, columns, c); }
    [[gnu::always_inline]] void next(std::int64_t c, f32x8 (&w)[kRows]) {
      for (int j = 0; j < kRows; ++j) w[j] = Weight::load8(weight + j * columns + c);
    }
    [[gnu::always_inline]] void last(std::int64_t c, f32x8 (&w)[kRows]) {
      for (int j = 0; j < kRows; ++j) {
        w[j] = load_some(weight + j * columns + c, static_cast<int>(columns - c), Weight::load8);
      }
    }
  };
};

// Eight 4-bit codes of a word, less 8. The bits of each stay where they are and become a float whose power of two is
// taken off, exactly, where registers hold no shift by lanes.
VESPER_INLINE f32x8 load_codes(const std::uint32_t* from) {
#ifdef __AVX2__
  using i32x8 = std::int32_t __attribute__((vector_size(32)));
  const std::uint32_t word = *from;
  const u32x8 words = {word, word, word, word, word, word, word, word};
  const u32x8 shifts = {int4_shift(0), int4_shift(1), int4_shift(2), int4_shift(3),
                        int4_shift(4), int4_shift(5), int4_shift(6), int4_shift(7)};
  const u32x8 codes = (words >> shifts) & 15U;
  return __builtin_convertvector(reinterpret_cast<i32x8>(codes) - 8, f32x8);
#else
  static_assert(int4_shift(2) == 4 && int4_shift(4) == 8 && int4_shift(6) == 12 && int4_shift(1) == 16);
  using i32x4 = std::int32_t __attribute__((vector_size(16)));
  const auto even = static_cast<std::int32_t>(*from & 0xFFFFU);
  const auto odd = static_cast<std::int32_t>(*from >> 16);
  const i32x4 halves = {even, odd, even, odd};
  const f32x4 lower = __builtin_convertvector(halves & i32x4{0xF, 0xF, 0xF0, 0xF0}, f32x4);
  const f32x4 upper = __builtin_convertvector(halves & i32x4{0xF00, 0xF00, 0xF000, 0xF000}, f32x4);
  return {lower * f32x4{1.0F, 1.0F, 0x1p-4F, 0x1p-4F} - 8.0F,
          upper * f32x4{0x1p-8F, 0x1p-8F, 0x1p-12F, 0x1p-12F} - 8.0F};
#endif
}

// Rows in 4 bits: scale * (code - 8) has 15 significant bits at most, so a weight is the same number as dequantised to
// fp32, and a sum has the same bits.
struct Int4Rows {
  template <int kRows>
  struct Of {
    static_assert(kInt4CellRows % kRows == 0);  // all in one cell
    const std::byte* cell;
    int row;  // the first, in its cell
    float scales[kInt4CellRows] = {};

    Of(const LinearTile& tile, std::int64_t r)
        : cell(static_cast<const std::byte*>(tile.weight) +
               r / kInt4CellRows * ((tile.columns + kInt4SpanColumns - 1) / kInt4SpanColumns * kInt4CellBytes)),
          row(static_cast<int>(r % kInt4CellRows)) {}
    [[gnu::always_inline]] void prefetch(std::int64_t /*c*/) const {}  // a cell's rows are a stream of their own
    [[gnu::always_inline]] void next(std::int64_t c, f32x8 (&w)[kRows]) {
      const auto octet = static_cast<int>(c % kInt4SpanColumns / 8);
      if (octet == 0) enter_span(c);
      const auto* words =
          reinterpret_cast<const std::uint32_t*>(cell) + std::int64_t{row} * kInt4RowWords + int4_word(octet);
      for (int j = 0; j < kRows; ++j, words += kInt4RowWords) w[j] = load_codes(words) * splat(scales[j]);
    }
    [[gnu::always_inline]] void last(std::int64_t c, f32x8 (&w)[kRows]) { next(c, w); }

   private:
    [[gnu::always_inline]] void enter_span(std::int64_t c) {
      if (c > 0) cell += kInt4CellBytes;
      const auto* stored = reinterpret_cast<const std::uint16_t*>(cell + kInt4CodesBytes);
      float widened[kInt4CellRows];
      store(widened, load_f16(stored));
      store(widened + 8, load_f16(stored + 8));
      for (int j = 0; j < kRows; ++j) scales[j] = widened[int4_scale(row + j)];
    }
  };
};

// The block of sums at token t, row r.
template <typename Rows, int kTokens, int kRows>
[[gnu::always_inline]] inline void multiply_block(const LinearTile& tile, std::int64_t t, std::int64_t r) {
  const std::int64_t columns = tile.columns;
  const float* x = tile.x + t * columns;
  typename Rows::template Of<kRows> rows(tile, r);
  f32x8 sum[kTokens][kRows] = {};
  std::int64_t c = 0;
  for (; c + 8 <= columns; c += 8) {
    if constexpr (kTokens < kBlockTokens) rows.prefetch(c);
    f32x8 w[kRows];
    rows.next(c, w);
    for (int i = 0; i < kTokens; ++i) {
      const f32x8 token = load(x + i * columns + c);
      for (int j = 0; j < kRows; ++j) sum[i][j] += token * w[j];
    }
  }
  if (c < columns) {
    const auto left = static_cast<int>(columns - c);
    f32x8 w[kRows];
    rows.last(c, w);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      const f32x8 token = load_some(x + i * columns + c, left, load);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) sum[i][j] += token * w[j];
    }
  }

  float* out = tile.out + t * tile.out_stride + r;
  const auto out_of = [&](int i) -> float& { return out[i / kRows * tile.out_stride + i % kRows]; };
  const auto sum_of = [&](int i) { return sum[i / kRows][i % kRows]; };
  constexpr int kSums = kTokens * kRows;
  constexpr int kFours = kSums / 4 * 4;
#pragma GCC unroll 8
  for (int i = 0; i < kFours; i += 4) {
    const f32x4 joined = join(sum_of(i), sum_of(i + 1), sum_of(i + 2), sum_of(i + 3));
    for (int j = 0; j < 4; ++j) out_of(i + j) = joined[j];
  }
#pragma GCC unroll 8
  for (int i = kFours; i < kSums; ++i) out_of(i) = join(sum_of(i));
}

// All rows for kTokens tokens.
template <typename Rows, int kTokens, int kRows>
void multiply_tokens(const LinearTile& tile, std::int64_t t) {
  std::int64_t r = 0;
  for (; r + kRows <= tile.rows; r += kRows) multiply_block<Rows, kTokens, kRows>(tile, t, r);
  for (; r < tile.rows; ++r) multiply_block<Rows, kTokens, 1>(tile, t, r);
}

template <typename Rows>
void multiply_typed(const LinearTile& tile) {
  std::int64_t t = 0;
  for (; t + kBlockTokens <= tile.tokens; t += kBlockTokens) multiply_tokens<Rows, kBlockTokens, 2>(tile, t);
  switch (tile.tokens - t) {
    case 1:
      return multiply_tokens<Rows, 1, kRowsOfOneToken>(tile, t);
    case 2:
      return multiply_tokens<Rows, 2, kRowsOfOneToken / 2>(tile, t);
    case 3:
      return multiply_tokens<Rows, 3, 2>(tile, t);
    case 4:
      return multiply_tokens<Rows, 4, 2>(tile, t);
    case 5:
      return multiply_tokens<Rows, 5, 2>(tile, t);
    default:
      return;
  }
}

}  // namespace

void multiply(const LinearTile& tile) {
  if (tile.is_int4) return multiply_typed<Int4Rows>(tile);
  if (tile.dtype == DType::kF32) multiply_typed<DenseRows<WeightF32>>(tile);
  if (tile.dtype == DType::kBf16) multiply_typed<DenseRows<WeightBf16>>(tile);
  if (tile.dtype == DType::kF16) multiply_typed<DenseRows<WeightF16>>(tile);
}

}  // namespace vesper::cpu::VESPER_LANES
