// Rows of 16-bit elements, eight at a time: 16 bytes a thread, the widest access there is, or one at a time where a row
// is not aligned.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "engine/core/numeric.cuh"

namespace vesper::cuda {

inline constexpr int kVectorWidth = 8;  // 16-bit elements of one 16-byte access

// Whether rows of `columns` 16-bit elements that start at these addresses may be read and written 16 bytes at a time.
inline bool rows_are_vectors(std::int64_t columns, std::initializer_list<const void*> rows) {
  std::uintptr_t low_bits = static_cast<std::uintptr_t>(columns) * 2;
  for (const void* row : rows) low_bits |= reinterpret_cast<std::uintptr_t>(row);
  return low_bits % 16 == 0;
}

// Begins to bring the 32 bytes around `from` into L2; nobody waits for them here.
__device__ inline void fetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// kWidth elements, widened; kWidth is kVectorWidth or 1.
template <int kWidth, typename T>
__device__ void load_widened(const T* from, float (&to)[kWidth]) {
  if constexpr (kWidth == 1) {
    to[0] = widen(*from);
  } else {
    static_assert(kWidth == kVectorWidth && sizeof(T) == 2);
    const uint4 packed = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 pair = widen_pair<T>(words[w]);
      to[2 * w] = pair.x;
      to[2 * w + 1] = pair.y;
    }
  }
}

template <int kWidth, typename T>
__device__ void store_narrowed(T* to, const float (&from)[kWidth]) {
  if constexpr (kWidth == 1) {
    *to = narrow<T>(from[0]);
  } else {
    static_assert(kWidth == kVectorWidth && sizeof(T) == 2);
    *reinterpret_cast<uint4*>(to) = {narrow_pair<T>(from[0], from[1]), narrow_pair<T>(from[2], from[3]),
                                     narrow_pair<T>(from[4], from[5]), narrow_pair<T>(from[6], from[7])};
  }
}

// Eight 16-bit elements, of which `inside` (0 or less: none) are inside their row; zero in place of the others. Where
// kAligned a row ends with a multiple of eight.
template <bool kAligned, typename T>
__device__ uint4 load_eight(const T* from, int inside) {
  if constexpr (kAligned) {
    return inside > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{};
  } else {
    unsigned word[4] = {};
#pragma unroll
    for (int i = 0; i < kVectorWidth; ++i) {
      if (i < inside) word[i / 2] |= static_cast<unsigned>(from[i].bits) << (16 * (i % 2));
    }
    return {word[0], word[1], word[2], word[3]};
  }
}

}  // namespace vesper::cuda
