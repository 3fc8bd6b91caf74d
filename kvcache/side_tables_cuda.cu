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
// Mapping: grid (layers * kv_heads, pages that one sequence's tokens can touch, seqs); a block whose page holds none of
//   them leaves. Bounds and moments: a thread a channel, down the lines, so that sums have the CPU's order; a warp's 32
//   channels are those of one scale. Int4: a warp a line, a lane every 32nd pair of channels; blocks are as wide as a
//   page of 16 lines asks for only where there are int4 keys.
// Every operation is one IEEE operation, as on the CPU, so both devices write the same bits for the same keys.
// A decode step rebuilds one page a KV head: its time is that of one load after another, so all lines of a tile are
//   read at once and no warp has a second line of a page of 16. Layers whose step does not read its own entries are
//   written together (attention/attention.h): their addresses are the kernel's parameters, which a graph keeps.
// Byte bound: K of the touched pages read once, their tables written once. K is read here a second time for int4, from
//   the first-level cache: a tile is 4 KiB at 16 x 128.
// Source: bounds, Tang et al., "Quest", arXiv 2406.10774; int4 keys, Lin et al., "Twilight", arXiv 2502.02770; packing
//   and moments are ours.
#include <algorithm>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/numeric.cuh"
#include "engine/core/overlap.cuh"
#include "kvcache/side_tables.h"

namespace vesper::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kWarpThreads = 32;
constexpr int kMostLayers = 64;  // of a launch: parameters of a kernel are 4 KiB at the most before CUDA 12.1
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// The keys and tables of one layer, or of one of its pages and KV heads; tables that are not wanted are null.
template <typename T>
struct KeyTables {
  const T* k = nullptr;                 // [page_tokens, head_dim] tiles
  T* bounds = nullptr;                  // [2, head_dim]
  std::uint8_t* int8_bounds = nullptr;  // [2, head_dim]
  bf16* int8_scales = nullptr;          // [2, spans]
  float* moments = nullptr;             // [2, head_dim]
  std::uint8_t* int4 = nullptr;         // [page_tokens, head_dim / 2]
  f16* int4_params = nullptr;           // [page_tokens, {scale, zero}]
};

template <typename T, int kLayers>
struct SideArgs {
  KeyTables<T> layer[kLayers];
  TensorView<const std::int32_t, 1> positions;
  TensorView<const std::int32_t, 1> query_start;
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 2> page_table;
  int kv_heads = 0;
  int page_tokens = 0;
  int head_dim = 0;
};

// Of page and KV head number `place` of a layer.
template <typename T>
__device__ KeyTables<T> tables_at(const KeyTables<T>& layer, std::int64_t place, int page_tokens, int head_dim) {
  const auto at = [place](auto* table, int size) { return table == nullptr ? nullptr : table + place * size; };
  return {.k = layer.k + place * page_tokens * head_dim,
          .bounds = at(layer.bounds, 2 * head_dim),
          .int8_bounds = at(layer.int8_bounds, 2 * head_dim),
          .int8_scales = at(layer.int8_scales, 2 * static_cast<int>(bound_spans(head_dim))),
          .moments = at(layer.moments, 2 * head_dim),
          .int4 = at(layer.int4, page_tokens * (head_dim / 2)),
          .int4_params = at(layer.int4_params, 2 * page_tokens)};
}

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
__device__ void write_span(const KeyTables<T>& to, float least, float largest, int head_dim, int d) {
  const bf16 below = bound_scale(warp_largest(fabsf(least)));
  const bf16 above = bound_scale(warp_largest(fabsf(largest)));
  if (d >= head_dim) return;
  to.int8_bounds[d] = static_cast<std::uint8_t>(kBoundZero - steps_up(-least, widen(below)));
  to.int8_bounds[head_dim + d] = static_cast<std::uint8_t>(kBoundZero + steps_up(largest, widen(above)));
  if (d % kBoundSpan != 0) return;
  to.int8_scales[d / kBoundSpan] = below;
  to.int8_scales[static_cast<int>(bound_spans(head_dim)) + d / kBoundSpan] = above;
}

// A channel's least and largest key.
struct Range {
  float least = 0.0F;
  float largest = 0.0F;
};

// Bounds and moments of channel d over the first `lines` lines of a tile, kAtOnce of them in flight.
template <typename T>
__device__ Range write_channel(const KeyTables<T>& to, int lines, int head_dim, int d) {
  constexpr int kAtOnce = 16;
  T least = {};
  T largest = {};
  float sum = 0.0F;
  float squares = 0.0F;
  for (int first = 0; first < lines; first += kAtOnce) {
    T stored[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) stored[i] = to.k[tile_offset(min(first + i, lines - 1), d, head_dim)];
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
  if (to.bounds != nullptr) {
    to.bounds[d] = least;
    to.bounds[head_dim + d] = largest;
  }
  if (to.moments != nullptr) {
    to.moments[d] = sum;
    to.moments[head_dim + d] = squares;
  }
  return {widen(least), widen(largest)};
}

// One line in four bits a channel, by one warp. A zero is added to the extremes because of -0: which of +0 and -0 is
// the extreme must not depend on the order of comparison.
template <typename T>
__device__ void write_line(const KeyTables<T>& to, int t, int head_dim) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  const auto pair_of = [&](int c) {
    return widen_pair<T>(*reinterpret_cast<const unsigned*>(to.k + tile_offset(t, 2 * c, head_dim)));
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
    to.int4[t * (head_dim / 2) + c] =
        static_cast<std::uint8_t>(code_of(keys.x, scale, zero) | (code_of(keys.y, scale, zero) << 4));
  }
  if (lane == 0) {
    to.int4_params[2 * t] = scale_bits;
    to.int4_params[2 * t + 1] = zero_bits;
  }
}

template <typename T, int kLayers>
__global__ void __launch_bounds__(kMostThreads) rebuild_side_tables(const __grid_constant__ SideArgs<T, kLayers> args) {
  const int s = static_cast<int>(blockIdx.z);
  let_next_start();
  const int first = args.query_start(s);
  const int last = args.query_start(s + 1) - 1;
  const int page_tokens = args.page_tokens;
  const int head_dim = args.head_dim;
  const int p = first > last ? 0 : args.positions(first) / page_tokens + static_cast<int>(blockIdx.y);
  if (first > last || p > args.positions(last) / page_tokens) return wait_for_previous();

  const auto layer = static_cast<int>(blockIdx.x) / args.kv_heads;
  const auto g = static_cast<int>(blockIdx.x) % args.kv_heads;
  const std::int64_t place = std::int64_t{args.page_table(s, p)} * args.kv_heads + g;
  const KeyTables<T> to = tables_at(args.layer[layer], place, page_tokens, head_dim);
  const int lines = min(page_tokens, args.kv_len(s) - p * page_tokens);
  const auto threads = static_cast<int>(blockDim.x);
  wait_for_previous();
  if (to.bounds != nullptr || to.moments != nullptr || to.int8_bounds != nullptr) {
    static_assert(kBoundSpan == kWarpThreads);
    const int lanes_end = (head_dim + kWarpThreads - 1) / kWarpThreads * kWarpThreads;  // whole warps
    for (int d = static_cast<int>(threadIdx.x); d < lanes_end; d += threads) {
      Range range;
      if (d < head_dim) range = write_channel(to, lines, head_dim, d);
      if (to.int8_bounds != nullptr) write_span(to, range.least, range.largest, head_dim, d);
    }
  }
  if (to.int4 != nullptr) {
    for (int t = static_cast<int>(threadIdx.x) / kWarpThreads; t < lines; t += threads / kWarpThreads) {
      write_line(to, t, head_dim);
    }
  }
}

template <typename T>
KeyTables<T> tables_of(const LayerKv& kv) {
  return {.k = static_cast<const T*>(kv.k.data),
          .bounds = static_cast<T*>(kv.bounds.data),
          .int8_bounds = static_cast<std::uint8_t*>(kv.int8_bounds.data),
          .int8_scales = static_cast<bf16*>(kv.int8_scales.data),
          .moments = static_cast<float*>(kv.moments.data),
          .int4 = static_cast<std::uint8_t*>(kv.int4.data),
          .int4_params = static_cast<f16*>(kv.int4_params.data)};
}

template <typename T, int kLayers>
void launch_rebuild(const Exec& exec, const Batch& batch, std::span<const LayerKv> layers) {
  const LayerKv& kv = layers[0];
  SideArgs<T, kLayers> args;
  std::transform(layers.begin(), layers.end(), args.layer, tables_of<T>);
  args.positions = batch.positions;
  args.query_start = batch.query_start;
  args.kv_len = batch.kv_len;
  args.page_table = batch.page_table;
  args.kv_heads = static_cast<int>(kv.k.shape[1]);
  args.page_tokens = static_cast<int>(kv.k.shape[2]);
  args.head_dim = static_cast<int>(kv.k.shape[3]);
  const int channels = (args.head_dim + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
  const bool int4 =
      std::any_of(layers.begin(), layers.end(), [](const LayerKv& layer) { return layer.int4.data != nullptr; });
  const int threads = int4 ? kMostThreads : std::min(channels, kMostThreads);
  // Pages that the tokens of one sequence can touch: the first may begin in mid-page.
  const int pages = (batch.max_query_tokens + args.page_tokens - 2) / args.page_tokens + 1;
  launch("rebuild_side_tables", rebuild_side_tables<T, kLayers>,
         {.grid = dim3(static_cast<unsigned>(layers.size()) * static_cast<unsigned>(args.kv_heads),
                       static_cast<unsigned>(pages), static_cast<unsigned>(batch.seqs)),
          .block = dim3(static_cast<unsigned>(threads)),
          .overlap = true},
         exec.stream, args);
}

}  // namespace

void update_side_tables(const Exec& exec, const Batch& batch, std::span<const LayerKv> layers) {
  if (batch.tokens == 0) return;
  dispatch_16bit(layers[0].k.dtype, "keeping facts about keys on CUDA", [&](auto element) {
    using T = decltype(element);
    if (layers.size() == 1) return launch_rebuild<T, 1>(exec, batch, layers);
    for (std::size_t first = 0; first < layers.size(); first += kMostLayers) {
      launch_rebuild<T, kMostLayers>(exec, batch,
                                     layers.subspan(first, std::min<std::size_t>(kMostLayers, layers.size() - first)));
    }
  });
}

}  // namespace vesper::cuda
