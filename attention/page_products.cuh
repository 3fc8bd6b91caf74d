// What kernels that score pages by their bounds share: queries as they meet the two rows of a page.
#pragma once

#include <type_traits>

#include "attention/mma.cuh"

namespace vesper::cuda {

// Eight channels of a head as they meet low (the lesser of each and 0) or high (the greater).
template <typename T>
__device__ uint4 one_sign(uint4 channels, bool high) {
  using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
  auto* pairs = reinterpret_cast<Pair*>(&channels);
  const Pair zero = [] {
    if constexpr (std::is_same_v<T, bf16>) {
      return __float2bfloat162_rn(0.0F);
    } else {
      return __float2half2_rn(0.0F);
    }
  }();
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = high ? __hmax2(pairs[i], zero) : __hmin2(pairs[i], zero);
  return channels;
}

}  // namespace vesper::cuda
