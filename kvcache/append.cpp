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

}  // namespace vesper
