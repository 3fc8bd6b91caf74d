// The kernels of the kernel bench, by what they need.
#pragma once

#include <vector>

#include "engine/kernel_bench.h"
#include "engine/kernel_world.h"

namespace vesper {

// Matrix products, norms, the gated activation and sampling, for `batch` rows; `room` is device memory to use.
std::vector<KernelRow> time_dense_kernels(const Exec& exec, const ModelConfig& config, DType dtype, int batch,
                                          std::int64_t room, std::uint64_t seed);

// Those that `setting` wants of the append pass and attention: dense, to pages, to tokens that are pruned or sampled,
// and prefill.
std::vector<KernelRow> time_attention_kernels(const Exec& exec, const KernelSetting& setting, KernelWorld& world);

}  // namespace vesper
