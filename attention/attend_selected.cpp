#include "attention/attend_selected.h"

namespace vesper {

void attend_selected(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                     const Batch& batch, const Selection& list, int min_entries, DenseLimit dense,
                     const SplitPartials& partials, const TensorRef& out, TensorView<float, 2> lse) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) {
      return cuda::attend_selected(exec, shape, q, kv, batch, list, min_entries, dense, partials, out, lse);
    }
  }
  cpu::attend_selected(shape, q.as<const float, 2>(), kv, batch, list, min_entries, dense, partials, out.as<float, 2>(),
                       lse);
}

Cost attend_selected_cost(const AttentionShape& shape, DType dtype, std::int64_t seqs, std::int64_t listed) {
  const std::int64_t element = dtype_bytes(dtype);
  return {.bytes = listed * (std::int64_t{2} * shape.head_dim * element + 4) +
                   2 * seqs * shape.heads * shape.head_dim * element,
          .flops = 4 * listed * shape.group() * shape.head_dim};
}

void count_selected(const Exec& exec, const AttentionShape& shape, const Batch& batch, const Selection& list,
                    DenseLimit dense, const KeptCounters& counters) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::count_selected(exec, shape, batch, list, dense, counters);
  }
  cpu::count_selected(shape, batch, list, dense, counters);
}

}  // namespace vesper
