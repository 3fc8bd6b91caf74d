// Row-wise small operations on the CPU; see models/rows.h.
#include <cstdint>

#include "engine/core/lanes.h"
#include "engine/core/parallel.h"
#include "models/rows.h"
#include "models/widen.h"

namespace vesper::cpu {
namespace {

using baseline::exponential;
using baseline::f32x8;
using baseline::load;
using baseline::load_some;
using baseline::store;
using baseline::store_some;

f32x8 silu(f32x8 x) {
  return x / (1.0F + exponential(-x));
}

}  // namespace

void gather_rows(const TensorRef& table, TensorView<const std::int32_t, 1> index, TensorView<float, 2> out) {
  const std::int64_t columns = out.shape(1);
  parallel_for(index.shape(0), 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) widen_row(table, index(t) * columns, columns, &out(t, 0));
  });
}

void silu_mul(TensorView<const float, 2> gate_up, TensorView<float, 2> out) {
  const std::int64_t ffn = out.shape(1);
  parallel_for(out.shape(0), 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float* gate = &gate_up(t, 0);
      const float* up = gate + ffn;
      float* to = &out(t, 0);
      std::int64_t d = 0;
      for (; d + 8 <= ffn; d += 8) store(to + d, silu(load(gate + d)) * load(up + d));
      const auto left = static_cast<int>(ffn - d);
      if (left > 0) store_some(to + d, silu(load_some(gate + d, left, load)) * load_some(up + d, left, load), left);
    }
  });
}

}  // namespace vesper::cpu
