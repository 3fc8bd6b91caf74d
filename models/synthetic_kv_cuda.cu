// Drawn keys and values on CUDA: a formula in models/synthetic_kv.h, element by element.
//
// Shapes: qkv [tokens, (heads + 2 kv_heads) * head_dim]; key_range [layers, kv_heads].
// Mapping: grid (tokens, pieces of a row); a thread draws and writes four elements, two Philox calls and one 8-byte
//   store. Every operation is one IEEE operation, as on the CPU.
// Byte bound: keys and values written once. It fills a cache once a measurement.
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/numeric.cuh"
#include "models/fill.h"
#include "models/synthetic_kv.h"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 4;  // elements of one draw

template <typename T>
struct DrawArgs {
  TensorView<T, 2> qkv;
  TensorView<const float, 2> key_range;
  TensorView<const std::int32_t, 1> positions;
  TensorView<const std::int32_t, 1> seq_of_token;
  TensorView<const std::int32_t, 1> request;
  std::uint64_t seed = 0;
  std::int64_t head_dim = 0;
  float run_share = 0.0F;
  float token_share = 1.0F;
  int layer = 0;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) draw_rows(const __grid_constant__ DrawArgs<T> args) {
  const std::int64_t t = blockIdx.x;
  const std::int64_t key_columns = args.key_range.shape(1) * args.head_dim;
  const std::int64_t c = (std::int64_t{blockIdx.y} * kThreads + threadIdx.x) * kGroup;
  if (c >= 2 * key_columns) return;
  const int request = args.request(args.seq_of_token(t));
  const int position = args.positions(t);
  const auto values_of = [&](std::int32_t place, bool shared) {
    const std::uint64_t first = drawn_element(request, place, 2 * key_columns) + static_cast<std::uint64_t>(c);
    return uniform_values(first / kGroup, args.seed, drawn_tensor(args.layer, shared), 1.0F);
  };
  const bool is_key = c < key_columns;
  const float range = is_key ? args.key_range(args.layer, c / args.head_dim) : kValueRange;
  const float shared_part = is_key ? args.run_share : kValueShare;
  const float own_part = is_key ? args.token_share : kValueShare;
  const UniformValues shared = values_of(is_key ? position / kDrawnRun : 0, true);
  UniformValues values = values_of(position, false);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    values.value[i] = __fadd_rn(__fmul_rn(shared_part, shared.value[i]), __fmul_rn(own_part, values.value[i]));
  }
  const uint2 packed = {narrow_pair<T>(__fmul_rn(range, values.value[0]), __fmul_rn(range, values.value[1])),
                        narrow_pair<T>(__fmul_rn(range, values.value[2]), __fmul_rn(range, values.value[3]))};
  *reinterpret_cast<uint2*>(&args.qkv(t, args.qkv.shape(1) - 2 * key_columns + c)) = packed;
}

}  // namespace

void draw_kv(const Exec& exec, const DrawnKv& drawn, int layer, const Batch& batch, std::int64_t head_dim,
             const TensorRef& qkv) {
  assert(head_dim % kGroup == 0);
  if (batch.tokens == 0) return;
  dispatch_16bit(qkv.dtype, "drawing keys and values on CUDA", [&](auto element) {
    using T = decltype(element);
    DrawArgs<T> args;
    args.qkv = qkv.as<T, 2>();
    args.key_range = drawn.key_range;
    args.positions = batch.positions;
    args.seq_of_token = batch.seq_of_token;
    args.request = batch.request;
    args.seed = drawn.seed;
    args.run_share = drawn.run_share;
    args.token_share = drawn.token_share;
    args.head_dim = head_dim;
    args.layer = layer;
    const std::int64_t groups = 2 * drawn.key_range.shape(1) * head_dim / kGroup;
    launch(
        "draw_rows", draw_rows<T>,
        {.grid = dim3(static_cast<unsigned>(batch.tokens), static_cast<unsigned>((groups + kThreads - 1) / kThreads)),
         .block = dim3(kThreads)},
        exec.stream, args);
  });
}

}  // namespace vesper::cuda
