// What the kernels with a root-mean-square norm in them share, so that they give the same bits: kNormThreads threads
// look after a row, thread i after its vectors i, i + kNormThreads, ...
#pragma once

#include "engine/core/vector.cuh"

namespace vesper::cuda {

inline constexpr int kNormThreads = 256;
inline constexpr int kNormWarps = kNormThreads / 32;

// The sum over a warp, the same bits in each lane.
__device__ inline float butterfly_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  return value;
}

// The sum over all warps of a block from their own sums, the same bits in each thread.
__device__ inline float sum_of_warps(const float* of_warp) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return butterfly_sum(lane < kNormWarps ? of_warp[lane] : 0.0F);
}

// x += addend, rounded to T.
template <typename T, int kWidth>
__device__ void add_rounded(float (&x)[kWidth], const float (&addend)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = widen(narrow<T>(x[i] + addend[i]));
}

template <int kWidth>
__device__ float add_squares(const float (&x)[kWidth], float sum) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum = fmaf(x[i], x[i], sum);
  return sum;
}

__device__ inline float norm_scale(float squares, int hidden, float eps) {
  return rsqrtf(squares / static_cast<float>(hidden) + eps);
}

template <int kWidth>
__device__ void apply_norm(float (&x)[kWidth], float scale, const float (&weight)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = x[i] * scale * weight[i];
}

}  // namespace vesper::cuda
