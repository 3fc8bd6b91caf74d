#include "kvcache/side_tables.h"

namespace vesper {

void update_side_tables(const Exec& exec, const Batch& batch, const LayerKv& kv) {
  if (kv.bounds.data == nullptr && kv.moments.data == nullptr && kv.int4.data == nullptr) return;
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::update_side_tables(exec, batch, kv);
  }
  cpu::update_side_tables(batch, kv);
}

}  // namespace vesper
