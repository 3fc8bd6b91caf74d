// Values made on CUDA; see models/fill.h. Thread i makes and writes group i of four elements, with one store where the
// tensor is aligned to it.
// Bytes: out written once. A draw is some 100 integer instructions for four elements, which at 16 bits stays below the
// time of the store.
#include <cassert>
#include <cstdint>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/numeric.cuh"
#include "models/fill.h"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 256;

Dims cover(std::int64_t groups) {
  return {.grid = dim3(static_cast<unsigned>((groups + kThreads - 1) / kThreads)), .block = dim3(kThreads)};
}

template <typename T>
struct UniformArgs {
  T* out;
  std::int64_t count;
  std::int64_t first_group;
  std::uint64_t seed;
  std::uint32_t tensor;
  float half_range;
};

// Four elements as one unit of memory.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T element[4];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) fill_uniform_groups(const __grid_constant__ UniformArgs<T> args) {
  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t first = 4 * group;
  if (first >= args.count) return;
  const UniformValues drawn =
      uniform_values(static_cast<std::uint64_t>(args.first_group + group), args.seed, args.tensor, args.half_range);
  Four<T> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.element[i] = narrow<T>(drawn.value[i]);
  T* to = args.out + first;
  if (first + 4 <= args.count && reinterpret_cast<std::uintptr_t>(to) % sizeof(four) == 0) {
    *reinterpret_cast<Four<T>*>(to) = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < args.count) to[i] = four.element[i];
  }
}

template <typename T>
struct ConstantArgs {
  T* out;
  std::int64_t count;
  float value;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) fill_constant_elements(const __grid_constant__ ConstantArgs<T> args) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < args.count) args.out[i] = narrow<T>(args.value);
}

}  // namespace

void fill_uniform(const Exec& exec, const TensorRef& out, std::uint64_t seed, std::uint32_t tensor, float half_range,
                  std::int64_t first) {
  assert(first % 4 == 0);
  if (out.size() == 0) return;
  dispatch_float(out.dtype, "fill_uniform", [&](auto element) {
    using T = decltype(element);
    launch("fill_uniform", fill_uniform_groups<T>, cover((out.size() + 3) / 4), exec.stream,
           UniformArgs<T>{static_cast<T*>(out.data), out.size(), first / 4, seed, tensor, half_range});
  });
}

void fill_constant(const Exec& exec, const TensorRef& out, float value) {
  if (out.size() == 0) return;
  dispatch_float(out.dtype, "fill_constant", [&](auto element) {
    using T = decltype(element);
    launch("fill_constant", fill_constant_elements<T>, cover(out.size()), exec.stream,
           ConstantArgs<T>{static_cast<T*>(out.data), out.size(), value});
  });
}

}  // namespace vesper::cuda
