#include "kvcache/append.h"

#include "kvcache/side_tables.h"

namespace vesper {

void append_kv(const Exec& exec, const TensorRef& qkv, const Rope& rope, const Batch& batch, const LayerKv& kv,
               const TensorRef& q_out) {
  const auto store = [&] {
    if constexpr (kHaveCuda) {
      if (exec.on_cuda()) return cuda::append_kv(exec, qkv, rope, batch, kv, q_out);
    }
    cpu::append_kv(qkv.as<const float, 2>(), rope, batch, kv, q_out.as<float, 2>());
  };
  store();
  update_side_tables(exec, batch, kv);
}

Cost append_kv_cost(const KvShape& shape, int heads, const SideTables& tables, std::int64_t seqs) {
  const std::int64_t element = dtype_bytes(shape.dtype);
  const std::int64_t row = std::int64_t{heads + 2 * shape.kv_heads} * shape.head_dim;
  const Cost of_tables = side_tables_cost(shape, tables, seqs);
  return {.bytes = seqs * 2 * row * element + of_tables.bytes, .flops = seqs * 3 * row + of_tables.flops};
}

}  // namespace vesper
