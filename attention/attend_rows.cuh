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

// Turns a half's scores, of its rows, into weights; what earlier sums shrink by.
template <int kHeadDim, int kHalves>
__device__ float weigh_rows(RunningRows<kHeadDim, kHalves>& running, float (&scores)[2][4], int half,
                            float scale_log2) {
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
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    running.out[n][2 * half] *= shrink;
    running.out[n][2 * half + 1] *= shrink;
  }
  return shrink;
}

// Turns scores into weights and takes the piece's values with them. At least one score of a row is finite.
template <typename T, int kHeadDim, int kHalves>
__device__ void take_into_rows(RunningRows<kHeadDim, kHalves>& running, float (&scores)[2][4], unsigned slot,
                               float scale_log2) {
  unsigned p[4] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    (void)weigh_rows(running, scores, half, scale_log2);
    p[half] = narrow_pair<T>(scores[0][2 * half], scores[0][2 * half + 1]);
    p[half + 2] = narrow_pair<T>(scores[1][2 * half], scores[1][2 * half + 1]);
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

// Sums of squared weights beside those of the weights, relative to the square of the same maxima: of w^2 and w^2 |v|^2,
// over this lane's own columns until the end, and of w^2 v. The last lie in the rows r + 8 of RunningRows::out where
// the group has at most 8 heads, and are then no work of their own.
template <int kHeadDim, int kHalves>
struct SquaredRows {
  float sum[kHalves] = {};
  float spread[kHalves] = {};
  float out[kHalves == 1 ? 1 : kHeadDim / 8][4] = {};
};

// As take_into_rows, and the squares. `norms`: |v|^2 of this lane's columns. A squared weight multiplies values as the
// sum of two numbers of T: in bf16 2^-17 of it is lost.
template <typename T, int kHeadDim, int kHalves>
__device__ void take_squares_into_rows(RunningRows<kHeadDim, kHalves>& running, SquaredRows<kHeadDim, kHalves>& squared,
                                       float (&scores)[2][4], const float (&norms)[4], unsigned slot,
                                       float scale_log2) {
  unsigned p[4] = {};
  unsigned high[4] = {};
  unsigned low[4] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const float shrink = weigh_rows(running, scores, half, scale_log2);
    const float shrink_squared = shrink * shrink;
    squared.sum[half] *= shrink_squared;
    squared.spread[half] *= shrink_squared;
    const int row = kHalves == 1 ? 1 : half;  // of the fragment's two
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      const float* weight = scores[right] + 2 * half;
      const float2 square = {weight[0] * weight[0], weight[1] * weight[1]};
      squared.sum[half] += square.x + square.y;
      squared.spread[half] =
          fmaf(square.x, norms[2 * right], fmaf(square.y, norms[2 * right + 1], squared.spread[half]));
      p[half + 2 * right] = narrow_pair<T>(weight[0], weight[1]);
      high[row + 2 * right] = narrow_pair<T>(square.x, square.y);
      const float2 rounded = widen_pair<T>(high[row + 2 * right]);
      low[row + 2 * right] = narrow_pair<T>(square.x - rounded.x, square.y - rounded.y);
    }
    auto& out = [&]() -> auto& {
      if constexpr (kHalves == 1) {
        return running.out;
      } else {
        return squared.out;
      }
    }
    ();
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      out[n][2 * row] *= shrink_squared;
      out[n][2 * row + 1] *= shrink_squared;
    }
  }
  if constexpr (kHalves == 1) {
    p[1] = high[1];
    p[3] = high[3];
  }

  const unsigned values = corner_block<kHeadDim, Quarters::kDownFirst>(slot + kTileBytes<kHeadDim>, this_lane());
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    unsigned v[4];
    load_block_transposed(v, block_at<kHeadDim>(values, 0, d));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      multiply_add<T>(running.out[d / 8 + i], p, v[2 * i], v[2 * i + 1]);
      if constexpr (kHalves == 1) {
        multiply_add<T>(running.out[d / 8 + i], low, v[2 * i], v[2 * i + 1]);
      } else {
        multiply_add<T>(squared.out[d / 8 + i], high, v[2 * i], v[2 * i + 1]);
        multiply_add<T>(squared.out[d / 8 + i], low, v[2 * i], v[2 * i + 1]);
      }
    }
  }
}

}  // namespace vesper::cuda
