// Scores of a tile of 16 pages by one warp, from page bounds in shared memory: the bits of
// attention/score_pages_cuda.cu.
#pragma once

#include "attention/attend_decode.cuh"
#include "attention/page_products.cuh"
#include "attention/page_rows.cuh"
#include "attention/select_pages.h"

namespace vesper::cuda {

inline constexpr int kTilePages = 16;

// As attention/score_pages_cuda.cu sums: a quarter of a row's channels at a time.
inline constexpr int kBoundParts = 4;
template <int kHeadDim>
inline constexpr int kBoundChunks = 2 * kHeadDim / kBoundParts / (4 * kChunkElements);  // of a lane and part

// A tile of page bounds lies in a slot of a warp's ring, rows [16, {low, high}, head_dim]; in odd rows the halves of
// every 128 bytes change places, so that the lanes of a product find theirs without bank conflicts.
template <int kHeadDim>
inline constexpr int kRowBytes = 4 * kHeadDim;
static_assert(kTilePages * kRowBytes<128> == kSlotBytes<128> && kTilePages * kRowBytes<64> == kSlotBytes<64>);
inline constexpr unsigned kOddRow = 4 * kChunkBytes;  // by which places in odd rows differ, in one bit

// What lane 4 r + c holds of head r (and r + 8) of the group: the channels that it holds of a page's row, by sign.
template <int kHeadDim, int kProducts>
struct BoundQueries {
  uint4 chunk[kBoundParts][kBoundChunks<kHeadDim>][kProducts];
};

template <typename T, int kHeadDim, int kProducts>
__device__ BoundQueries<kHeadDim, kProducts> load_bound_queries(const DecodeArgs<T>& args) {
  BoundQueries<kHeadDim, kProducts> query;
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
    const int head = m * kTileHeads + this_lane() / 4;
    const int first_head = static_cast<int>(blockIdx.x) * args.group;
#pragma unroll
    for (int part = 0; part < kBoundParts; ++part) {
#pragma unroll
      for (int i = 0; i < kBoundChunks<kHeadDim>; ++i) {
        const int d = ((part * kBoundChunks<kHeadDim> + i) * 4 + this_lane() % 4) * kChunkElements;
        query.chunk[part][i][m] = {};
        if (head >= args.group) continue;
        query.chunk[part][i][m] = one_sign<T>(
            *reinterpret_cast<const uint4*>(&args.q(blockIdx.z, first_head + head, d % kHeadDim)), d >= kHeadDim);
      }
    }
  }
  return query;
}

__device__ inline uint4 load_shared(unsigned address) {
  uint4 chunk;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "r"(address)
               : "memory");
  return chunk;
}

// A head's score: the parts in turn.
template <int kProducts>
__device__ float head_score(const float (&d)[kBoundParts][kProducts][4], int m, int at) {
  float score = 0.0F;
#pragma unroll
  for (int part = 0; part < kBoundParts; ++part) score += d[part][m][at];
  return score;
}

// The group's scores of rows lane / 4 (in even lanes) and 8 further on (in odd ones) of a tile.
template <int kProducts>
__device__ float largest_of_group(const float (&d)[kBoundParts][kProducts][4], int group) {
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // A head whose score is NaN does not count.
        if (m * kTileHeads + 2 * (this_lane() % 4) + i >= group) continue;
        largest[half] = fmaxf(largest[half], head_score<kProducts>(d, m, 2 * half + i));
      }
    }
  }
  const bool odd = this_lane() % 2 != 0;
  const float own = odd ? largest[1] : largest[0];
  const float both = fmaxf(own, __shfl_xor_sync(kAllLanes, odd ? largest[0] : largest[1], 1));
  return fmaxf(both, __shfl_xor_sync(kAllLanes, both, 2));
}
// In the order of attention/score_pages_cuda.cu: heads 8 apart, then 4, 2 and 1.
template <int kProducts>
__device__ float sum_of_group(const float (&d)[kBoundParts][kProducts][4], int group) {
  float of_half[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        if (m * kTileHeads + 2 * (this_lane() % 4) + i >= group) continue;
        sum[i] += head_score<kProducts>(d, m, 2 * half + i);
      }
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
    }
    of_half[half] = sum[0] + sum[1];
  }
  return this_lane() % 2 == 0 ? of_half[0] : of_half[1];
}
template <int kProducts>
__device__ float group_score_of(const float (&d)[kBoundParts][kProducts][4], GroupScore group_score, int group) {
  if (group_score == GroupScore::kMax) return largest_of_group<kProducts>(d, group);
  const float sum = sum_of_group<kProducts>(d, group);
  return group_score == GroupScore::kSum ? sum : sum / static_cast<float>(group);
}

// The products of a tile's rows with the group's queries, part by part of the channels.
template <typename T, int kHeadDim, int kProducts>
__device__ void score_tile(unsigned tile, const BoundQueries<kHeadDim, kProducts>& query,
                           float (&d)[kBoundParts][kProducts][4]) {
  // Of the groups of four chunks, which the lanes of a row take one each, the even and the odd ones.
  const int r = this_lane() / 4;
  const unsigned row = tile + static_cast<unsigned>(r * kRowBytes<kHeadDim> + this_lane() % 4 * kChunkBytes);
  const unsigned shift = r % 2 == 0 ? 0 : kOddRow;
  const unsigned even = row + shift;
  const unsigned odd = row - shift;
#pragma unroll
  for (int part = 0; part < kBoundParts; ++part) {
#pragma unroll
    for (int i = 0; i < kBoundChunks<kHeadDim>; ++i) {
      const int group = part * kBoundChunks<kHeadDim> + i;
      const unsigned at = (group % 2 == 0 ? even : odd) + static_cast<unsigned>(group) * kOddRow;
      const uint4 upper = load_shared(at);
      const uint4 lower = load_shared(at + 8 * kRowBytes<kHeadDim>);
#pragma unroll
      for (int m = 0; m < kProducts; ++m) multiply_chunks<T>(upper, lower, query.chunk[part][i][m], d[part][m]);
    }
  }
}

}  // namespace vesper::cuda
