// What a warp needs to run attention on tensor cores: 16-byte asynchronous copies into shared memory, 8x8 matrix loads
// and the 16 x 8 x 16 product, for bf16 and f16 alike. Compute capability 8.0 and up.
//
// Lane mapping of the fragments of D[16, 8] += A[16, 16] B[16, 8], with r = lane / 4 and c = 2 * (lane % 4); every
// register but D's holds two neighbours:
//   A  a[0] (r, c) (r, c+1)   a[1] row r + 8   a[2] column c + 8   a[3] both
//   B  b0 (c, r) (c+1, r)     b1 rows c + 8, c + 9
//   D  d[0] (r, c)  d[1] (r, c+1)  d[2] (r+8, c)  d[3] (r+8, c+1)
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"; "ldmatrix"; "cp.async".
#pragma once

#include <type_traits>

#include "engine/core/cache_hint.cuh"
#include "engine/core/numeric.cuh"
#include "kvcache/layout.h"

namespace vesper::cuda {

inline constexpr unsigned kWarpThreads = 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;
inline constexpr int kChunkElements = 8;  // of 16 bits: the 16 bytes of one asynchronous copy
inline constexpr int kChunkBytes = 16;
inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

// Of this thread. Taken from unsigned numbers: the compiler then needs no signed division.
__device__ inline int this_lane() {
  return static_cast<int>(threadIdx.x % kWarpThreads);
}
__device__ inline int this_warp() {
  return static_cast<int>(threadIdx.x / kWarpThreads);
}
// Of a vote's lanes, those before this one.
__device__ inline unsigned before_this_lane(unsigned lanes) {
  return lanes & ((1U << this_lane()) - 1U);
}

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Queues a copy of 16 bytes from device to shared memory. Where `valid` is false nothing is read and zeros are written.
__device__ inline void copy_chunk_async(unsigned to, const void* from, bool valid) {
  const int bytes = valid ? kChunkBytes : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// The same of what nobody reads again.
__device__ inline void copy_chunk_once(unsigned to, const void* from, bool valid) {
  const int bytes = valid ? kChunkBytes : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(bytes), "l"(evict_first())
               : "memory");
}

// The same for fewer bytes: 4, 8 or 16.
template <int kBytes>
__device__ inline void copy_async(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
}

// Closes the group of this thread's copies since the last call; a group may be empty.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the newest `kPending` groups of this thread have landed. Other threads see them after a barrier.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ldmatrix loads a 16 x 16 block as four 8x8 quarters, eight lanes giving the rows of one each. The order of the
// quarters decides what the four registers are:
//   kDownFirst    top left, bottom left, top right, bottom right: A of the block; with transposed quarters B of it,
//                 columns 0-7 in m[0], m[1], columns 8-15 in m[2], m[3]
//   kAcrossFirst  top left, top right, bottom left, bottom right: B of the block's transpose, split likewise
enum class Quarters { kDownFirst, kAcrossFirst };

// Where this lane points ldmatrix for the block in the corner of a tile at shared address `tile`, a multiple of the
// bytes of a row (at most 256).
template <int kHeadDim, Quarters kOrder>
__device__ inline unsigned corner_block(unsigned tile, int lane) {
  const int low = lane / 8 % 2 * 8;
  const int high = lane / 16 * 8;
  const int t = lane % 8 + (kOrder == Quarters::kDownFirst ? low : high);
  const int d = kOrder == Quarters::kDownFirst ? high : low;
  return tile + 2U * static_cast<unsigned>(tile_offset(t, d, kHeadDim));
}

// The same for the block at row t and channel d, both multiples of 16: one XOR away, as tile_offset's order is an XOR.
template <int kHeadDim>
VESPER_HD constexpr unsigned block_at(unsigned corner, int t, int d) {
  return (corner ^ static_cast<unsigned>(2 * d)) + static_cast<unsigned>(2 * t * kHeadDim);
}
template <int kHeadDim>
constexpr bool block_at_follows_tile_offset() {
  for (int i = 0; i < 32; ++i) {  // row i % 16, left or right half of the block
    const auto corner = static_cast<unsigned>(2 * tile_offset(i % 16, i / 16 * 8, kHeadDim));
    for (int t = 0; t < 64; t += 16) {
      for (int d = 0; d < kHeadDim; d += 16) {
        const int offset = tile_offset(t + i % 16, d + i / 16 * 8, kHeadDim);
        if (block_at<kHeadDim>(corner, t, d) != static_cast<unsigned>(2 * offset)) return false;
      }
    }
  }
  return true;
}
static_assert(block_at_follows_tile_offset<64>() && block_at_follows_tile_offset<128>());

// Loads the four quarters; lane 4 i + j gets elements 2 j and 2 j + 1 of row i of each.
__device__ inline void load_block(unsigned (&m)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

// The same with each quarter transposed: lane 4 i + j gets rows 2 j and 2 j + 1 of column i.
__device__ inline void load_block_transposed(unsigned (&m)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

// Transposes an 8x8 matrix of which lane 4 i + j holds elements 2 j and 2 j + 1 of row i.
__device__ inline unsigned transpose_quarter(unsigned m) {
  unsigned transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(m));
  return transposed;
}

// d += a b, products exact, sums in fp32.
template <typename T>
__device__ inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, f16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 2^x within 2^-22 relative; 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four lanes that share the rows r and r + 8 of a fragment D.
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace vesper::cuda
