// Values made on the CPU; see models/fill.h.
#include <algorithm>
#include <cassert>
#include <cstdint>

#include "engine/core/dispatch.h"
#include "engine/core/parallel.h"
#include "models/fill.h"

namespace vesper::cpu {

void fill_uniform(const TensorRef& out, std::uint64_t seed, std::uint32_t tensor, float half_range,
                  std::int64_t first) {
  assert(first % 4 == 0);
  dispatch_float(out.dtype, "fill_uniform", [&](auto element) {
    using T = decltype(element);
    auto* data = static_cast<T*>(out.data);
    const std::int64_t count = out.size();
    parallel_for((count + 3) / 4, 1024, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t group = begin; group < end; ++group) {
        const UniformValues drawn =
            uniform_values(static_cast<std::uint64_t>(first / 4 + group), seed, tensor, half_range);
        const std::int64_t filled = std::min<std::int64_t>(4, count - 4 * group);
        for (std::int64_t i = 0; i < filled; ++i) data[4 * group + i] = from_float<T>(drawn.value[i]);
      }
    });
  });
}

void fill_constant(const TensorRef& out, float value) {
  dispatch_float(out.dtype, "fill_constant", [&](auto element) {
    using T = decltype(element);
    std::fill_n(static_cast<T*>(out.data), out.size(), from_float<T>(value));
  });
}

}  // namespace vesper::cpu
