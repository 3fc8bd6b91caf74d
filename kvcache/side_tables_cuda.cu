// The side tables on CUDA: page bounds, page moments and int4 keys of the pages that a step wrote to, rebuilt from the
// stored keys.
//
//   bounds   least, largest key a channel, also in 8 bits outward: scale = least bf16 with 127 scale >= |bounds| of 32
//            channels, code = whole steps of it, down for the least, up for the largest
//   moments  sum k, sum k^2 a channel, in the order of the lines
//   int4     zero = f16(min), scale = f16((max - zero) / 15), code = round((k - zero) / scale) in 0 ... 15, a line each
//
// Shapes: K [pages, kv_heads, page_tokens, head_dim] in tile order (kvcache/layout.h); tables as in
//   kvcache/side_tables.h. Any head_dim that the append pass takes, a multiple of 16.
// Mapping: grid (kv_heads, pages that one sequence's tokens can touch, seqs); a block whose page holds none of them
//   leaves. Bounds and moments: a thread a channel, down the lines, so that sums have the CPU's order; a warp's 32
//   channels are those of one scale. Int4: a warp a line, a lane every 32nd pair of channels.
// Every operation is one IEEE operation, as on the CPU, so both devices write the same bits for the same keys.
// A decode step rebuilds one page a KV head: its time is that of one load after another, so all lines of a tile are
//   read at once and no warp has a second line of a page of 16.
// Byte bound: K of the touched pages read once, their tables written once. K is read here a second time for int4, from
//   the first-level cache: a tile is 4 KiB at 16 x 128.
// Source: bounds, Tang et al., "Quest", arXiv 2406.10774; int4 keys, Lin et al., "Twilight", arXiv 2502.02770; packing
//   and moments are ours.
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/numeric.cuh"
#include "engine/core/overlap.cuh"
#include "kvcache/side_tables.h"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

template <typename T>
struct SideArgs {
  TensorView<const T, 4> k;  // [pages, kv_heads, page_tokens, head_dim] tiles
  // Those that are not wanted have no data.
  TensorView<T, 4> bounds;                  // [pages, kv_heads, 2, head_dim]
  TensorView<std::uint8_t, 4> int8_bounds;  // likewise
  TensorView<bf16, 4> int8_scales;          // [pages, kv_heads, 2, spans]
  TensorView<float, 4> moments;             // [pages, kv_heads, 2, head_dim]
  TensorView<std::uint8_t, 4> int4;         // [pages, kv_heads, page_tokens, head_dim / 2]
  TensorView<f16, 4> int4_params;           // [pages, kv_heads, page_tokens, {scale, zero}]
  TensorView<const std::int32_t, 1> positions;
  TensorView<const std::int32_t, 1> query_start;
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 2> page_table;
};

__device__ float warp_least(float x) {
#pragma unroll
  for (int step = kWarpThreads / 2; step > 0; step /= 2) x = fminf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ unsigned code_of(float key, float scale, float zero) {
  if (scale == 0.0F) return 0U;
  const float steps = rintf(__fdiv_rn(__fsub_rn(key, zero), scale));
  return steps > 0.0F ? static_cast<unsigned>(fminf(steps, 15.0F)) : 0U;
}

__device__ float warp_largest(float x) {
#pragma unroll
  for (int step = kWarpThreads / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// The least scale whose 127-fold reaches `magnitude`.
__device__ bf16 bound_scale(float magnitude) {
  bf16 scale{static_cast<std::uint16_t>(__float_as_uint(__fdiv_rn(magnitude, 127.0F)) >> 16)};
  while (__fmul_rn(127.0F, widen(scale)) < magnitude) ++scale.bits;
  return scale;
}

// The least number of steps that reaches `bound`; the quotient may have been rounded down to a whole number.
__device__ int steps_up(float bound, float scale) {
  if (scale == 0.0F) return 0;
  float steps = ceilf(__fdiv_rn(bound, scale));
  if (__fmul_rn(steps, scale) < bound) steps = __fadd_rn(steps, 1.0F);
  return static_cast<int>(fmaxf(fminf(steps, 127.0F), -127.0F));
}

// A warp writes one span in 8 bits, a lane its channel d; lanes behind the last channel hold bounds of zero.
template <typename T>
__device__ void write_span(const SideArgs<T>& args, float least, float largest, int head_dim, int page, int g, int d) {
  const bf16 below = bound_scale(warp_largest(fabsf(least)));
  const bf16 above = bound_scale(warp_largest(fabsf(largest)));
  if (d >= head_dim) return;
  args.int8_bounds(page, g, 0, d) = static_cast<std::uint8_t>(kBoundZero - steps_up(-least, widen(below)));
  args.int8_bounds(page, g, 1, d) = static_cast<std::uint8_t>(kBoundZero + steps_up(largest, widen(above)));
  if (d % kBoundSpan != 0) return;
  args.int8_scales(page, g, 0, d / kBoundSpan) = below;
  args.int8_scales(page, g, 1, d / kBoundSpan) = above;
}

// A channel's least and largest key.
struct Range {
  float least = 0.0F;
  float largest = 0.0F;
};

// Bounds and moments of channel d over the first `lines` lines of a tile, kAtOnce of them in flight.
template <typename T>
__device__ Range write_channel(const SideArgs<T>& args, const T* tile, int lines, int head_dim, int page, int g,
                               int d) {
  constexpr int kAtOnce = 16;
  T least = {};
  T largest = {};
  float sum = 0.0F;
  float squares = 0.0F;
  for (int first = 0; first < lines; first += kAtOnce) {
    T stored[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) stored[i] = tile[tile_offset(min(first + i, lines - 1), d, head_dim)];
    if (first == 0) least = largest = stored[0];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= lines) break;
      const float key = widen(stored[i]);
      if (key < widen(least)) least = stored[i];
      if (key > widen(largest)) largest = stored[i];
      sum = __fadd_rn(sum, key);
      squares = __fadd_rn(squares, __fmul_rn(key, key));
    }
  }
  if (args.bounds.data() != nullptr) {
    args.bounds(page, g, 0, d) = least;
    args.bounds(page, g, 1, d) = largest;
  }
  if (args.moments.data() != nullptr) {
    args.moments(page, g, 0, d) = sum;
    args.moments(page, g, 1, d) = squares;
  }
  return {widen(least), widen(largest)};
}

// One line in four bits a channel, by one warp. A zero is added to the extremes because of -0: which of +0 and -0 is
// the extreme must not depend on the order of comparison.
template <typename T>
__device__ void write_line(const SideArgs<T>& args, const T* tile, int t, int head_dim, int page, int g) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  const auto pair_of = [&](int c) {
    return widen_pair<T>(*reinterpret_cast<const unsigned*>(tile + tile_offset(t, 2 * c, head_dim)));
  };
  float least = INFINITY;
  float negated = INFINITY;  // least of -k
  for (int c = lane; c < head_dim / 2; c += kWarpThreads) {
    const float2 keys = pair_of(c);
    least = fminf(least, fminf(keys.x, keys.y));
    negated = fminf(negated, fminf(-keys.x, -keys.y));
  }
  const f16 zero_bits = narrow<f16>(__fadd_rn(warp_least(least), 0.0F));
  const float zero = widen(zero_bits);
  const float largest = __fadd_rn(-warp_least(negated), 0.0F);
  const f16 scale_bits = narrow<f16>(__fdiv_rn(__fsub_rn(largest, zero), 15.0F));
  const float scale = widen(scale_bits);
  for (int c = lane; c < head_dim / 2; c += kWarpThreads) {
    const float2 keys = pair_of(c);
    args.int4(page, g, t, c) =
        static_cast<std::uint8_t>(code_of(keys.x, scale, zero) | (code_of(keys.y, scale, zero) << 4));
  }
  if (lane == 0) {
    args.int4_params(page, g, t, 0) = scale_bits;
    args.int4_params(page, g, t, 1) = zero_bits;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rebuild_side_tables(const __grid_constant__ SideArgs<T> args) {
  const int g = static_cast<int>(blockIdx.x);
  const int s = static_cast<int>(blockIdx.z);
  let_next_start();
  const int first = args.query_start(s);
  const int last = args.query_start(s + 1) - 1;
  const int page_tokens = static_cast<int>(args.k.shape(2));
  const int head_dim = static_cast<int>(args.k.shape(3));
  const int p = first > last ? 0 : args.positions(first) / page_tokens + static_cast<int>(blockIdx.y);
  if (first > last || p > args.positions(last) / page_tokens) return wait_for_previous();

  const int page = args.page_table(s, p);
  const int lines = min(page_tokens, args.kv_len(s) - p * page_tokens);
  wait_for_previous();
  const T* tile = &args.k(page, g, 0, 0);
  const bool in_int8 = args.int8_bounds.data() != nullptr;
  if (args.bounds.data() != nullptr || args.moments.data() != nullptr || in_int8) {
    static_assert(kBoundSpan == kWarpThreads);
    const int lanes_end = (head_dim + kWarpThreads - 1) / kWarpThreads * kWarpThreads;  // whole warps
    for (int d = static_cast<int>(threadIdx.x); d < lanes_end; d += kThreads) {
      Range range;
      if (d < head_dim) range = write_channel(args, tile, lines, head_dim, page, g, d);
      if (in_int8) write_span(args, range.least, range.largest, head_dim, page, g, d);
    }
  }
  if (args.int4.data() != nullptr) {
    constexpr int kWarps = kThreads / kWarpThreads;
    for (int t = static_cast<int>(threadIdx.x) / kWarpThreads; t < lines; t += kWarps) {
      write_line(args, tile, t, head_dim, page, g);
    }
  }
}

}  // namespace

void update_side_tables(const Exec& exec, const Batch& batch, const LayerKv& kv) {
  if (batch.tokens == 0) return;
  dispatch_16bit(kv.k.dtype, "keeping facts about keys on CUDA", [&](auto element) {
    using T = decltype(element);
    SideArgs<T> args;
    args.k = kv.k.as<const T, 4>();
    if (kv.bounds.data != nullptr) args.bounds = kv.bounds.as<T, 4>();
    if (kv.int8_bounds.data != nullptr) {
      args.int8_bounds = kv.int8_bounds.as<std::uint8_t, 4>();
      args.int8_scales = kv.int8_scales.as<bf16, 4>();
    }
    if (kv.moments.data != nullptr) args.moments = kv.moments.as<float, 4>();
    if (kv.int4.data != nullptr) {
      args.int4 = kv.int4.as<std::uint8_t, 4>();
      args.int4_params = kv.int4_params.as<f16, 4>();
    }
    args.positions = batch.positions;
    args.query_start = batch.query_start;
    args.kv_len = batch.kv_len;
    args.page_table = batch.page_table;
    const auto kv_heads = static_cast<unsigned>(args.k.shape(1));
    const auto page_tokens = static_cast<int>(args.k.shape(2));
    // Pages that the tokens of one sequence can touch: the first may begin in mid-page.
    const auto pages = static_cast<unsigned>((batch.max_query_tokens + page_tokens - 2) / page_tokens + 1);
    launch("rebuild_side_tables", rebuild_side_tables<T>,
           {.grid = dim3(kv_heads, pages, static_cast<unsigned>(batch.seqs)), .block = dim3(kThreads), .overlap = true},
           exec.stream, args);
  });
}

}  // namespace vesper::cuda
