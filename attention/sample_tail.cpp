#include "attention/sample_tail.h"

#include <cmath>
#include <limits>

namespace vesper {

// By bisection of the lower tail, where erfc keeps its relative precision. Called while an engine is built.
double inverse_normal(double probability) {
  if (probability > 0.5) return -inverse_normal(1.0 - probability);
  if (!(probability > 0.0)) return -std::numeric_limits<double>::infinity();
  double low = -40.0;  // below the quantile of the least double
  double high = 0.0;
  for (int step = 0; step < 80; ++step) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::sqrt(2.0)) / 2 < probability ? low : high) = middle;
  }
  return high;
}

void select_static(const Exec& exec, const AttentionShape& shape, const Batch& batch, const TopKScores& scores,
                   const StaticRule& rule, DenseLimit dense, const Selection& list) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::select_static(exec, shape, batch, scores, rule, dense, list);
  }
  cpu::select_static(shape, batch, scores, rule, dense, list);
}

Cost select_static_cost(std::int64_t scores, std::int64_t kept) {
  return {.bytes = 4 * (scores + kept), .flops = scores};
}

}  // namespace vesper
