// What a warp reads of pages' bounds for tensor cores, exact or in 8 bits: 16 pages by 16 channels is the left side of
// a product, the group's heads its right side. Lane 4 r + c holds chunks of eight channels of pages r and r + 8; the
// four lanes' chunks i are 32 neighbouring channels, which in 8 bits are one span, with one scale.
//
// In 8 bits products are of f16, whatever the cache's type: a code of 7 bits and a sign is exact in it, and two
// instructions make two of them (bf16 has too few digits to do so). Queries are brought to f16 by a power of two for
// each head, so that the largest is in [2^14, 2^15): only what is below 2^-38 of that is lost, less than a sum in fp32
// keeps. The scales meet the sums in fp32.
#pragma once

#include "attention/mma.cuh"
#include "attention/select_pages.h"
#include "engine/core/numeric.cuh"
#include "kvcache/layout.h"

namespace vesper::cuda {

// One of the two.
template <typename T>
struct PageBounds {
  const T* exact = nullptr;             // [pages, kv_heads, 2, head_dim]
  const std::uint8_t* codes = nullptr;  // likewise
  const bf16* scales = nullptr;         // [pages, kv_heads, 2, spans] of the codes
};

template <typename T>
PageBounds<T> page_bounds(const LayerKv& kv, PageScore page_score) {
  if (page_score == PageScore::kMinMax) return {.exact = static_cast<const T*>(kv.bounds.data)};
  return {.codes = static_cast<const std::uint8_t*>(kv.int8_bounds.data),
          .scales = static_cast<const bf16*>(kv.int8_scales.data)};
}

// Adds products of one chunk of both pages; `query`: of the same channels, column r.
template <typename T>
__device__ void multiply_chunks(const uint4& upper, const uint4& lower, const uint4& query, float (&d)[4]) {
  const unsigned left[4] = {upper.x, lower.x, upper.y, lower.y};
  const unsigned right[4] = {upper.z, lower.z, upper.w, lower.w};
  multiply_add<T>(d, left, query.x, query.y);
  multiply_add<T>(d, right, query.z, query.w);
}

// Eight codes as f16. A byte u under the upper byte of 1024 is 1024 + u.
__device__ inline uint4 widen_codes(uint2 stored) {
  const auto pair_of = [](unsigned word, unsigned selector) {
    const unsigned pair = __byte_perm(word, 0x64646464U, selector);
    const __half2 code =
        __hsub2(*reinterpret_cast<const __half2*>(&pair), __float2half2_rn(1024.0F + static_cast<float>(kBoundZero)));
    return *reinterpret_cast<const unsigned*>(&code);
  };
  constexpr unsigned kFirstTwo = 0x4140U;  // bytes 0 and 1 of the word, one of the other operand above each
  constexpr unsigned kLastTwo = 0x4342U;
  return {pair_of(stored.x, kFirstTwo), pair_of(stored.x, kLastTwo), pair_of(stored.y, kFirstTwo),
          pair_of(stored.y, kLastTwo)};
}

// kChunks chunks of a lane's two pages. `row`: of (low, high) of a page and KV head; `channel` of it: the lane's first.
template <typename T, int kChunks, bool kInt8>
struct PageRows {
  uint4 chunk[2][kChunks];

  __device__ void read(const PageBounds<T>& from, const std::int64_t (&row)[2], int row_channels, int channel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* own = from.exact + row[half] * row_channels + channel;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) chunk[half][i] = __ldcs(reinterpret_cast<const uint4*>(own + kBoundSpan * i));
    }
  }
  __device__ void multiply(int i, const uint4& query, float (&d)[4]) const {
    multiply_chunks<T>(chunk[0][i], chunk[1][i], query, d);
  }
};
template <typename T, int kChunks>
struct PageRows<T, kChunks, true> {
  uint2 chunk[2][kChunks];
  unsigned scales[2];  // two of bf16, or one

  __device__ void read(const PageBounds<T>& from, const std::int64_t (&row)[2], int row_channels, int channel) {
    static_assert(kChunks <= 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* own = from.codes + row[half] * row_channels + channel;
      const bf16* of_spans = from.scales + (row[half] * row_channels + channel) / kBoundSpan;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) chunk[half][i] = __ldcs(reinterpret_cast<const uint2*>(own + kBoundSpan * i));
      scales[half] = kChunks == 2 ? *reinterpret_cast<const unsigned*>(of_spans) : of_spans->bits;
    }
  }
  __device__ void multiply(int i, const uint4& query, float (&d)[4]) const {
    float steps[4] = {};
    multiply_chunks<f16>(widen_codes(chunk[0][i]), widen_codes(chunk[1][i]), query, steps);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 both = widen_pair<bf16>(scales[half]);
      const float scale = i == 0 ? both.x : both.y;
      d[2 * half] = fmaf(scale, steps[2 * half], d[2 * half]);
      d[2 * half + 1] = fmaf(scale, steps[2 * half + 1], d[2 * half + 1]);
    }
  }
};

// Brings the chunks of the lane's head r to f16, and gives what sums of products with them are worth, for heads 2 c and
// 2 c + 1, which are the columns of the lane's sums. All lanes of a warp call it.
template <typename T, int kChunks>
__device__ float2 scale_queries(uint4 (&query)[kChunks]) {
  float largest = 0.0F;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    for (const unsigned pair : {query[i].x, query[i].y, query[i].z, query[i].w}) {
      const float2 values = widen_pair<T>(pair);
      largest = fmaxf(largest, fmaxf(fabsf(values.x), fabsf(values.y)));
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
  // Exponents with the bias of fp32: 2^14 over the power of two in `largest`, within normal numbers.
  const unsigned factor_exponent = min(127U + 127U + 14U - (__float_as_uint(largest) >> 23), 253U);
  const float factor = __uint_as_float(factor_exponent << 23);
  const float unit = __uint_as_float((254U - factor_exponent) << 23);
  const auto scaled = [&](unsigned pair) {
    const float2 values = widen_pair<T>(pair);
    return narrow_pair<f16>(values.x * factor, values.y * factor);
  };
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    query[i] = {scaled(query[i].x), scaled(query[i].y), scaled(query[i].z), scaled(query[i].w)};
  }
  const int column = this_lane() % 4 * 2;
  return {__shfl_sync(kAllLanes, unit, 4 * column), __shfl_sync(kAllLanes, unit, 4 * column + 4)};
}

}  // namespace vesper::cuda
