// The append pass on CUDA: rotate q and k, store k and v.
//
//   low' = low cos a - high sin a,  high' = high cos a + low sin a,  a = position * inv_freq[d]
//   cos and sin times the attention factor; low = x[d], high = x[d + head_dim / 2], d < head_dim / 2; arithmetic
//   in fp32, one rounding at the end
//
// Shapes: qkv [tokens, heads + 2 kv_heads, head_dim] row-major; q_out [tokens, heads, head_dim]; K and V
//   [pages, kv_heads, page_tokens, head_dim] in tile order (kvcache/layout.h).
// Mapping: grid (tokens, pieces of a token's row). A block fills cos and sin of its token into shared memory once; then
//   a thread takes 8 channels of the low half of one head and their 8 partners: two 16-byte loads, two 16-byte stores,
//   neighbouring threads on neighbouring chunks. The swizzle permutes chunks inside one 128-byte line, so the stores
//   stay whole lines.
// Byte bound: qkv read once, q_out, K and V written once: 2 * tokens * (heads + 2 kv_heads) * head_dim * 2 bytes.
// Source: Su et al., arXiv 2104.09864, in the channel pairing of transformers' models/llama/modeling_llama.py.
#include <string>

#include "engine/core/launch.cuh"
#include "engine/core/numeric.cuh"
#include "engine/core/overlap.cuh"
#include "kvcache/append.h"
#include "kvcache/rotate.cuh"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 8;  // 16-bit channels in 16 bytes

template <typename T>
struct AppendArgs {
  TensorView<const T, 3> qkv;  // [tokens, heads + 2 kv_heads, head_dim]
  TensorView<T, 3> q_out;      // [tokens, heads, head_dim]
  TensorView<T, 4> k;          // [pages, kv_heads, page_tokens, head_dim] tiles
  TensorView<T, 4> v;
  Rope rope;
  TensorView<const std::int32_t, 1> positions;
  TensorView<const std::int32_t, 1> seq_of_token;
  TensorView<const std::int32_t, 2> page_table;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int page_tokens = 0;
};

// Eight channels and their partners, rotated in place.
template <typename T>
__device__ void rotate(uint4& low, uint4& high, const float2* rotation) {
  auto* low_pairs = reinterpret_cast<unsigned*>(&low);
  auto* high_pairs = reinterpret_cast<unsigned*>(&high);
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const float2 x = widen_pair<T>(low_pairs[i]);
    const float2 y = widen_pair<T>(high_pairs[i]);
    const float2 first = rotation[2 * i];  // (cos, sin)
    const float2 second = rotation[2 * i + 1];
    low_pairs[i] = narrow_pair<T>(rotated_low(x.x, y.x, first), rotated_low(x.y, y.y, second));
    high_pairs[i] = narrow_pair<T>(rotated_high(x.x, y.x, first), rotated_high(x.y, y.y, second));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) append(const __grid_constant__ AppendArgs<T> args) {
  extern __shared__ float2 rotation[];  // [head_dim / 2] (cos, sin) of the token's position
  let_next_start();
  wait_for_previous();
  const std::int64_t t = blockIdx.x;
  const int half = args.head_dim / 2;
  const int position = args.positions(t);
  const int seq = args.seq_of_token(t);
  for (int d = static_cast<int>(threadIdx.x); d < half; d += kThreads) {
    rotation[d] = rotary_turn(args.rope, seq, position, d);
  }
  __syncthreads();

  const int pieces = half / kChunk;  // of a head
  const int piece = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  const int row = piece / pieces;  // of q, then k, then v
  const int d = piece % pieces * kChunk;
  if (row >= args.heads + 2 * args.kv_heads) return;
  uint4 low = *reinterpret_cast<const uint4*>(&args.qkv(t, row, d));
  uint4 high = *reinterpret_cast<const uint4*>(&args.qkv(t, row, d + half));
  if (row < args.heads + args.kv_heads) rotate<T>(low, high, rotation + d);

  if (row < args.heads) {
    *reinterpret_cast<uint4*>(&args.q_out(t, row, d)) = low;
    *reinterpret_cast<uint4*>(&args.q_out(t, row, d + half)) = high;
    return;
  }
  const int line = position % args.page_tokens;
  const int page = args.page_table(seq, position / args.page_tokens);
  const bool is_key = row < args.heads + args.kv_heads;
  const int g = row - args.heads - (is_key ? 0 : args.kv_heads);
  T* tile = &(is_key ? args.k : args.v)(page, g, 0, 0);
  *reinterpret_cast<uint4*>(tile + tile_offset(line, d, args.head_dim)) = low;
  *reinterpret_cast<uint4*>(tile + tile_offset(line, d + half, args.head_dim)) = high;
}

template <typename T>
void launch_append(const Exec& exec, const TensorRef& qkv, const Rope& rope, const Batch& batch, const LayerKv& kv,
                   const TensorRef& q_out) {
  AppendArgs<T> args;
  args.k = kv.k.as<T, 4>();
  args.v = kv.v.as<T, 4>();
  args.kv_heads = static_cast<int>(args.k.shape(1));
  args.page_tokens = static_cast<int>(args.k.shape(2));
  args.head_dim = static_cast<int>(args.k.shape(3));
  args.heads = static_cast<int>(q_out.shape[1] / args.head_dim);
  const int rows = args.heads + 2 * args.kv_heads;
  args.qkv = TensorView<const T, 3>(static_cast<const T*>(qkv.data), qkv.shape[0], rows, args.head_dim);
  args.q_out = TensorView<T, 3>(static_cast<T*>(q_out.data), q_out.shape[0], args.heads, args.head_dim);
  args.rope = rope;
  args.positions = batch.positions;
  args.seq_of_token = batch.seq_of_token;
  args.page_table = batch.page_table;
  const int pieces = rows * (args.head_dim / (2 * kChunk));
  launch("append", append<T>,
         {.grid = dim3(static_cast<unsigned>(batch.tokens), static_cast<unsigned>((pieces + kThreads - 1) / kThreads)),
          .block = dim3(kThreads),
          .shared_bytes = static_cast<size_t>(args.head_dim / 2) * sizeof(float2),
          .overlap = true},
         exec.stream, args);
}

}  // namespace

void append_kv(const Exec& exec, const TensorRef& qkv, const Rope& rope, const Batch& batch, const LayerKv& kv,
               const TensorRef& q_out) {
  assert(qkv.dtype == kv.k.dtype && q_out.dtype == kv.k.dtype);
  assert(qkv.shape[1] == q_out.shape[1] + 2 * kv.k.shape[1] * kv.k.shape[3]);
  const std::int64_t head_dim = kv.k.shape[3];
  if (head_dim % (2 * kChunk) != 0) {
    refuse({"appending to the cache on CUDA", "head_dim " + std::to_string(head_dim), "a multiple of 16",
            "--device cpu takes any even head_dim"});
  }
  if (batch.tokens == 0) return;
  switch (kv.k.dtype) {
    case DType::kBf16:
      return launch_append<bf16>(exec, qkv, rope, batch, kv, q_out);
    case DType::kF16:
      return launch_append<f16>(exec, qkv, rope, batch, kv, q_out);
    default:
      refuse({"appending to the cache on CUDA", std::string(dtype_name(kv.k.dtype)), "bf16 or f16", ""});
  }
}

}  // namespace vesper::cuda
