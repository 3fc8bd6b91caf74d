// A warp's way through pieces of 16 keys in decode attention: a ring of pieces of K and V in shared memory, their
// scores against one group's heads, and the running maximum, sum and output. A piece of K, and of V transposed, is the
// 16-row operand of the tensor-core products; the group's heads, filled up to 8 or 16 with zeros, are their 8 columns:
// the other way round half of every product and of the output's registers would be zeros. Rows that are no keys are
// filled with zeros: what a page holds there may be NaN, and 0 * NaN is not 0.
#pragma once

#include <cstdint>

#include "attention/attend_decode.h"
#include "attention/mma.cuh"
#include "engine/core/launch.cuh"

namespace vesper::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr unsigned kDecodeThreads = kDecodeWarps * kWarpThreads;
inline constexpr int kPiece = 16;     // keys; divides a page
inline constexpr int kTileHeads = 8;  // columns of a product
inline constexpr int kMaxGroup = 16;
template <int kHeadDim>
inline constexpr int kSlots = 384 / kHeadDim;  // of a warp's ring: 24 KiB
template <int kHeadDim>
inline constexpr int kTileBytes = kPiece * 2 * kHeadDim;
template <int kHeadDim>
inline constexpr int kSlotBytes = 2 * kTileBytes<kHeadDim>;  // K, then V
template <int kHeadDim>
inline constexpr int kRingBytes = kSlots<kHeadDim>* kSlotBytes<kHeadDim>;  // of a warp

// Queues the first `keys` rows of a piece that lies in one page, as they lie. `offset`: of its first element, in K and
// in V.
template <typename T, int kHeadDim>
__device__ void copy_piece(unsigned slot, const T* k, const T* v, std::int64_t offset, int keys) {
  constexpr unsigned kChunks = kHeadDim / kChunkElements;
#pragma unroll
  for (unsigned i = 0; i < kPiece * kChunks / kWarpThreads; ++i) {
    const unsigned chunk = threadIdx.x % kWarpThreads + i * kWarpThreads;
    const bool valid = static_cast<int>(chunk / kChunks) < keys;
    const std::int64_t at = offset + chunk * kChunkElements;
    copy_chunk_once(slot + chunk * kChunkBytes, k + at, valid);
    copy_chunk_once(slot + kTileBytes<kHeadDim> + chunk * kChunkBytes, v + at, valid);
  }
}

// The queries of the group's heads as the products' right side; columns are heads. kTiles: 1 where the group has at
// most 8 heads, else 2.
template <int kHeadDim, int kTiles>
struct Queries {
  unsigned b[kTiles][kHeadDim / 16][2];
};

// What a warp carries over its pieces, for heads 2 (lane % 4) and the next of a tile; `sum` is over this lane's own
// keys until the end. `out` holds channels 16 i + lane / 4 and 8 more, each for both heads.
template <int kHeadDim, int kTiles>
struct Running {
  float max[kTiles][2];  // in exponents of 2
  float sum[kTiles][2];
  float out[kTiles][kHeadDim / 16][4];
};

template <int kHeadDim, int kTiles>
__device__ Running<kHeadDim, kTiles> nothing_yet() {
  Running<kHeadDim, kTiles> running = {};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) running.max[tile][0] = running.max[tile][1] = -INFINITY;
  return running;
}

// Scores of a piece's keys: [16 keys, 8 heads] for each tile of heads.
template <int kTiles>
struct Scores {
  float d[kTiles][4];
};
// The key of a piece that this lane's score i, 0 ... 3, of a tile belongs to.
__device__ inline int key_of_score(int i) {
  return this_lane() / 4 + i / 2 * 8;
}

template <typename T, int kHeadDim, int kTiles>
__device__ Scores<kTiles> score_piece(const Queries<kHeadDim, kTiles>& q, unsigned slot) {
  Scores<kTiles> scores = {};
  const unsigned keys = corner_block<kHeadDim, Quarters::kDownFirst>(slot, this_lane());
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned k[4];
    load_block(k, block_at<kHeadDim>(keys, 0, d));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add<T>(scores.d[tile], k, q.b[tile][d / 16][0], q.b[tile][d / 16][1]);
    }
  }
  return scores;
}

// Takes the keys from `keys` on out of the softmax.
template <int kTiles>
__device__ void hide_keys_from(int keys, Scores<kTiles>& scores) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (key_of_score(i) >= keys) scores.d[tile][i] = -INFINITY;
    }
  }
}

// Over the eight lanes that hold one head's keys.
__device__ inline float keys_max(float x) {
#pragma unroll
  for (int step = 4; step < static_cast<int>(kWarpThreads); step *= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}
__device__ inline float keys_sum(float x) {
#pragma unroll
  for (int step = 4; step < static_cast<int>(kWarpThreads); step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Turns scores into weights and takes the piece's values with them. At least one score of a head is finite.
template <typename T, int kHeadDim, int kTiles>
__device__ void take_piece(Running<kHeadDim, kTiles>& running, Scores<kTiles>& scores, unsigned slot,
                           float scale_log2) {
  unsigned weights[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float* p = scores.d[tile];
    float shrink[2];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      const float largest = keys_max(fmaxf(p[head], p[head + 2]));
      const float max = fmaxf(running.max[tile][head], largest * scale_log2);
      shrink[head] = exp2_approx(running.max[tile][head] - max);
      running.max[tile][head] = max;
      p[head] = exp2_approx(fmaf(p[head], scale_log2, -max));
      p[head + 2] = exp2_approx(fmaf(p[head + 2], scale_log2, -max));
      running.sum[tile][head] = fmaf(running.sum[tile][head], shrink[head], p[head] + p[head + 2]);
    }
    // A fragment D of 8 keys by 8 heads, rounded and transposed, is half a fragment B.
    weights[tile][0] = transpose_quarter(narrow_pair<T>(p[0], p[1]));
    weights[tile][1] = transpose_quarter(narrow_pair<T>(p[2], p[3]));
    // Where no maximum moved every factor is exactly 1. That is nearly always so after the first few pieces.
    if (__any_sync(kAllLanes, shrink[0] != 1.0F || shrink[1] != 1.0F)) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) running.out[tile][d][i] *= shrink[i % 2];
      }
    }
  }

  const unsigned values = corner_block<kHeadDim, Quarters::kAcrossFirst>(slot + kTileBytes<kHeadDim>, this_lane());
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned v[4];
    load_block_transposed(v, block_at<kHeadDim>(values, 0, d));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_add<T>(running.out[tile][d / 16], v, weights[tile][0], weights[tile][1]);
    }
  }
}

}  // namespace vesper::cuda
