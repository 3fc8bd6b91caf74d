#include "models/projections.h"

#include "kvcache/side_tables.h"
#include "models/norm.h"
#include "models/rows.h"

namespace vesper {
namespace {

void norm_input(const Exec& exec, const BlockInput& input, const TensorRef& normed) {
  if (input.addend.data == nullptr) return rms_norm(exec, input.residual, input.weight, input.eps, normed);
  add_rms_norm(exec, input.residual, input.addend, input.weight, input.eps, input.sum, normed);
}

}  // namespace

void project_qkv(const Exec& exec, const LinearContext& context, const BlockInput& input, const LinearWeight& weight,
                 const Rope& rope, const Batch& batch, const LayerKv& kv, const ProjectionScratch& scratch,
                 const TensorRef& query) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda() && cuda::project_qkv(exec, context, input, weight, rope, batch, kv, query)) {
      return update_side_tables(exec, batch, kv);
    }
  }
  norm_input(exec, input, scratch.normed);
  linear(exec, context, scratch.normed, weight, scratch.wide);
  append_kv(exec, scratch.wide, rope, batch, kv, query);
}

void project_ffn(const Exec& exec, const LinearContext& context, const BlockInput& input, const LinearWeight& weight,
                 const ProjectionScratch& scratch, const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda() && cuda::project_ffn(exec, context, input, weight, out)) return;
  }
  norm_input(exec, input, scratch.normed);
  linear(exec, context, scratch.normed, weight, scratch.wide);
  silu_mul(exec, scratch.wide, out);
}

Cost project_qkv_cost(DType dtype, std::int64_t tokens, std::int64_t hidden, std::int64_t rows) {
  return {.bytes = ((rows + 1) * hidden + tokens * (3 * hidden + rows)) * dtype_bytes(dtype),
          .flops = 2 * tokens * rows * hidden};
}

Cost project_ffn_cost(DType dtype, std::int64_t tokens, std::int64_t hidden, std::int64_t ffn) {
  return {.bytes = ((2 * ffn + 1) * hidden + tokens * (3 * hidden + ffn)) * dtype_bytes(dtype),
          .flops = 4 * tokens * ffn * hidden};
}

}  // namespace vesper
