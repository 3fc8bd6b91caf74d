// The products that open a decoder block's halves, with the step after in the same kernel.
//
//   y = x W^T, then
//     qkv   rotate the pairs (d, d + head_dim / 2) of q and k; q to `query`, k and v to their cache rows
//     ffn   silu(gate) * up
//
// Shapes: x [tokens, hidden], W [rows, hidden], query [tokens, heads * head_dim], out [tokens, ffn], all of one 16-bit
//   type; K and V in the tile order of kvcache/layout.h. Tokens: 1 to kMaxGemvRows.
// Mapping: the product is models/gemv.cuh; with more tokens models/small_projections_cuda.cu's. A tile's low rows and
// its high ones are partners, so that a thread has both
//   of a pair: channels d and d + head_dim / 2 of a head, or a gate and its up.
// Rounding: every value that the composition would have stored is rounded where it would have been.
// Bytes: W once, see project_qkv_cost() and project_ffn_cost().
// The norm before is a kernel of its own (models/norm_cuda.cu): done here by every block for itself, the rows that it
//   reads queue up behind the first weights, and the weights wait for the norm.
// Source: formulas of kvcache/append.h, models/rows.h.
#include <cassert>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "models/gemv.cuh"
#include "models/gemv_int4.cuh"
#include "models/projection_outputs.cuh"
#include "models/projections.h"
#include "models/small_gemm.h"

namespace vesper::cuda {
namespace {

template <typename Weight, typename Output>
struct ProjectionArgs {
  Weight weight;
  StreamedInput<typename Weight::T> input;
  Output output;
  int depth = 0;
};

template <typename Weight, typename Output>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    project(const __grid_constant__ ProjectionArgs<Weight, Output> args) {
  extern __shared__ __align__(128) unsigned char memory[];
  stream_products<true>(args.weight, args.input, args.depth, memory, args.output);
}

// Whether every row may be read 16 bytes at a time and all of it is of one 16-bit type.
bool takes(const TensorRef& x, const LinearWeight& weight, const TensorRef& out) {
  if (out.dtype != x.dtype || x.shape[0] < 1 || x.shape[0] > kMaxGemvRows) return false;
  if (weight.is_int4()) return rows_are_vectors(x.shape[1], {x.data});
  const TensorRef& matrix = weight.blocks[0];
  return weight.count == 1 && matrix.dtype == x.dtype && rows_are_vectors(x.shape[1], {x.data, matrix.data});
}

// A weight in 16 bits; none where it is in 4.
const TensorRef* stored(const LinearWeight& weight) {
  return !weight.is_int4() && weight.count == 1 ? &weight.blocks[0] : nullptr;
}

template <typename Weight, typename Output>
void launch_projection(const char* name, const Exec& exec, const LinearContext& context, const TensorRef& x,
                       const Weight& weight, const Output& output) {
  const GemvLayout layout = gemv_layout(weight, linear_multiprocessors(context));
  const ProjectionArgs<Weight, Output> args{weight, streamed_input<typename Weight::T>(x), output, layout.depth};
  launch(name, project<Weight, Output>, layout.dims, exec.stream, args);
}

// Calls `with(weight)` with the tiles' partners `partner_rows` apart, in runs that begin every `run_stride` rows
// (0: there is one run). False where a run is no whole number of tiles.
template <typename T, typename With>
bool with_partners(const LinearWeight& weight, std::int64_t partner_rows, std::int64_t run_stride, const With& with) {
  const auto stream = [&]<typename Weight>(Weight streamed) {
    if (partner_rows % Weight::kBand != 0) return false;
    streamed.rows = static_cast<int>(weight.rows());
    streamed.columns = static_cast<int>(weight.columns());
    streamed.tile_rows = {.tiles = streamed.rows / (2 * Weight::kBand),
                          .run_tiles = static_cast<int>(partner_rows) / Weight::kBand,
                          .run_stride = static_cast<int>(run_stride),
                          .high_offset = static_cast<int>(partner_rows)};
    with(streamed);
    return true;
  };
  if (weight.is_int4()) return stream(StreamedInt4<T, 2>{.data = weight.int4.data});
  return stream(StreamedWeight<T>{.data = static_cast<const T*>(weight.blocks[0].data)});
}

}  // namespace

bool project_qkv(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& query) {
  const auto head_dim = static_cast<int>(kv.k.shape[3]);
  if (const TensorRef* matrix = stored(weight)) {
    if (small_gemm_qkv(exec, linear_multiprocessors(context), x, *matrix, rope, batch, kv, query)) return true;
  }
  if (!takes(x, weight, query) || kv.k.dtype != query.dtype) return false;
  bool done = false;
  dispatch_16bit(query.dtype, "projecting q, k and v", [&](auto element) {
    using T = decltype(element);
    const QkvOutput<T> output = qkv_output<T>(rope, batch, kv, query);
    done = with_partners<T>(weight, head_dim / 2, head_dim, [&](const auto& streamed) {
      launch_projection("project_qkv", exec, context, x, streamed, output);
    });
  });
  return done;
}

bool project_ffn(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const TensorRef& out) {
  assert(weight.rows() == 2 * out.shape[1]);
  if (const TensorRef* matrix = stored(weight)) {
    if (small_gemm_ffn(exec, linear_multiprocessors(context), x, *matrix, out)) return true;
  }
  if (!takes(x, weight, out)) return false;
  bool done = false;
  dispatch_16bit(out.dtype, "projecting gate and up", [&](auto element) {
    using T = decltype(element);
    const FfnOutput<T> output{out.as<T, 2>()};
    done = with_partners<T>(weight, out.shape[1], 0, [&](const auto& streamed) {
      launch_projection("project_ffn", exec, context, x, streamed, output);
    });
  });
  return done;
}

}  // namespace vesper::cuda
