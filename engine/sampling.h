// From logits to token ids, on the device that made them.
#pragma once

#include <cstdint>

#include "engine/core/cost.h"
#include "engine/core/exec.h"
#include "engine/core/tensor.h"

namespace vesper {

// How one sequence draws its tokens. The defaults are greedy.
struct SamplingParams {
  float temperature = 0.0F;  // 0: greedy, the lowest id among equals
  std::int32_t top_k = 0;    // keep the k largest logits (and ties of the k-th); 0: all
  float top_p = 1.0F;        // of those, keep the smallest set of largest logits whose probability reaches top_p
  std::uint32_t seed = 0;
  std::uint32_t request = 0;  // number of the request, so that prompts of one run draw apart
};

// Draws one id a row. Kept tokens are chosen by Gumbel noise: argmax over kept i of logit_i / temperature + g_i, which
// is a draw from their softmax, with g_i = -log(-log(u_i)), u_i from Philox at counter (i, step, request, 0), key
// (seed, 0). So the draw depends on no order of summation and is the same on CPU and CUDA wherever logits agree. Source
// of the trick: Gumbel 1954; Maddison et al., "A* Sampling", NeurIPS 2014.
//   logits [seqs, vocab] f32;  params, step [seqs] on the same device, step = tokens generated so far;  ids [seqs]
// A row that holds nothing but NaN and -inf has no token: a run error on the CPU, id -1 on CUDA, where nothing is read
// back here. CUDA takes up to 524288 logits a row.
void sample(const Exec& exec, TensorView<const float, 2> logits, TensorView<const SamplingParams, 1> params,
            TensorView<const std::int32_t, 1> step, TensorView<std::int32_t, 1> ids);

// Greedy sampling: the logits read once, one comparison each.
Cost sample_cost(std::int64_t seqs, std::int64_t vocab);

namespace cpu {
void sample(TensorView<const float, 2> logits, TensorView<const SamplingParams, 1> params,
            TensorView<const std::int32_t, 1> step, TensorView<std::int32_t, 1> ids);
}  // namespace cpu
namespace cuda {
void sample(const Exec& exec, TensorView<const float, 2> logits, TensorView<const SamplingParams, 1> params,
            TensorView<const std::int32_t, 1> step, TensorView<std::int32_t, 1> ids);
}  // namespace cuda

}  // namespace vesper
