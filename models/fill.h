// Values made on the device: the weights of a synthetic model. The same bits on CPU and CUDA.
#pragma once

#include <cstdint>

#include "engine/core/exec.h"
#include "engine/core/philox.h"
#include "engine/core/tensor.h"

namespace vesper {

// The four values of elements 4 * group ... 4 * group + 3 before they are rounded to the tensor's type. 2u - 1 is exact
// in fp32 (u has 24 bits), so the product is the only rounding, whichever instructions a compiler picks.
struct UniformValues {
  float value[4];
};
VESPER_HD inline UniformValues uniform_values(std::uint64_t group, std::uint64_t seed, std::uint32_t tensor,
                                              float half_range) {
  const PhiloxCounter draw =
      philox({{static_cast<std::uint32_t>(group), static_cast<std::uint32_t>(group >> 32), tensor, 0}},
             {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}});
  UniformValues values{};
  for (int i = 0; i < 4; ++i) values.value[i] = half_range * (2.0F * unit_interval(draw.word[i]) - 1.0F);
  return values;
}

// out element i, counted row-major = half_range * (2 u_i - 1), rounded to out's type (f32, bf16 or f16), with u_i from
// word i mod 4 of Philox at counter (i / 4 as two words, tensor, 0), key seed. Uniform in +-half_range, so its variance
// is half_range^2 / 3. `tensor` numbers the tensors of a model, so that they draw apart. Where `out` is a part of a
// tensor, its first element is number `first` of that, a multiple of 4.
void fill_uniform(const Exec& exec, const TensorRef& out, std::uint64_t seed, std::uint32_t tensor, float half_range,
                  std::int64_t first = 0);

// Every element of out (f32, bf16 or f16) = value, rounded to its type.
void fill_constant(const Exec& exec, const TensorRef& out, float value);

namespace cpu {
void fill_uniform(const TensorRef& out, std::uint64_t seed, std::uint32_t tensor, float half_range,
                  std::int64_t first = 0);
void fill_constant(const TensorRef& out, float value);
}  // namespace cpu
namespace cuda {
void fill_uniform(const Exec& exec, const TensorRef& out, std::uint64_t seed, std::uint32_t tensor, float half_range,
                  std::int64_t first);
void fill_constant(const Exec& exec, const TensorRef& out, float value);
}  // namespace cuda

}  // namespace vesper
