// Eight fp32 lanes, the unit of arithmetic of the CPU half, and the exponential over them. Every operation is one IEEE
// operation a lane, so results are the same bits whatever instructions carry the lanes.
//
// Files that hold inner loops are compiled twice (vesper_lanes in configs/cmake/vesper.cmake), with VESPER_LANES naming
// the namespace of each build: `baseline` for any x86-64, `avx2` for machines with AVX2 and F16C. Such a file may call
// only what has internal linkage or lives in its own namespace: an inline function of another header could be emitted
// with AVX2 instructions and kept by the linker for all callers.
#pragma once

#include <cstdint>

#ifndef VESPER_LANES
#define VESPER_LANES baseline
#endif

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace vesper::cpu {

// Whether this machine runs the `avx2` builds. Asked once.
bool has_avx2();

namespace VESPER_LANES {

#define VESPER_INLINE [[gnu::always_inline]] static inline

using f32x4 = float __attribute__((vector_size(16)));
using u32x4 = std::uint32_t __attribute__((vector_size(16)));
using f32x4_in_memory = float __attribute__((vector_size(16), aligned(4), may_alias));

VESPER_INLINE void store(float* to, f32x4 x) {
  *reinterpret_cast<f32x4_in_memory*>(to) = x;
}

#ifdef __AVX2__

using f32x8 = float __attribute__((vector_size(32)));
using u32x8 = std::uint32_t __attribute__((vector_size(32)));
using f32x8_in_memory = float __attribute__((vector_size(32), aligned(4), may_alias));

VESPER_INLINE f32x8 splat(float x) {
  return f32x8{x, x, x, x, x, x, x, x};
}
VESPER_INLINE f32x8 load(const float* from) {
  return *reinterpret_cast<const f32x8_in_memory*>(from);
}
VESPER_INLINE void store(float* to, f32x8 x) {
  *reinterpret_cast<f32x8_in_memory*>(to) = x;
}
VESPER_INLINE f32x4 low(f32x8 x) {
  return __builtin_shufflevector(x, x, 0, 1, 2, 3);
}
VESPER_INLINE f32x4 high(f32x8 x) {
  return __builtin_shufflevector(x, x, 4, 5, 6, 7);
}
VESPER_INLINE f32x8 both(f32x4 low, f32x4 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
// a > b ? yes : no
VESPER_INLINE f32x8 choose_greater(f32x8 a, f32x8 b, f32x8 yes, f32x8 no) {
  return a > b ? yes : no;
}
// 2^n, n being the low bits of `x`.
VESPER_INLINE f32x8 bits_to_power(f32x8 x) {
  return reinterpret_cast<f32x8>((reinterpret_cast<u32x8>(x) << 23) + (127U << 23));
}
// Eight bf16: the upper halves of fp32.
VESPER_INLINE f32x8 load_bf16(const std::uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(from));
  return reinterpret_cast<f32x8>(reinterpret_cast<u32x8>(_mm256_cvtepu16_epi32(bits)) << 16);
}
// Eight f16, exactly.
VESPER_INLINE f32x8 load_f16(const std::uint16_t* from) {
  return reinterpret_cast<f32x8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(from))));
}

#else

// GCC keeps a vector of 32 bytes in memory where registers hold 16, hence two halves by hand.
struct f32x8 {  // NOLINT(readability-identifier-naming)
  f32x4 lower;
  f32x4 upper;
  f32x8() = default;
  f32x8(f32x4 low, f32x4 high) : lower(low), upper(high) {}
  // NOLINTNEXTLINE(google-explicit-constructor): a scalar joins in, as with vectors of the compiler
  f32x8(float x) : lower{x, x, x, x}, upper{x, x, x, x} {}
  float operator[](int i) const { return i < 4 ? lower[i] : upper[i - 4]; }
};
using u16x8 = std::uint16_t __attribute__((vector_size(16)));
using u16x8_in_memory = std::uint16_t __attribute__((vector_size(16), aligned(2), may_alias));

VESPER_INLINE f32x8 operator+(f32x8 a, f32x8 b) {
  return {a.lower + b.lower, a.upper + b.upper};
}
VESPER_INLINE f32x8 operator-(f32x8 a, f32x8 b) {
  return {a.lower - b.lower, a.upper - b.upper};
}
VESPER_INLINE f32x8 operator*(f32x8 a, f32x8 b) {
  return {a.lower * b.lower, a.upper * b.upper};
}
VESPER_INLINE f32x8 operator/(f32x8 a, f32x8 b) {
  return {a.lower / b.lower, a.upper / b.upper};
}
VESPER_INLINE f32x8 operator-(f32x8 x) {
  return {-x.lower, -x.upper};
}
VESPER_INLINE f32x8& operator+=(f32x8& a, f32x8 b) {
  return a = a + b;
}
VESPER_INLINE f32x8 splat(float x) {
  return x;
}
VESPER_INLINE f32x8 load(const float* from) {
  return {*reinterpret_cast<const f32x4_in_memory*>(from), *reinterpret_cast<const f32x4_in_memory*>(from + 4)};
}
VESPER_INLINE void store(float* to, f32x8 x) {
  store(to, x.lower);
  store(to + 4, x.upper);
}
VESPER_INLINE f32x4 low(f32x8 x) {
  return x.lower;
}
VESPER_INLINE f32x4 high(f32x8 x) {
  return x.upper;
}
VESPER_INLINE f32x8 both(f32x4 low, f32x4 high) {
  return {low, high};
}
VESPER_INLINE f32x8 choose_greater(f32x8 a, f32x8 b, f32x8 yes, f32x8 no) {
  return {a.lower > b.lower ? yes.lower : no.lower, a.upper > b.upper ? yes.upper : no.upper};
}
VESPER_INLINE f32x4 bits_to_power(f32x4 x) {
  return reinterpret_cast<f32x4>((reinterpret_cast<u32x4>(x) << 23) + (127U << 23));
}
VESPER_INLINE f32x8 bits_to_power(f32x8 x) {
  return {bits_to_power(x.lower), bits_to_power(x.upper)};
}
// Eight bf16 beside zeros: one shuffle a half makes them the upper halves of fp32.
VESPER_INLINE f32x8 load_bf16(const std::uint16_t* from) {
  const u16x8 bits = *reinterpret_cast<const u16x8_in_memory*>(from);
  const u16x8 zero = {};
  return {reinterpret_cast<f32x4>(__builtin_shufflevector(zero, bits, 0, 8, 1, 9, 2, 10, 3, 11)),
          reinterpret_cast<f32x4>(__builtin_shufflevector(zero, bits, 4, 12, 5, 13, 6, 14, 7, 15))};
}
VESPER_INLINE f32x4 widen_f16(u32x4 bits) {
  const u32x4 magnitude = bits & 0x7FFFU;
  const u32x4 shifted = magnitude << 13;
  // Exponents 1 to 30 are rebiased by 127 - 15, exponent 31 becomes 255, and a subnormal is its mantissa times 2^-24.
  const u32x4 normal = shifted + (112U << 23);
  const u32x4 special = shifted | (255U << 23);
  const u32x4 subnormal = reinterpret_cast<u32x4>(__builtin_convertvector(magnitude, f32x4) * 0x1p-24F);
  const u32x4 widened = magnitude < 0x0400U ? subnormal : (magnitude < 0x7C00U ? normal : special);
  return reinterpret_cast<f32x4>(widened | ((bits & 0x8000U) << 16));
}
VESPER_INLINE f32x8 load_f16(const std::uint16_t* from) {
  const u16x8 bits = *reinterpret_cast<const u16x8_in_memory*>(from);
  const u16x8 zero = {};
  return {widen_f16(reinterpret_cast<u32x4>(__builtin_shufflevector(bits, zero, 0, 8, 1, 9, 2, 10, 3, 11))),
          widen_f16(reinterpret_cast<u32x4>(__builtin_shufflevector(bits, zero, 4, 12, 5, 13, 6, 14, 7, 15)))};
}

#endif

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

VESPER_INLINE f32x8 larger(f32x8 a, f32x8 b) {
  return choose_greater(a, b, a, b);
}
VESPER_INLINE float largest_lane(f32x8 x) {
  const f32x4 four = low(x) > high(x) ? low(x) : high(x);
  const float even = four[0] > four[2] ? four[0] : four[2];
  const float odd = four[1] > four[3] ? four[1] : four[3];
  return even > odd ? even : odd;
}

// The sum of all lanes as ((0+4)+(2+6))+((1+5)+(3+7)).
VESPER_INLINE float join(f32x8 x) {
  const f32x4 folded = low(x) + high(x);
  return (folded[0] + folded[2]) + (folded[1] + folded[3]);
}
// join of four at once.
VESPER_INLINE f32x4 join(f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
  const f32x4 a4 = low(a) + high(a);
  const f32x4 b4 = low(b) + high(b);
  const f32x4 c4 = low(c) + high(c);
  const f32x4 d4 = low(d) + high(d);
  const f32x4 ab = __builtin_shufflevector(a4, b4, 0, 4, 1, 5) + __builtin_shufflevector(a4, b4, 2, 6, 3, 7);
  const f32x4 cd = __builtin_shufflevector(c4, d4, 0, 4, 1, 5) + __builtin_shufflevector(c4, d4, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
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
  const f32x8 inside = choose_greater(x, splat(88.0F), splat(__builtin_inff()), p * bits_to_power(shifted));
  return choose_greater(splat(-87.0F), x, splat(0.0F), inside);
}

}  // namespace VESPER_LANES
}  // namespace vesper::cpu
