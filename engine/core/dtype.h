// Element types, and the two 16-bit floating types as plain bits so that host and device share them.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

#ifdef __CUDACC__
#define VESPER_HD __host__ __device__
#else
#define VESPER_HD
#endif

namespace vesper {

enum class DType : std::uint8_t { kF32, kBf16, kF16, kI32, kU8 };

// Bytes of one element.
VESPER_HD constexpr std::int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBf16:
    case DType::kF16:
      return 2;
    case DType::kU8:
      return 1;
  }
  return 0;
}

// "f32", "bf16", "f16", "i32", "u8".
std::string_view dtype_name(DType dtype);

// Upper half of an IEEE binary32.
struct bf16 {
  std::uint16_t bits;
};

// IEEE binary16.
struct f16 {
  std::uint16_t bits;
};

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::kBf16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::kF16;
};
template <>
struct DTypeOf<std::int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<std::uint8_t> {
  static constexpr DType value = DType::kU8;
};

// Host conversions; exact when widening, round to nearest even when narrowing. NaN stays NaN. Device code converts
// with the CUDA intrinsics of engine/core/numeric.cuh instead, to the same values.
inline float to_float(float x) {
  return x;
}
inline float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
float to_float(f16 x);
bf16 to_bf16(float x);
f16 to_f16(float x);

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}
template <>
inline f16 from_float<f16>(float x) {
  return to_f16(x);
}

}  // namespace vesper
