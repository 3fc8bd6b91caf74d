#include "models/projections.h"

#include "kvcache/side_tables.h"
#include "models/rows.h"

namespace vesper {
void project_qkv(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& wide,
                 const TensorRef& query) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda() && cuda::project_qkv(exec, context, x, weight, rope, batch, kv, query)) {
      return update_side_tables(exec, batch, kv);
    }
  }
  linear(exec, context, x, weight, wide);
  append_kv(exec, wide, rope, batch, kv, query);
}

void project_ffn(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const TensorRef& wide, const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda() && cuda::project_ffn(exec, context, x, weight, out)) return;
  }
  linear(exec, context, x, weight, wide);
  silu_mul(exec, wide, out);
}

Cost project_qkv_cost(DType dtype, std::int64_t tokens, std::int64_t hidden, std::int64_t rows) {
  return {.bytes = (rows * hidden + tokens * (hidden + rows)) * dtype_bytes(dtype),
          .flops = 2 * tokens * rows * hidden};
}

Cost project_ffn_cost(DType dtype, std::int64_t tokens, std::int64_t hidden, std::int64_t ffn) {
  return {.bytes = (2 * ffn * hidden + tokens * (hidden + ffn)) * dtype_bytes(dtype),
          .flops = 4 * tokens * ffn * hidden};
}

}  // namespace vesper
