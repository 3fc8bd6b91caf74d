// What a warpgroup needs to run attention on Hopper's tensor cores: products whose operands lie in shared memory,
// copies of boxes of a tensor into it, and barriers between groups. Compute capability 9.0 only (sm_90a).
//
// Shared memory holds a matrix as columns of 128 bytes: column after column, each [rows, 64] of 16 bits with the
// 16-byte chunk c of row t at chunk c XOR (t mod 8). That is the hardware's "128-byte swizzle", and the order in which
// kvcache/layout.h stores a tile, so tiles are copied as they lie, a column at a time.
// Lane mapping of D[64, n]: warp w of the group holds rows 16 w ... 16 w + 15; in them element 4 i + j of a lane is
// d[j] of attention/mma.cuh for columns 8 i ... 8 i + 7, and an A in registers, 16 columns wide, is a[0] ... a[3]
// there. Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions";
//   "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "engine/core/bulk_copy.cuh"
#include "engine/core/dtype.h"

namespace vesper::cuda {

inline constexpr int kColumnElements = 64;  // of 16 bits
inline constexpr int kColumnBytes = 128;    // of a row
inline constexpr int kGroupThreads = 128;   // of a warpgroup

// Byte offset of the 16-byte chunk c of row t in a matrix of `rows` rows.
VESPER_HD constexpr int column_offset(int t, int c, int rows) {
  return (c / 8 * rows + t) * kColumnBytes + ((c % 8) ^ (t % 8)) * 16;
}

// Names a matrix at shared address `at`, a multiple of 1024 bytes apart from the offset of a k-step. `column_bytes`:
// from a column to the next; heeded only where K runs down the rows, else the caller adds it.
__device__ inline std::uint64_t matrix_at(unsigned at, unsigned column_bytes) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr unsigned kEightRows = 8 * kColumnBytes;
  return kSwizzle128 | std::uint64_t{kEightRows >> 4} << 32 | std::uint64_t{column_bytes >> 4} << 16 |
         (at & 0x3FFFFU) >> 4;
}

// The matrix that begins `bytes` further on, a multiple of 16.
__device__ inline std::uint64_t matrix_ahead(std::uint64_t matrix, int bytes) {
  return matrix + static_cast<std::uint64_t>(bytes >> 4);
}

// The products of a group are queued between open_products and close_products; registers that they read or write may
// not be touched until wait_products has let no more than the newest kPending groups be under way.
__device__ inline void open_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void close_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Waits for all products, and keeps the compiler from reading their sums before: as values they do not depend on
// waiting.
template <int kFloats>
__device__ void wait_sums(float (&sums)[kFloats]) {
  wait_products<0>();
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

// clang-format off
#define VESPER_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                       "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define VESPER_32(d, i) VESPER_8(d, i), VESPER_8(d, i + 8), VESPER_8(d, i + 16), VESPER_8(d, i + 24)
#define VESPER_D32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                   "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define VESPER_D64 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                   "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
                   "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
                   "%59, %60, %61, %62, %63}"
// clang-format on

// d[64, 128] (+)= a[64, 16] b[128, 16]^T, the rows of both K-wide; `add` false overwrites d.
template <typename T>
__device__ void multiply_rows(float (&d)[64], std::uint64_t a, std::uint64_t b, bool add) {
#define VESPER_MULTIPLY(type)                                                                                    \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type \
               "." type " " VESPER_D64 ", %64, %65, add, 1, 1, 0, 0;\n}"                                         \
               : VESPER_32(d, 0), VESPER_32(d, 32)                                                               \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, bf16>) {
    VESPER_MULTIPLY("bf16");
  } else {
    static_assert(std::is_same_v<T, f16>);
    VESPER_MULTIPLY("f16");
  }
#undef VESPER_MULTIPLY
}

// d[64, 64 or 128] += a[64, 16] b[16, 64 or 128], a in registers, K down the rows of b.
template <typename T, int kRegisters>
__device__ void multiply_columns(float (&d)[kRegisters], const unsigned* a, std::uint64_t b) {
  static_assert(kRegisters == 32 || kRegisters == 64);
#define VESPER_MULTIPLY_64(type)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " VESPER_D32 \
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                 \
               : VESPER_32(d, 0)                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define VESPER_MULTIPLY_128(type)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " VESPER_D64 \
               ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                  \
               : VESPER_32(d, 0), VESPER_32(d, 32)                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (kRegisters == 32 && std::is_same_v<T, bf16>) {
    VESPER_MULTIPLY_64("bf16");
  } else if constexpr (kRegisters == 32) {
    VESPER_MULTIPLY_64("f16");
  } else if constexpr (std::is_same_v<T, bf16>) {
    VESPER_MULTIPLY_128("bf16");
  } else {
    VESPER_MULTIPLY_128("f16");
  }
#undef VESPER_MULTIPLY_64
#undef VESPER_MULTIPLY_128
}
#undef VESPER_8
#undef VESPER_32
#undef VESPER_D32
#undef VESPER_D64

// Makes this thread's writes to shared memory visible to products and copies of boxes.
__device__ inline void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Queues the copy of the box of a three-dimensional tensor that begins at (x, y, z) into shared memory.
__device__ inline void copy_box(unsigned to, const CUtensorMap& tensor, int x, int y, int z, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to),
      "l"(&tensor), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

// The same of tensors of two and of four dimensions. `hint`: what L2 is to do with it.
__device__ inline void copy_box(unsigned to, const CUtensorMap& tensor, int x, int y, unsigned barrier,
                                std::uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], "
      "[%4], %5;" ::"r"(to),
      "l"(&tensor), "r"(x), "r"(y), "r"(barrier), "l"(hint)
      : "memory");
}
__device__ inline void copy_box(unsigned to, const CUtensorMap& tensor, int x, int y, int z, int w, unsigned barrier,
                                std::uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, "
      "%4, %5}], [%6], %7;" ::"r"(to),
      "l"(&tensor), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "l"(hint)
      : "memory");
}

// Barriers among the threads of a few warpgroups; `id` 1 ... 15.
__device__ inline void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void pass(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Hands this warpgroup's registers back, or takes more; numbers a thread.
template <int kRegisters>
__device__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace vesper::cuda
