// Attention to pieces of 16 keys with the heads as the rows of the tensor-core products, where attend_decode.cuh has
// them as columns: what sampled attention wants, whose sums over a draw's heads then lie in one lane's column. The
// group's heads, filled up to 16 with zeros, are the rows; up to 8 heads the lower half of the rows is left out of
// everything but the products. Source: Dao et al., arXiv 2205.14135.
#pragma once

#include "attention/attend_decode.cuh"

namespace vesper::cuda {

inline constexpr int kHeads = 16;    // rows of the products
inline constexpr int kRowSlots = 3;  // of a warp's ring
template <int kHeadDim>
inline constexpr int kRowRingBytes = kRowSlots* kSlotBytes<kHeadDim>;
// A warp's output as it is merged through its ring: eight floats of padding spread a column of rows over the banks.
template <int kHeadDim>
inline constexpr int kRowMergeStride = kHeadDim + 8;

// What a warp carries over its pieces. kHalves: 1 where the group has at most 8 heads, which are rows r of the
// fragments; 2 adds rows r + 8. `sum` is over this lane's own columns until the end.
template <int kHeadDim, int kHalves>
struct RunningRows {
  float max[kHalves];  // in exponents of 2
  float sum[kHalves];
  float out[kHeadDim / 8][4];
};

template <int kHeadDim, int kHalves>
__device__ RunningRows<kHeadDim, kHalves> nothing_yet_in_rows() {
  RunningRows<kHeadDim, kHalves> running = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) running.max[half] = -INFINITY;
  return running;
}

// Products of the queries with a piece's keys: scores [16 heads, 16 keys] in two fragments of 8 keys each.
template <typename T, int kHeadDim>
__device__ void score_into_rows(float (&scores)[2][4], const unsigned (&q)[kHeadDim / 16][4], unsigned slot) {
  const unsigned keys = corner_block<kHeadDim, Quarters::kAcrossFirst>(slot, this_lane());
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned k[4];
    load_block(k, block_at<kHeadDim>(keys, 0, d));
    multiply_add<T>(scores[0], q[d / 16], k[0], k[1]);
    multiply_add<T>(scores[1], q[d / 16], k[2], k[3]);
  }
}

// The key of a piece that this lane's element i, 0 ... 7, of score_into_rows's fragments belongs to.
__device__ inline int key_of_row_score(int i) {
  return i / 4 * 8 + this_lane() % 4 * 2 + i % 2;
}

// Takes the keys from `keys` on out of the softmax.
__device__ inline void hide_row_keys_from(int keys, float (&scores)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (key_of_row_score(i) >= keys) scores[i / 4][i % 4] = -INFINITY;
  }
}

// Turns scores into weights and takes the piece's values with them. At least one score of a row is finite.
template <typename T, int kHeadDim, int kHalves>
__device__ void take_into_rows(RunningRows<kHeadDim, kHalves>& running, float (&scores)[2][4], unsigned slot,
                               float scale_log2) {
  unsigned p[4] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    float* left = scores[0] + 2 * half;
    float* right = scores[1] + 2 * half;
    const float largest = row_max(fmaxf(fmaxf(left[0], left[1]), fmaxf(right[0], right[1])));
    const float max = fmaxf(running.max[half], largest * scale_log2);
    const float shrink = exp2_approx(running.max[half] - max);
    running.max[half] = max;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      left[e] = exp2_approx(fmaf(left[e], scale_log2, -max));
      right[e] = exp2_approx(fmaf(right[e], scale_log2, -max));
    }
    running.sum[half] = fmaf(running.sum[half], shrink, (left[0] + left[1]) + (right[0] + right[1]));
    p[half] = narrow_pair<T>(left[0], left[1]);
    p[half + 2] = narrow_pair<T>(right[0], right[1]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      running.out[n][2 * half] *= shrink;
      running.out[n][2 * half + 1] *= shrink;
    }
  }

  const unsigned values = corner_block<kHeadDim, Quarters::kDownFirst>(slot + kTileBytes<kHeadDim>, this_lane());
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned v[4];
    load_block_transposed(v, block_at<kHeadDim>(values, 0, d));
    multiply_add<T>(running.out[d / 8], p, v[0], v[1]);
    multiply_add<T>(running.out[d / 8 + 1], p, v[2], v[3]);
  }
}

}  // namespace vesper::cuda
