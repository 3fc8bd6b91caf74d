// The products that open a decoder block's halves, with the norm before and the step after in the same kernel.
//
//   sum = residual + addend, x = rms_norm(sum), y = x W^T, then
//     qkv   rotate the pairs (d, d + head_dim / 2) of q and k; q to `query`, k and v to their cache rows
//     ffn   silu(gate) * up
//
// Shapes: residual, addend, sum [tokens, hidden], W [rows, hidden], query [tokens, heads * head_dim], out [tokens,
// ffn],
//   all of one 16-bit type; K and V in the tile order of kvcache/layout.h. Tokens: 1 to kMaxGemvRows.
// Mapping: the product is models/gemv.cuh. Every block norms all tokens for itself, into shared memory: 3 * tokens *
//   hidden * 2 bytes from L2 each, while its first weights are on their way; block 0 writes the sum. A tile's upper
//   eight rows and its lower eight are partners, so that a thread holds both of a pair: channels d and d + head_dim / 2
//   of a head, or a gate and its up.
// Rounding: every value that the composition would have stored is rounded where it would have been.
// Bytes: W once, see project_qkv_cost() and project_ffn_cost().
// Source: formulas of models/norm.h, kvcache/append.h, models/rows.h.
#include <cassert>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "kvcache/rotate.cuh"
#include "models/gemv.cuh"
#include "models/norm.cuh"
#include "models/projections.h"

namespace vesper::cuda {
namespace {

static_assert(kNormThreads == kGemvThreads);

// Spreads the rows of eight tokens over the banks: 16-byte reads of two neighbouring tokens meet in none.
constexpr int kRowPadding = 32;

template <typename T>
struct InputArgs {
  const T* residual = nullptr;
  const T* addend = nullptr;  // or null
  T* sum = nullptr;
  const T* weight = nullptr;  // of the norm
  float eps = 0.0F;
  int hidden = 0;
  int tokens = 0;
};

template <typename T>
std::size_t shared_bytes(int tokens, int hidden) {
  return sizeof(GemvShared) +
         static_cast<std::size_t>(tokens) * (static_cast<std::size_t>(hidden) + kRowPadding) * sizeof(T);
}

// The normed rows of all tokens, made by the whole block.
template <typename T>
class NormedRows {
 public:
  __device__ NormedRows(const InputArgs<T>& args, T* rows) : args_(args), rows_(rows) {}

  __device__ const T* row(int token) const {
    wait_for_previous();
    make();
    __syncthreads();
    return at(token, 0);
  }

 private:
  __device__ T* at(int token, int d) const { return rows_ + token * (args_.hidden + kRowPadding) + d; }

  __device__ void make() const {
    __shared__ float of_warp[kGemvTokens][kNormWarps];
    constexpr int kStride = kNormThreads * kVectorWidth;
    const int first = static_cast<int>(threadIdx.x) * kVectorWidth;
    for (int t = 0; t < args_.tokens; ++t) {
      const std::int64_t row = static_cast<std::int64_t>(t) * args_.hidden;
      float squares = 0.0F;
      for (int d = first; d < args_.hidden; d += kStride) {
        float x[kVectorWidth];
        load_widened(args_.residual + row + d, x);
        if (args_.addend != nullptr) {
          float addend[kVectorWidth];
          load_widened(args_.addend + row + d, addend);
          add_rounded<T>(x, addend);
          if (blockIdx.x == 0) store_narrowed(args_.sum + row + d, x);
        }
        store_narrowed(at(t, d), x);
        squares = add_squares(x, squares);
      }
      squares = butterfly_sum(squares);
      if (threadIdx.x % 32 == 0) of_warp[t][threadIdx.x / 32] = squares;
    }
    __syncthreads();
    // A thread reads back only what it wrote itself.
    for (int t = 0; t < args_.tokens; ++t) {
      const float scale = norm_scale(sum_of_warps(of_warp[t]), args_.hidden, args_.eps);
      for (int d = first; d < args_.hidden; d += kStride) {
        float x[kVectorWidth];
        float weight[kVectorWidth];
        load_widened(at(t, d), x);
        load_widened(args_.weight + d, weight);
        apply_norm(x, scale, weight);
        store_narrowed(at(t, d), x);
      }
    }
  }

  const InputArgs<T>& args_;
  T* rows_;
};

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

template <typename T, typename Output>
struct ProjectionArgs {
  InputArgs<T> input;
  StreamedWeight<T> weight;
  Output output;
};

template <typename T, typename Output>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    project(const __grid_constant__ ProjectionArgs<T, Output> args) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<GemvShared*>(memory);
  stream_products<T, true>(args.weight, args.input.tokens, shared,
                           NormedRows<T>(args.input, reinterpret_cast<T*>(memory + sizeof(GemvShared))), args.output);
}

// Whether every row may be read 16 bytes at a time and all of it is of one 16-bit type.
bool takes(const BlockInput& input, const LinearWeight& weight, const TensorRef& out) {
  const TensorRef& matrix = weight.blocks[0];
  const DType dtype = input.residual.dtype;
  return weight.count == 1 && matrix.dtype == dtype && out.dtype == dtype && input.weight.dtype == dtype &&
         input.residual.shape[0] >= 1 && input.residual.shape[0] <= kMaxGemvRows &&
         rows_are_vectors(matrix.shape[1],
                          {input.residual.data, input.addend.data, input.sum.data, input.weight.data, matrix.data});
}

template <typename T>
InputArgs<T> input_args(const BlockInput& input) {
  return {.residual = static_cast<const T*>(input.residual.data),
          .addend = static_cast<const T*>(input.addend.data),
          .sum = static_cast<T*>(input.sum.data),
          .weight = static_cast<const T*>(input.weight.data),
          .eps = input.eps,
          .hidden = static_cast<int>(input.residual.shape[1]),
          .tokens = static_cast<int>(input.residual.shape[0])};
}

template <typename T>
StreamedWeight<T> streamed(const LinearWeight& weight, const TileRows& tile_rows) {
  const TensorRef& matrix = weight.blocks[0];
  return {.data = static_cast<const T*>(matrix.data),
          .rows = static_cast<int>(matrix.shape[0]),
          .columns = static_cast<int>(matrix.shape[1]),
          .tile_rows = tile_rows};
}

// False where not one block fits a multiprocessor.
template <typename T, typename Output>
bool launch_projection(const char* name, const Exec& exec, int multiprocessors, const ProjectionArgs<T, Output>& args) {
  const std::size_t bytes = shared_bytes<T>(args.input.tokens, args.input.hidden);
  const int resident = resident_blocks(project<T, Output>, kGemvThreads, bytes);
  if (resident == 0) return false;
  launch(name, project<T, Output>,
         {.grid = dim3(gemv_blocks(args.weight.tile_rows.tiles, resident * multiprocessors)),
          .block = dim3(kGemvThreads),
          .shared_bytes = bytes,
          .overlap = true},
         exec.stream, args);
  return true;
}

}  // namespace

bool project_qkv(const Exec& exec, const LinearContext& context, const BlockInput& input, const LinearWeight& weight,
                 const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& query) {
  const auto head_dim = static_cast<int>(kv.k.shape[3]);
  if (!takes(input, weight, query) || head_dim % kTileRows != 0 || kv.k.dtype != query.dtype) return false;
  bool done = false;
  dispatch_16bit(query.dtype, "projecting q, k and v", [&](auto element) {
    using T = decltype(element);
    const TileRows tile_rows{.tiles = static_cast<int>(weight.rows()) / kTileRows,
                             .run_tiles = head_dim / kTileRows,
                             .run_stride = head_dim,
                             .high_offset = head_dim / 2};
    const QkvOutput<T> output{
        .query = TensorView<T, 3>(static_cast<T*>(query.data), query.shape[0], query.shape[1] / head_dim, head_dim),
        .k = kv.k.as<T, 4>(),
        .v = kv.v.as<T, 4>(),
        .rope = rope,
        .positions = batch.positions,
        .seq_of_token = batch.seq_of_token,
        .page_table = batch.page_table};
    done = launch_projection(
        "project_qkv", exec, linear_multiprocessors(context),
        ProjectionArgs<T, QkvOutput<T>>{input_args<T>(input), streamed<T>(weight, tile_rows), output});
  });
  return done;
}

bool project_ffn(const Exec& exec, const LinearContext& context, const BlockInput& input, const LinearWeight& weight,
                 const TensorRef& out) {
  const std::int64_t ffn = out.shape[1];
  assert(weight.rows() == 2 * ffn);
  if (!takes(input, weight, out) || ffn % 8 != 0) return false;
  bool done = false;
  dispatch_16bit(out.dtype, "projecting gate and up", [&](auto element) {
    using T = decltype(element);
    const TileRows tile_rows{.tiles = static_cast<int>(ffn) / 8,
                             .run_tiles = static_cast<int>(ffn) / 8,
                             .run_stride = 0,
                             .high_offset = static_cast<int>(ffn)};
    done = launch_projection(
        "project_ffn", exec, linear_multiprocessors(context),
        ProjectionArgs<T, FfnOutput<T>>{input_args<T>(input), streamed<T>(weight, tile_rows), {out.as<T, 2>()}});
  });
  return done;
}

}  // namespace vesper::cuda
