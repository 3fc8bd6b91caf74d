// Scores of a tile of 16 pages by one warp, from page bounds in shared memory, exact or in 8 bits: the bits of
// attention/score_pages_cuda.cu.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

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

// A tile of page bounds as it lies in a slot of a warp's ring: rows [16, {low, high}, head_dim] of bounds or codes, and
// behind codes their scales, [16, {low, high}, spans]. Of the 128 bytes in which four lanes of a product find what they
// ask for at once, some change places from row to row, so that there are no bank conflicts.
template <typename T, int kHeadDim, bool kInt8>
struct BoundTile {
  using Stored = std::conditional_t<kInt8, std::uint8_t, T>;
  static constexpr int kRowBytes = 2 * kHeadDim * static_cast<int>(sizeof(Stored));
  static constexpr int kScales = kInt8 ? 2 * kHeadDim / kBoundSpan : 0;  // of a row
  static constexpr int kScaleBytes = kScales * static_cast<int>(sizeof(bf16));
  static constexpr int kBytes = kTilePages * (kRowBytes + kScaleBytes);
  static constexpr int kMostSlots = 6;  // more tiles under way gain nothing
  static constexpr int kSlots = std::min(kMostSlots, kRingBytes<kHeadDim> / kBytes);
  static constexpr unsigned kLaneBytes = kInt8 ? 8 : kChunkBytes;          // of a lane and product
  static constexpr unsigned kPlaces = 8 * kChunkBytes / (4 * kLaneBytes);  // of products in 128 bytes
  // Where in 128 bytes of a row the product lies that is number `place` of them.
  static __device__ unsigned place_of(unsigned place, int row) {
    return (place ^ static_cast<unsigned>(row) % kPlaces) * 4 * kLaneBytes;
  }
};

// Copies of tiles by a warp: 128 bytes of four rows at once, lane 8 r + c chunk c of rows r, r + 4, ...
template <typename T, int kHeadDim, bool kInt8>
class BoundCopies {
 public:
  __device__ BoundCopies(const PageBounds<T>& bounds, unsigned ring)
      : ring_(ring),
        place_(ring + static_cast<unsigned>(own_row() * Tile::kRowBytes) +
               (static_cast<unsigned>(own_chunk() * kChunkBytes) ^ Tile::place_of(0, own_row()))),
        scales_(bounds.scales) {
    if constexpr (kInt8) {
      from_ = bounds.codes;
    } else {
      from_ = bounds.exact;
    }
    from_ += static_cast<int>(blockIdx.x) * 2 * kHeadDim + own_chunk() * kChunk;
  }
  // `page`: of row this_lane() % 16.
  __device__ void copy(int slot, int page) const {
    const unsigned to = place_ + slot * Tile::kBytes;
#pragma unroll
    for (int row = 0; row < kTilePages; row += 4) {
      const auto* from = from_ + std::int64_t{__shfl_sync(kAllLanes, page, own_row() + row)} *
                                     static_cast<int>(gridDim.x * 2 * kHeadDim);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kRowBytes / kChunkBytes; chunk += 8) {
        copy_chunk_once(to + row * Tile::kRowBytes + chunk * kChunkBytes, from + chunk * kChunk, true);
      }
    }
    if constexpr (kInt8) {
      if (this_lane() >= kTilePages) return;
      copy_async<Tile::kScaleBytes>(
          ring_ + slot * Tile::kBytes + kTilePages * Tile::kRowBytes + this_lane() * Tile::kScaleBytes,
          scales_ + (std::int64_t{page} * gridDim.x + blockIdx.x) * Tile::kScales);
    }
  }

 private:
  using Tile = BoundTile<T, kHeadDim, kInt8>;
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(typename Tile::Stored));
  static __device__ int own_row() {
    return this_lane() / 8;
  }
  static __device__ int own_chunk() {
    return this_lane() % 8;
  }

  unsigned ring_;
  unsigned place_;
  const typename Tile::Stored* from_ = nullptr;
  const bf16* scales_ = nullptr;
};

// What lane 4 r + c holds of head r (and r + 8) of the group: the channels that it holds of a page's row, by sign; for
// codes as f16, with what sums of products with them are worth.
template <int kHeadDim, int kProducts>
struct BoundQueries {
  uint4 chunk[kBoundParts][kProducts][kBoundChunks<kHeadDim>];
  float2 unit[kBoundParts][kProducts];
};

template <typename T, int kHeadDim, int kProducts, bool kInt8>
__device__ BoundQueries<kHeadDim, kProducts> load_bound_queries(const DecodeArgs<T>& args) {
  constexpr int kLoads = kHeadDim / (4 * kChunkElements);  // of a lane and head; each is used by both signs
  const int first_head = static_cast<int>(blockIdx.x) * args.group;
  // All at once, and without branches: in turn they would take as many latencies, and nothing else is left to wait for.
  uint4 channels[kProducts][kLoads];
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
    const int head = first_head + min(m * kTileHeads + this_lane() / 4, args.group - 1);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      channels[m][i] =
          *reinterpret_cast<const uint4*>(&args.q(blockIdx.z, head, (i * 4 + this_lane() % 4) * kChunkElements));
    }
  }
  BoundQueries<kHeadDim, kProducts> query;
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
    const bool has_head = m * kTileHeads + this_lane() / 4 < args.group;
#pragma unroll
    for (int part = 0; part < kBoundParts; ++part) {
#pragma unroll
      for (int i = 0; i < kBoundChunks<kHeadDim>; ++i) {
        const int load = part * kBoundChunks<kHeadDim> + i;
        query.chunk[part][m][i] = has_head ? one_sign<T>(channels[m][load % kLoads], load >= kLoads) : uint4{};
      }
      if constexpr (kInt8) query.unit[part][m] = scale_queries<T>(query.chunk[part][m]);
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

__device__ inline uint2 load_shared_half(unsigned address) {
  uint2 half;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(half.x), "=r"(half.y) : "r"(address) : "memory");
  return half;
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

// The scales of a row of codes that belong to part `part` of its channels, as PageRows holds them.
template <int kHeadDim>
__device__ unsigned scales_of_part(const uint4& scales, int part) {
  if constexpr (kHeadDim == 128) return part == 0 ? scales.x : part == 1 ? scales.y : part == 2 ? scales.z : scales.w;
  return (part < 2 ? scales.x : scales.y) >> (part % 2 * 16);
}

// The products of a tile's rows with the group's queries, part by part of the channels.
template <typename T, int kHeadDim, int kProducts, bool kInt8>
__device__ void score_tile(unsigned tile, const BoundQueries<kHeadDim, kProducts>& query,
                           float (&d)[kBoundParts][kProducts][4]) {
  using Tile = BoundTile<T, kHeadDim, kInt8>;
  constexpr int kChunks = kBoundChunks<kHeadDim>;
  const int r = this_lane() / 4;
  const unsigned row = tile + static_cast<unsigned>(r * Tile::kRowBytes) + this_lane() % 4 * Tile::kLaneBytes;
  unsigned own[Tile::kPlaces];  // of row r, and of r + 8
#pragma unroll
  for (unsigned place = 0; place < Tile::kPlaces; ++place) own[place] = row + Tile::place_of(place, r);
  uint4 scales[2] = {};
  if constexpr (kInt8) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned at =
          tile + static_cast<unsigned>(kTilePages * Tile::kRowBytes + (r + 8 * half) * Tile::kScaleBytes);
      if constexpr (kHeadDim == 128) {
        scales[half] = load_shared(at);
      } else {
        const uint2 few = load_shared_half(at);
        scales[half] = {few.x, few.y, 0, 0};
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kBoundParts; ++part) {
    PageRows<T, kChunks, kInt8> rows;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const unsigned product = static_cast<unsigned>(part * kChunks + i);
      const unsigned at = own[product % Tile::kPlaces] + product / Tile::kPlaces * 8 * kChunkBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kInt8) {
          rows.chunk[half][i] = load_shared_half(at + half * 8 * Tile::kRowBytes);
        } else {
          rows.chunk[half][i] = load_shared(at + half * 8 * Tile::kRowBytes);
        }
      }
    }
    if constexpr (kInt8) {
#pragma unroll
      for (int half = 0; half < 2; ++half) rows.scales[half] = scales_of_part<kHeadDim>(scales[half], part);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int m = 0; m < kProducts; ++m) rows.multiply(i, query.chunk[part][m][i], d[part][m]);
    }
    if constexpr (kInt8) {
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        const float2 unit = query.unit[part][m];
        d[part][m][0] = __fmul_rn(d[part][m][0], unit.x);
        d[part][m][1] = __fmul_rn(d[part][m][1], unit.y);
        d[part][m][2] = __fmul_rn(d[part][m][2], unit.x);
        d[part][m][3] = __fmul_rn(d[part][m][3], unit.y);
      }
    }
  }
}

}  // namespace vesper::cuda
