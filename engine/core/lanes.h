// Eight fp32 lanes, the unit of arithmetic of the CPU half, and the exponential over them. Every operation is one IEEE
// operation a lane, so results are the same bits whatever instructions carry the lanes.
//
// Files that hold inner loops are compiled twice (vesper_lanes in configs/cmake/vesper.cmake), with VESPER_LANES naming
// the namespace of each build: `baseline` for any x86-64, `avx2` for machines with AVX2 and F16C. Such a file may call
// only what has internal linkage or lives in its own namespace: an inline function of another header could be emitted
// with AVX2 instructions and kept by the linker for all callers.
#pragma once

#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef VESPER_LANES
#define VESPER_LANES baseline
#endif

namespace vesper::cpu {

// Whether this machine runs the `avx2` builds. Asked once.
bool has_avx2();

namespace VESPER_LANES {

#define VESPER_INLINE [[gnu::always_inline]] static inline

using f32x4 = float __attribute__((vector_size(16)));
using f32x8 = float __attribute__((vector_size(32)));
using i32x8 = std::int32_t __attribute__((vector_size(32)));
using u32x8 = std::uint32_t __attribute__((vector_size(32)));
using u16x8 = std::uint16_t __attribute__((vector_size(16)));

// The same in memory, where only the elements' alignment is given.
using f32x4_in_memory = float __attribute__((vector_size(16), aligned(4), may_alias));
using f32x8_in_memory = float __attribute__((vector_size(32), aligned(4), may_alias));
using u16x8_in_memory = std::uint16_t __attribute__((vector_size(16), aligned(2), may_alias));

VESPER_INLINE f32x8 splat(float x) {
  return f32x8{x, x, x, x, x, x, x, x};
}
VESPER_INLINE f32x8 load(const float* from) {
  return *reinterpret_cast<const f32x8_in_memory*>(from);
}
VESPER_INLINE void store(float* to, f32x8 x) {
  *reinterpret_cast<f32x8_in_memory*>(to) = x;
}
VESPER_INLINE void store(float* to, f32x4 x) {
  *reinterpret_cast<f32x4_in_memory*>(to) = x;
}

// The first `count` < 8 elements as `load_eight` reads them, the other lanes zero.
template <typename T, typename Load>
VESPER_INLINE f32x8 load_some(const T* from, int count, const Load& load_eight) {
  T padded[8] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return load_eight(padded);
}
VESPER_INLINE void store_some(float* to, f32x8 x, int count) {
  for (int i = 0; i < count; ++i) to[i] = x[i];
}

// Eight 16-bit words, each in 32 bits.
VESPER_INLINE u32x8 load_u16(const std::uint16_t* from) {
#ifdef __AVX2__  // GCC 12 makes three instructions of the conversion below
  return reinterpret_cast<u32x8>(_mm256_cvtepu16_epi32(*reinterpret_cast<const __m128i_u*>(from)));
#else
  return __builtin_convertvector(*reinterpret_cast<const u16x8_in_memory*>(from), u32x8);
#endif
}

// Eight bf16: the upper halves of fp32.
VESPER_INLINE f32x8 load_bf16(const std::uint16_t* from) {
  return reinterpret_cast<f32x8>(load_u16(from) << 16);
}

// Eight f16, exactly, NaN staying NaN.
VESPER_INLINE f32x8 load_f16(const std::uint16_t* from) {
#ifdef __AVX2__
  return reinterpret_cast<f32x8>(_mm256_cvtph_ps(*reinterpret_cast<const __m128i_u*>(from)));
#else
  const u32x8 bits = load_u16(from);
  const u32x8 magnitude = bits & 0x7FFFU;
  const u32x8 shifted = magnitude << 13;
  // Exponents 1 to 30 are rebiased by 127 - 15, exponent 31 becomes 255, and a subnormal is its mantissa times 2^-24.
  const u32x8 normal = shifted + (112U << 23);
  const u32x8 special = shifted | (255U << 23);
  const u32x8 subnormal = reinterpret_cast<u32x8>(__builtin_convertvector(magnitude, f32x8) * 0x1p-24F);
  const u32x8 widened = magnitude < 0x0400U ? subnormal : (magnitude < 0x7C00U ? normal : special);
  return reinterpret_cast<f32x8>(widened | ((bits & 0x8000U) << 16));
#endif
}

VESPER_INLINE f32x8 larger(f32x8 a, f32x8 b) {
  return a > b ? a : b;
}

// Lane i plus lane i + 4.
VESPER_INLINE f32x4 fold(f32x8 x) {
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
}
// The sum of all lanes as ((0+4)+(2+6))+((1+5)+(3+7)).
VESPER_INLINE float join(f32x8 x) {
  const f32x4 folded = fold(x);
  return (folded[0] + folded[2]) + (folded[1] + folded[3]);
}
// join of four at once.
VESPER_INLINE f32x4 join(f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
  const f32x4 a4 = fold(a);
  const f32x4 b4 = fold(b);
  const f32x4 c4 = fold(c);
  const f32x4 d4 = fold(d);
  const f32x4 ab = __builtin_shufflevector(a4, b4, 0, 4, 1, 5) + __builtin_shufflevector(a4, b4, 2, 6, 3, 7);
  const f32x4 cd = __builtin_shufflevector(c4, d4, 0, 4, 1, 5) + __builtin_shufflevector(c4, d4, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
VESPER_INLINE float largest_lane(f32x8 x) {
  const f32x8 four = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  const f32x8 two = larger(four, __builtin_shufflevector(four, four, 2, 3, 0, 1, 6, 7, 4, 5));
  return two[0] > two[1] ? two[0] : two[1];
}

// e^x within 2.6 * 2^-24 relative for -87 <= x <= 88; 0 below, infinity above, NaN for NaN.
//   x = n ln 2 + r, |r| <= ln 2 / 2: n by adding 1.5 * 2^23, whose last place is 1; ln 2 in two parts, the first of 9
//   bits, so that n times it and the difference are exact. e^r = 1 + r + r^2 P(r), P of degree 4 with the least maximal
//   relative error of e^r (Remez exchange, ours): 0.4 * 2^-24 with the coefficients rounded. Roundings on the way: of
//   r 1/4, of r^2 P 1/5 and of its sum with r 1/4 in units of 2^-24, over e^r >= 0.707; the last addition 1.
VESPER_INLINE f32x8 exponential(f32x8 x) {
  const float to_integer = 0x1.8p23F;
  const f32x8 shifted = x * 0x1.715476p0F + to_integer;
  const f32x8 n = shifted - to_integer;
  const f32x8 r = (x - n * 0x1.63p-1F) - n * -0x1.bd0106p-13F;
  f32x8 p = r * 0x1.5dd1bap-10F + 0x1.11ea4ap-7F;
  p = p * r + 0x1.55641ap-5F;
  p = p * r + 0x1.5554fcp-3F;
  p = p * r + 0x1.fffff6p-2F;
  p = 1.0F + (r + (r * r) * p);
  // The low bits of `shifted` hold n: moved to the exponent they make 2^n.
  const f32x8 power = reinterpret_cast<f32x8>((reinterpret_cast<i32x8>(shifted) << 23) + (127 << 23));
  const f32x8 zero = {};
  const f32x8 inside = x > 88.0F ? splat(__builtin_inff()) : p * power;
  return x < -87.0F ? zero : inside;
}

}  // namespace VESPER_LANES
}  // namespace vesper::cpu
