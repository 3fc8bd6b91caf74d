#include "engine/sampling.h"

namespace vesper {

void sample(const Exec& exec, TensorView<const float, 2> logits, TensorView<const SamplingParams, 1> params,
            TensorView<const std::int32_t, 1> step, TensorView<std::int32_t, 1> ids) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::sample(exec, logits, params, step, ids);
  }
  cpu::sample(logits, params, step, ids);
}

Cost sample_cost(std::int64_t seqs, std::int64_t vocab) {
  return {.bytes = seqs * (vocab * dtype_bytes(DType::kF32) + dtype_bytes(DType::kI32)), .flops = seqs * vocab};
}

}  // namespace vesper
