#include "kvcache/side_tables.h"

#include <algorithm>

namespace vesper {

void update_side_tables(const Exec& exec, const Batch& batch, const LayerKv& kv) {
  update_side_tables(exec, batch, {&kv, 1});
}

void update_side_tables(const Exec& exec, const Batch& batch, std::span<const LayerKv> layers) {
  const bool any = std::any_of(layers.begin(), layers.end(), [](const LayerKv& kv) {
    return kv.bounds.data != nullptr || kv.int8_bounds.data != nullptr || kv.moments.data != nullptr ||
           kv.int4.data != nullptr;
  });
  if (!any) return;
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::update_side_tables(exec, batch, layers);
  }
  for (const LayerKv& kv : layers) cpu::update_side_tables(batch, kv);
}

Cost side_tables_cost(const KvShape& shape, const SideTables& tables, std::int64_t seqs) {
  if (tables == SideTables{}) return {};
  const std::int64_t keys = std::int64_t{shape.kv_heads} * shape.page_tokens * shape.head_dim;
  return {.bytes = seqs * (keys * dtype_bytes(shape.dtype) + shape.side_table_bytes(tables)), .flops = seqs * 2 * keys};
}

}  // namespace vesper
