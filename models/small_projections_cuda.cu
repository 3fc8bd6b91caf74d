// The products that open a decoder block's halves with 9 to 64 rows of x, with the step after in the same kernel. The
// product is models/small_gemm.cuh, a band's partners being channels d and d + head_dim / 2 of a head, or a gate and
// its up; what becomes of them is models/projection_outputs.cuh. Shapes: as in models/projections_cuda.cu. Bytes: W
// once, see project_qkv_cost() and project_ffn_cost().
#include <cassert>

#include "engine/core/dispatch.h"
#include "models/projection_outputs.cuh"
#include "models/small_gemm.cuh"
#include "models/small_gemm.h"

namespace vesper::cuda {

bool small_gemm_qkv(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                    const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& query) {
  const std::int64_t half = kv.k.shape[3] / 2;
  if (query.dtype != x.dtype || kv.k.dtype != x.dtype || half % kBandRows != 0 || !small_gemm_takes(x, weight)) {
    return false;
  }
  dispatch_16bit(x.dtype, "projecting q, k and v", [&](auto element) {
    using T = decltype(element);
    const BandRows bands{.rows = weight.shape[0] / 2, .run = half, .stride = 2 * half, .partner = half};
    launch_small_gemm<T>("small_gemm_qkv", exec, multiprocessors, x, weight, bands,
                         qkv_output<T>(rope, batch, kv, query));
  });
  return true;
}

bool small_gemm_ffn(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                    const TensorRef& out) {
  assert(weight.shape[0] == 2 * out.shape[1]);
  if (out.dtype != x.dtype || !small_gemm_takes(x, weight)) return false;
  dispatch_16bit(x.dtype, "projecting gate and up", [&](auto element) {
    using T = decltype(element);
    const std::int64_t ffn = out.shape[1];
    const BandRows bands{.rows = ffn, .run = ffn, .stride = ffn, .partner = ffn};
    launch_small_gemm<T>("small_gemm_ffn", exec, multiprocessors, x, weight, bands, FfnOutput<T>{out.as<T, 2>()});
  });
  return true;
}

}  // namespace vesper::cuda
