// A weight in 4 bits (models/int4.h) for the products of models/gemv.cuh.
//
// kCells = 1: a tile is the 16 rows of one cell, low rows 0 ... 7 and high rows 8 ... 15. kCells = 2: low and high rows
// are the sixteens of two cells, for partners that lie a multiple of 16 rows apart, and where x is read for more rows
// at a time. A chunk is two spans; the cells of neighbouring spans are neighbours in memory, so that it is kCells runs
// of 2112 bytes. A row's sum is the same either way.
//
// Codes less 8 are exact in either type, and so are their products with x in the tensor cores; a span's sum is fp32 and
// is multiplied by the row's scale once. The order of all sums depends on the columns only.
//
// From code to number: the lowest 8 bits of a bf16 (11 of an f16), all others being 0, are an integer in units of the
// least subnormal, since the smallest normal numbers have the same spacing. A code under a mask is thus a number as it
// is, 16 times it one place of the word further up, and one multiplication and addition, exact, brings either to
// (code - 8) units of 2^-6 (f16: 2^-9), which a row's sum is freed of at its end: a factor that takes a subnormal to 1
// is none of the type's. Masks fetch two columns at once, as the layout has column 2 p + 1 sixteen bits above column
// 2 p. 9 instructions for 8 weights of a lane. Before that codes were OR-ed into the mantissa of a power of two (Kim,
// Henry, Fahim, Awadalla, "Who Says Elephants Can't Run", arXiv 2211.10017, there to f16), which is 15: a shift for
// each pair but one, as bf16 has 7 bits of mantissa, and a second operation of logic, as one has room for one constant.
#pragma once

#include <type_traits>

#include "models/gemv.cuh"

namespace vesper::cuda {

// a * b + c on pairs of 16-bit numbers, rounded once.
template <typename T>
__device__ unsigned fma_pair(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

// Codes that make up 1 in what widen_codes puts out.
template <typename T>
inline constexpr float kCodesPerUnit = std::is_same_v<T, bf16> ? 64.0F : 512.0F;

// The eight codes of a word less 8, divided by kCodesPerUnit: columns 2 p and 2 p + 1 in pair[p].
template <typename T>
__device__ void widen_codes(unsigned word, unsigned (&pair)[4]) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  constexpr unsigned kLow = kBf16 ? 0x7F007F00U : 0x78007800U;         // 2^127; 2^15
  constexpr unsigned kHigh = kBf16 ? 0x7D007D00U : 0x68006800U;        // a sixteenth of it
  constexpr unsigned kMinusEight = kBf16 ? 0xBE00BE00U : 0xA400A400U;  // -8 / 64; -8 / 512
#pragma unroll
  for (int p = 0; p < 4; p += 2) {
    const unsigned two = word >> (4 * p);
    pair[p] = fma_pair<T>(two & 0x000F000FU, kLow, kMinusEight);
    pair[p + 1] = fma_pair<T>(two & 0x00F000F0U, kHigh, kMinusEight);
  }
}

template <typename Element, int kCells>
struct StreamedInt4 {
  using T = Element;
  static constexpr int kBand = 8 * kCells;
  static constexpr int kSpans = 2;  // of a chunk
  static constexpr int kChunk = kSpans * kInt4SpanColumns;
  static constexpr int kRuns = kCells;
  static constexpr int kRunBytes = kSpans * kInt4CellBytes;

  const std::byte* data = nullptr;
  int rows = 0;
  int columns = 0;
  TileRows tile_rows = {};

  struct Sums {
    float cell[kCells][4] = {};
    __device__ float total(int c, int i) const { return kCodesPerUnit<T> * cell[c][i]; }
  };

  __device__ int spans() const { return (columns + kInt4SpanColumns - 1) / kInt4SpanColumns; }

  // Cells beyond the last are read as the last.
  __device__ const std::byte* run(int tile, int r) const {
    const int bands = (rows + kInt4CellRows - 1) / kInt4CellRows;
    const int band = (tile_rows.low<kBand>(tile) + r * tile_rows.high_offset) / kInt4CellRows;
    return data + static_cast<std::int64_t>(min(band, bands - 1)) * spans() * kInt4CellBytes;
  }
  __device__ int run_bytes(int chunk) const { return max(0, min(kSpans, spans() - chunk * kSpans)) * kInt4CellBytes; }

  __device__ void multiply(const unsigned char* stage, int chunk, const uint4 (&octets)[kChunk / 32],
                           Sums& sums) const {
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      // Behind the last span x is zero, codes are some number or other, and scales might be none.
      const bool inside = chunk * kSpans + s < spans();
#pragma unroll
      for (int c = 0; c < kCells; ++c) {
        multiply_cell(stage + c * kRunBytes + s * kInt4CellBytes, inside, octets + 4 * s, sums.cell[c]);
      }
    }
  }

 private:
  // sum[i] += the scaled products of one cell; i as in the fragment D, tokens across.
  static __device__ void multiply_cell(const unsigned char* cell, bool inside, const uint4* octets, float (&sum)[4]) {
    const uint4 low = *reinterpret_cast<const uint4*>(cell + 16 * this_lane());
    const uint4 high = *reinterpret_cast<const uint4*>(cell + kInt4CodesBytes / 2 + 16 * this_lane());
    const unsigned scales =
        inside ? *reinterpret_cast<const unsigned*>(cell + kInt4CodesBytes + this_lane() / 4 * 4) : 0U;
    const unsigned low_words[4] = {low.x, low.y, low.z, low.w};
    const unsigned high_words[4] = {high.x, high.y, high.z, high.w};
    float even[4] = {};  // of an octet's two mma: half as long a chain of dependent ones
    float odd[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      unsigned upper[4];  // row g
      unsigned lower[4];  // row g + 8
      widen_codes<T>(low_words[k], upper);
      widen_codes<T>(high_words[k], lower);
      multiply_add<T>(even, {upper[0], lower[0], upper[1], lower[1]}, octets[k].x, octets[k].y);
      multiply_add<T>(odd, {upper[2], lower[2], upper[3], lower[3]}, octets[k].z, octets[k].w);
    }
    const float2 scale = widen_pair<f16>(scales);
    sum[0] += scale.x * (even[0] + odd[0]);
    sum[1] += scale.x * (even[1] + odd[1]);
    sum[2] += scale.y * (even[2] + odd[2]);
    sum[3] += scale.y * (even[3] + odd[3]);
  }
};

}  // namespace vesper::cuda
