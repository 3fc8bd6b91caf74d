// d[64, kRows] += a[64, 16] b[kRows, 16]^T by a warpgroup, both in shared memory in columns of 128 bytes
// (attention/wgmma.cuh, whose fences and lane mapping hold here), for the tile heights of models/small_gemm.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/wgmma.cuh"

namespace vesper::cuda {

// clang-format off
#define VESPER_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                       "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define VESPER_16(d, i) VESPER_8(d, i), VESPER_8(d, i + 8)
#define VESPER_32(d, i) VESPER_16(d, i), VESPER_16(d, i + 16)
#define VESPER_D16 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define VESPER_D32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define VESPER_D48 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47}"
#define VESPER_D64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63}"
// Of both types; `a` and `b` are the registers behind those of d.
#define VESPER_TILE(rows, d_registers, a, b, ...)                                                                  \
  template <typename T>                                                                                            \
  __device__ void multiply_tile(float (&d)[(rows) / 2], std::uint64_t x, std::uint64_t weight) {                   \
    if constexpr (std::is_same_v<T, bf16>) {                                                                       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #rows "k16.f32.bf16.bf16 " d_registers ", " a ", " b ", 1, 1, 1, 0, 0;" \
                   : __VA_ARGS__ : "l"(x), "l"(weight));                                                           \
    } else {                                                                                                       \
      static_assert(std::is_same_v<T, f16>);                                                                       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #rows "k16.f32.f16.f16 " d_registers ", " a ", " b ", 1, 1, 1, 0, 0;" \
                   : __VA_ARGS__ : "l"(x), "l"(weight));                                                           \
    }                                                                                                              \
  }
VESPER_TILE(32, VESPER_D16, "%16", "%17", VESPER_16(d, 0))
VESPER_TILE(64, VESPER_D32, "%32", "%33", VESPER_32(d, 0))
VESPER_TILE(96, VESPER_D48, "%48", "%49", VESPER_32(d, 0), VESPER_16(d, 32))
VESPER_TILE(128, VESPER_D64, "%64", "%65", VESPER_32(d, 0), VESPER_32(d, 32))
// clang-format on

#undef VESPER_TILE
#undef VESPER_8
#undef VESPER_16
#undef VESPER_32
#undef VESPER_D16
#undef VESPER_D32
#undef VESPER_D48
#undef VESPER_D64

}  // namespace vesper::cuda
