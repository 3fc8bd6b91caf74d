// The products that open a decoder block's halves, with the step after in the same kernel.
//
//   y = x W^T, then
//     qkv   rotate the pairs (d, d + head_dim / 2) of q and k; q to `query`, k and v to their cache rows
//     ffn   silu(gate) * up
//
// Shapes: x [tokens, hidden], W [rows, hidden], query [tokens, heads * head_dim], out [tokens, ffn], all of one 16-bit
//   type; K and V in the tile order of kvcache/layout.h. Tokens: 1 to kMaxGemvRows.
// Mapping: the product is models/gemv.cuh. A tile's low rows and its high ones are partners, so that a thread has both
//   of a pair: channels d and d + head_dim / 2 of a head, or a gate and its up.
// Rounding: every value that the composition would have stored is rounded where it would have been.
// Bytes: W once, see project_qkv_cost() and project_ffn_cost().
// The norm before is a kernel of its own (models/norm_cuda.cu): done here by every block for itself, the rows that it
//   reads queue up behind the first weights, and the weights wait for the norm.
// Source: formulas of kvcache/append.h, models/rows.h.
#include <cassert>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "kvcache/rotate.cuh"
#include "models/gemv.cuh"
#include "models/gemv_int4.cuh"
#include "models/projections.h"

namespace vesper::cuda {
namespace {

template <typename T>
struct QkvOutput {
  TensorView<T, 3> query;  // [tokens, heads, head_dim]
  TensorView<T, 4> k;      // [pages, kv_heads, page_tokens, head_dim] tiles
  TensorView<T, 4> v;
  Rope rope;
  TensorView<const std::int32_t, 1> positions;
  TensorView<const std::int32_t, 1> seq_of_token;
  TensorView<const std::int32_t, 2> page_table;

  // `row`: of a head's first half.
  __device__ void operator()(int t, int row, float low_sum, float high_sum) const {
    const int head_dim = static_cast<int>(query.shape(2));
    const int heads = static_cast<int>(query.shape(1));
    const int kv_heads = static_cast<int>(k.shape(1));
    const int half = head_dim / 2;
    const int head = row / head_dim;
    const int d = row % head_dim;
    T low = narrow<T>(low_sum);
    T high = narrow<T>(high_sum);
    const int seq = seq_of_token(t);
    const int position = positions(t);
    if (head < heads + kv_heads) {
      const float2 turn = rotary_turn(rope, seq, position, d);
      const float x = widen(low);
      const float y = widen(high);
      low = narrow<T>(rotated_low(x, y, turn));
      high = narrow<T>(rotated_high(x, y, turn));
    }
    if (head < heads) {
      query(t, head, d) = low;
      query(t, head, d + half) = high;
      return;
    }
    const int page_tokens = static_cast<int>(k.shape(2));
    const int line = position % page_tokens;
    const int page = page_table(seq, position / page_tokens);
    const bool is_key = head < heads + kv_heads;
    T* tile = &(is_key ? k : v)(page, head - heads - (is_key ? 0 : kv_heads), 0, 0);
    tile[tile_offset(line, d, head_dim)] = low;
    tile[tile_offset(line, d + half, head_dim)] = high;
  }
};

template <typename T>
struct FfnOutput {
  TensorView<T, 2> out;  // [tokens, ffn]

  __device__ void operator()(int t, int row, float gate_sum, float up_sum) const {
    const float gate = widen(narrow<T>(gate_sum));
    const float up = widen(narrow<T>(up_sum));
    out(t, row) = narrow<T>(gate / (1.0F + expf(-gate)) * up);
  }
};

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
  if (!takes(x, weight, query) || kv.k.dtype != query.dtype) return false;
  bool done = false;
  dispatch_16bit(query.dtype, "projecting q, k and v", [&](auto element) {
    using T = decltype(element);
    const QkvOutput<T> output{
        .query = TensorView<T, 3>(static_cast<T*>(query.data), query.shape[0], query.shape[1] / head_dim, head_dim),
        .k = kv.k.as<T, 4>(),
        .v = kv.v.as<T, 4>(),
        .rope = rope,
        .positions = batch.positions,
        .seq_of_token = batch.seq_of_token,
        .page_table = batch.page_table};
    done = with_partners<T>(weight, head_dim / 2, head_dim, [&](const auto& streamed) {
      launch_projection("project_qkv", exec, context, x, streamed, output);
    });
  });
  return done;
}

bool project_ffn(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
                 const TensorRef& out) {
  assert(weight.rows() == 2 * out.shape[1]);
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
