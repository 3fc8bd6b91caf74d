// Root-mean-square norm on CUDA; formulas in models/norm.h.
//   x, addend, out [tokens, hidden] row-major, weight [hidden], all of one 16-bit type T
//   block = one row; thread i takes the vectors of kWidth columns i, i + blockDim, ..., so that a warp reads 512
//   consecutive bytes
// Bytes: x and weight read and out written once (add_rms_norm: addend read and x written as well); the second pass over
// a row hits L1. One block a row is bound by latency, not by bytes, in decode: its cure is fusion with a neighbour.
#include <algorithm>
#include <cassert>
#include <cstdint>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/vector.cuh"
#include "models/norm.h"

namespace vesper::cuda {
namespace {

constexpr int kMaxThreads = 1024;

template <typename T>
struct NormArgs {
  T* x;             // written by add_rms_norm only
  const T* addend;  // null in rms_norm
  const T* weight;
  T* out;
  int hidden;
  float eps;
};

// The sum over all threads of a block, the same bits in each: butterflies within warps, then over warps.
__device__ float block_sum(float value) {
  __shared__ float of_warp[32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : 0.0F;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  return value;
}

template <typename T, int kWidth, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads) norm_row(const __grid_constant__ NormArgs<T> args) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * args.hidden;
  const int first = static_cast<int>(threadIdx.x) * kWidth;
  const int stride = static_cast<int>(blockDim.x) * kWidth;
  float squares = 0.0F;
  for (int d = first; d < args.hidden; d += stride) {
    float x[kWidth];
    load_widened(args.x + row + d, x);
    if constexpr (kAdd) {
      float addend[kWidth];
      load_widened(args.addend + row + d, addend);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = widen(narrow<T>(x[i] + addend[i]));
      store_narrowed(args.x + row + d, x);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += x[i] * x[i];
  }
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(args.hidden) + args.eps);
  // A thread reads back only what it wrote itself.
  for (int d = first; d < args.hidden; d += stride) {
    float x[kWidth];
    float weight[kWidth];
    load_widened(args.x + row + d, x);
    load_widened(args.weight + d, weight);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = x[i] * scale * weight[i];
    store_narrowed(args.out + row + d, x);
  }
}

template <bool kAdd>
void norm(const char* name, const Exec& exec, const TensorRef& x, void* addend, const TensorRef& weight, float eps,
          const TensorRef& out) {
  assert(x.shape == out.shape && x.dtype == out.dtype && x.dtype == weight.dtype && weight.size() == x.shape[1]);
  if (x.size() == 0) return;
  dispatch_16bit(x.dtype, name, [&](auto element) {
    using T = decltype(element);
    const int hidden = static_cast<int>(x.shape[1]);
    const NormArgs<T> args{static_cast<T*>(x.data),
                           static_cast<const T*>(addend),
                           static_cast<const T*>(weight.data),
                           static_cast<T*>(out.data),
                           hidden,
                           eps};
    const bool vectors = rows_are_vectors(hidden, {x.data, addend, weight.data, out.data});
    const int width = vectors ? kVectorWidth : 1;
    const int warps = (hidden + 32 * width - 1) / (32 * width);
    const Dims dims{.grid = dim3(static_cast<unsigned>(x.shape[0])),
                    .block = dim3(static_cast<unsigned>(std::min(kMaxThreads, 32 * warps)))};
    if (vectors) return launch(name, norm_row<T, kVectorWidth, kAdd>, dims, exec.stream, args);
    launch(name, norm_row<T, 1, kAdd>, dims, exec.stream, args);
  });
}

}  // namespace

void rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& weight, float eps, const TensorRef& out) {
  norm<false>("rms_norm", exec, x, nullptr, weight, eps, out);
}

void add_rms_norm(const Exec& exec, const TensorRef& x, const TensorRef& addend, const TensorRef& weight, float eps,
                  const TensorRef& out) {
  assert(addend.shape == x.shape && addend.dtype == x.dtype);
  norm<true>("add_rms_norm", exec, x, addend.data, weight, eps, out);
}

}  // namespace vesper::cuda
