// Device conversions between float and the 16-bit types of engine/core/dtype.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "engine/core/dtype.h"

namespace vesper::cuda {

__device__ inline float widen(float x) {
  return x;
}
__device__ inline float widen(bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ inline float widen(f16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

// Round to nearest even.
template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline f16 narrow<f16>(float x) {
  return f16{__half_as_ushort(__float2half_rn(x))};
}

// The two halves of a packed pair; the lower address is `.x`.
template <typename T>
__device__ float2 widen_pair(unsigned packed);
template <>
__device__ inline float2 widen_pair<bf16>(unsigned packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000U)};
}
template <>
__device__ inline float2 widen_pair<f16>(unsigned packed) {
  return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}

template <typename T>
__device__ unsigned narrow_pair(float low, float high);
template <>
__device__ inline unsigned narrow_pair<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ inline unsigned narrow_pair<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

}  // namespace vesper::cuda
