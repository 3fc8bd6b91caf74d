// Root-mean-square norm on the CPU; see models/norm.h.
#include <cmath>
#include <cstdint>
#include <vector>

#include "engine/core/parallel.h"
#include "models/norm.h"
#include "models/widen.h"

namespace vesper::cpu {
namespace {

std::vector<float> widen(const TensorRef& weight) {
  std::vector<float> widened(static_cast<std::size_t>(weight.size()));
  widen_row(weight, 0, weight.size(), widened.data());
  return widened;
}

void norm_row(const float* x, const float* weight, std::int64_t hidden, float eps, float* out) {
  float lane[8] = {};  // sums in fixed lanes, as in models/linear.h
  for (std::int64_t d = 0; d < hidden; ++d) lane[d % 8] += x[d] * x[d];
  const float sum = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  const float scale = 1.0F / std::sqrt(sum / static_cast<float>(hidden) + eps);
  for (std::int64_t d = 0; d < hidden; ++d) out[d] = x[d] * scale * weight[d];
}

}  // namespace

void rms_norm(TensorView<const float, 2> x, const TensorRef& weight, float eps, TensorView<float, 2> out) {
  const std::vector<float> widened = widen(weight);
  parallel_for(x.shape(0), 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) norm_row(&x(t, 0), widened.data(), x.shape(1), eps, &out(t, 0));
  });
}

void add_rms_norm(TensorView<const float, 2> x, TensorView<const float, 2> addend, const TensorRef& weight, float eps,
                  TensorView<float, 2> sum, TensorView<float, 2> out) {
  const std::vector<float> widened = widen(weight);
  parallel_for(x.shape(0), 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t d = 0; d < x.shape(1); ++d) sum(t, d) = x(t, d) + addend(t, d);
      norm_row(&sum(t, 0), widened.data(), x.shape(1), eps, &out(t, 0));
    }
  });
}

}  // namespace vesper::cpu
