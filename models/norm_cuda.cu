// Root-mean-square norm on CUDA; formulas in models/norm.h.
//   x, addend, out [tokens, hidden] row-major, weight [hidden], all of one 16-bit type T
//   block = one row; thread i takes the vectors of kWidth columns i, i + kNormThreads, ..., so that a warp reads 512
//   consecutive bytes
// Bytes: x and weight read and out written once (add_rms_norm: addend read and x written as well). One block a row is
// bound by latency, not by bytes, in decode: a row of up to kMostHeld vectors a thread is held in registers, which
// makes one trip to L2 of three (4096 columns 1.66 to 1.02 us; H100, bench --kernels), the norm's weight is fetched
// before the kernel in front has ended, and the product behind fetches its weights meanwhile (engine/core/overlap.cuh).
// Longer rows, and those that are not on 16 bytes, are read twice, the second time from L1.
#include <algorithm>
#include <cassert>
#include <cstdint>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/vector.cuh"
#include "models/norm.h"

namespace vesper::cuda {
namespace {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int kMostHeld = 4;

// The sum over a warp, the same bits in each lane.
__device__ float butterfly_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  return value;
}

// The sum over all warps of a block from their own sums, the same bits in each thread.
__device__ float sum_of_warps(const float* of_warp) {
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

__device__ float norm_scale(float squares, int hidden, float eps) {
  return rsqrtf(squares / static_cast<float>(hidden) + eps);
}

template <int kWidth>
__device__ void apply_norm(float (&x)[kWidth], float scale, const float (&weight)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = x[i] * scale * weight[i];
}

template <typename T>
struct NormArgs {
  const T* x;
  const T* addend;  // null in rms_norm, and so is sum
  const T* weight;
  T* sum;
  T* out;
  int hidden;
  float eps;
};

// The sum of the threads' squares, the same bits in each thread.
__device__ float block_sum(float (&of_warp)[kNormWarps], float squares) {
  squares = butterfly_sum(squares);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  return sum_of_warps(of_warp);
}

// A row of at most kHeld vectors a thread.
template <typename T, int kHeld, bool kAdd>
__global__ void __launch_bounds__(kNormThreads) norm_held_row(const __grid_constant__ NormArgs<T> args) {
  __shared__ float of_warp[kNormWarps];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * args.hidden;
  const int first = static_cast<int>(threadIdx.x) * kVectorWidth;
  constexpr int kStride = kNormThreads * kVectorWidth;
  const auto load = [&](const T* from, uint4(&to)[kHeld]) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      to[i] = load_eight<true>(from + first + i * kStride, args.hidden - first - i * kStride);
    }
  };
  let_next_start();
  uint4 weight[kHeld];
  load(args.weight, weight);
  wait_for_previous();
  uint4 loaded[kHeld];
  uint4 addend[kHeld];
  load(args.x + row, loaded);
  if constexpr (kAdd) load(args.addend + row, addend);
  float x[kHeld][kVectorWidth];
  float squares = 0.0F;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    load_widened(reinterpret_cast<const T*>(&loaded[i]), x[i]);
    if constexpr (kAdd) {
      float more[kVectorWidth];
      load_widened(reinterpret_cast<const T*>(&addend[i]), more);
      add_rounded<T>(x[i], more);
      if (first + i * kStride < args.hidden) store_narrowed(args.sum + row + first + i * kStride, x[i]);
    }
    squares = add_squares(x[i], squares);
  }
  const float scale = norm_scale(block_sum(of_warp, squares), args.hidden, args.eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    float factor[kVectorWidth];
    load_widened(reinterpret_cast<const T*>(&weight[i]), factor);
    apply_norm(x[i], scale, factor);
    if (first + i * kStride < args.hidden) store_narrowed(args.out + row + first + i * kStride, x[i]);
  }
}

template <typename T, int kWidth, bool kAdd>
__global__ void __launch_bounds__(kNormThreads) norm_row(const __grid_constant__ NormArgs<T> args) {
  __shared__ float of_warp[kNormWarps];
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * args.hidden;
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  constexpr int kStride = kNormThreads * kWidth;
  let_next_start();
  for (int d = first; d < args.hidden; d += kStride) fetch_to_l2(args.weight + d);
  wait_for_previous();
  float squares = 0.0F;
  for (int d = first; d < args.hidden; d += kStride) {
    float x[kWidth];
    load_widened(args.x + row + d, x);
    if constexpr (kAdd) {
      float addend[kWidth];
      load_widened(args.addend + row + d, addend);
      add_rounded<T>(x, addend);
      store_narrowed(args.sum + row + d, x);
    }
    squares = add_squares(x, squares);
  }
  const float scale = norm_scale(block_sum(of_warp, squares), args.hidden, args.eps);
  // A thread reads back only what it wrote itself.
  for (int d = first; d < args.hidden; d += kStride) {
    float x[kWidth];
    float weight[kWidth];
    load_widened((kAdd ? args.sum : args.x) + row + d, x);
    load_widened(args.weight + d, weight);
    apply_norm(x, scale, weight);
    store_narrowed(args.out + row + d, x);
  }
}

template <bool kAdd>
void norm(const char* name, const Exec& exec, const TensorRef& x, const void* addend, const TensorRef& weight,
          float eps, void* sum, const TensorRef& out) {
  assert(x.shape == out.shape && x.dtype == out.dtype && x.dtype == weight.dtype && weight.size() == x.shape[1]);
  if (x.size() == 0) return;
  dispatch_16bit(x.dtype, name, [&](auto element) {
    using T = decltype(element);
    const int hidden = static_cast<int>(x.shape[1]);
    const NormArgs<T> args{static_cast<const T*>(x.data),
                           static_cast<const T*>(addend),
                           static_cast<const T*>(weight.data),
                           static_cast<T*>(sum),
                           static_cast<T*>(out.data),
                           hidden,
                           eps};
    const bool vectors = rows_are_vectors(hidden, {x.data, addend, weight.data, sum, out.data});
    const Dims dims{.grid = dim3(static_cast<unsigned>(x.shape[0])), .block = dim3(kNormThreads), .overlap = true};
    const int held = (hidden / kVectorWidth + kNormThreads - 1) / kNormThreads;
    if (vectors && held <= kMostHeld / 2) {
      return launch(name, norm_held_row<T, kMostHeld / 2, kAdd>, dims, exec.stream, args);
    }
    if (vectors && held <= kMostHeld) return launch(name, norm_held_row<T, kMostHeld, kAdd>, dims, exec.stream, args);
    if (vectors) return launch(name, norm_row<T, kVectorWidth, kAdd>, dims, exec.stream, args);
    launch(name, norm_row<T, 1, kAdd>, dims, exec.stream, args);
  });
}

}  // namespace

void rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& weight, float eps, const TensorRef& out) {
  norm<false>("rms_norm", exec, x, nullptr, weight, eps, nullptr, out);
}

void add_rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& addend, const TensorRef& weight, float eps,
                  const TensorRef& sum, const TensorRef& out) {
  assert(addend.shape == x.shape && addend.dtype == x.dtype && sum.shape == x.shape && sum.dtype == x.dtype);
  norm<true>("add_rms_norm", exec, x, addend.data, weight, eps, sum.data, out);
}

}  // namespace vesper::cuda
