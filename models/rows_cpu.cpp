// Row-wise small operations on the CPU; see models/rows.h.
#include <cmath>
#include <cstdint>

#include "engine/core/parallel.h"
#include "models/rows.h"
#include "models/widen.h"

namespace vesper::cpu {

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
      for (std::int64_t d = 0; d < ffn; ++d) {
        const float gate = gate_up(t, d);
        out(t, d) = gate / (1.0F + std::exp(-gate)) * gate_up(t, ffn + d);
      }
    }
  });
}

}  // namespace vesper::cpu
