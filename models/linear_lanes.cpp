// The CPU product in registers: a block of kTokens x kRows sums, eight lanes each, runs down the columns, and each
// weight is loaded and widened once for the block's tokens. Compiled twice; see engine/core/lanes.h.
//
// Blocks: AVX2 has 16 registers, so 6 tokens x 2 rows are 12 sums, 2 weights, 1 token and 1 product; the baseline's are
// half as wide, so 2 x 2. Fewer tokens take more rows, whose independent sums hide the latency of the addition while
// the weights stream by.
#include "models/linear_lanes.h"

#include "engine/core/lanes.h"

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

// The block of sums at token t, row r.
template <typename Weight, int kTokens, int kRows>
[[gnu::always_inline]] inline void multiply_block(const LinearTile& tile, std::int64_t t, std::int64_t r) {
  using Element = typename Weight::Element;
  const std::int64_t columns = tile.columns;
  const float* x = tile.x + t * columns;
  const Element* weight = static_cast<const Element*>(tile.weight) + r * columns;
  f32x8 sum[kTokens][kRows] = {};
  std::int64_t c = 0;
  for (; c + 8 <= columns; c += 8) {
    if constexpr (kTokens < kBlockTokens) prefetch_next_rows<kRows>(weight, columns, c);
    f32x8 w[kRows];
    for (int j = 0; j < kRows; ++j) w[j] = Weight::load8(weight + j * columns + c);
    for (int i = 0; i < kTokens; ++i) {
      const f32x8 token = load(x + i * columns + c);
      for (int j = 0; j < kRows; ++j) sum[i][j] += token * w[j];
    }
  }
  if (c < columns) {
    const auto left = static_cast<int>(columns - c);
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
      const f32x8 w = load_some(weight + j * columns + c, left, Weight::load8);
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) sum[i][j] += load_some(x + i * columns + c, left, load) * w;
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
template <typename Weight, int kTokens, int kRows>
void multiply_tokens(const LinearTile& tile, std::int64_t t) {
  std::int64_t r = 0;
  for (; r + kRows <= tile.rows; r += kRows) multiply_block<Weight, kTokens, kRows>(tile, t, r);
  for (; r < tile.rows; ++r) multiply_block<Weight, kTokens, 1>(tile, t, r);
}

template <typename Weight>
void multiply_typed(const LinearTile& tile) {
  std::int64_t t = 0;
  for (; t + kBlockTokens <= tile.tokens; t += kBlockTokens) multiply_tokens<Weight, kBlockTokens, 2>(tile, t);
  switch (tile.tokens - t) {
    case 1:
      return multiply_tokens<Weight, 1, kRowsOfOneToken>(tile, t);
    case 2:
      return multiply_tokens<Weight, 2, kRowsOfOneToken / 2>(tile, t);
    case 3:
      return multiply_tokens<Weight, 3, 2>(tile, t);
    case 4:
      return multiply_tokens<Weight, 4, 2>(tile, t);
    case 5:
      return multiply_tokens<Weight, 5, 2>(tile, t);
    default:
      return;
  }
}

}  // namespace

void multiply(const LinearTile& tile) {
  if (tile.dtype == DType::kF32) multiply_typed<WeightF32>(tile);
  if (tile.dtype == DType::kBf16) multiply_typed<WeightBf16>(tile);
  if (tile.dtype == DType::kF16) multiply_typed<WeightF16>(tile);
}

}  // namespace vesper::cpu::VESPER_LANES
