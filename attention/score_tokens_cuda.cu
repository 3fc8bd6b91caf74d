// Scores of single tokens on CUDA; semantics in attention/score_tokens.h.
//
//   q       [seqs, heads, head_dim], 16 bits
//   keys    [pages, kv_heads, page_tokens, head_dim / 2] u8 with (scale, zero) f16 pairs, or the cache's own tiles
//   scores  [seqs, heads, capacity] f32
//
// Block (i, g, s) = the i-th 256 (or 512, where there are many blocks) candidates of KV head g of sequence s; a warp
// takes four (or eight) tiles of 16 candidates, which lie on one page each. A tile is one product of tensor cores:
// D[candidate, head] += A[candidate, channel] B[channel, head], the group's query heads being the columns, so that a
// key is read once for all of them. Codes 0 ... 15 are exact in either 16-bit type, their products with q too, and sums
// are fp32: scale and zero enter after the sum.
//
// A sum over channels may take them in any order, so each lane keeps those that one wide load brings: lane 4 r + c
// reads
//   4 bits   bytes c head_dim / 8 ... of rows r and r + 8 of a tile: head_dim / 4 channels in a row; the eight codes of
//            a 32-bit word are taken out in pairs (p, p + 4)
//   16 bits  chunks c, c + 4, ... of eight channels of the same rows
// and holds B of head r for the same channels in the same order: no shared memory.
//
// Bytes: a candidate's key and KV head once (head_dim / 2 + 4, or 2 head_dim), 4 written for each query head.
// Mapping of fragments: attention/mma.cuh. Codes to floats by the exponent's bits: Kim et al., "Who says elephants
// can't run", arXiv 2211.10017, for the idea; constants ours.
#include <bit>
#include <cassert>
#include <cstdint>

#include "attention/mma.cuh"
#include "attention/score_tokens.h"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kTile = 16;      // candidates of one product
constexpr int kWarpTiles = 4;  // at least, of a warp
constexpr int kMostTiles = 8;
constexpr int kColumns = 8;  // query heads of one product

template <typename T>
struct ScoreArgs {
  const T* q;  // [seqs, heads, head_dim]
  const T* k;
  const std::uint8_t* int4;
  const unsigned* int4_params;  // scale in the lower half
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 2> page_table;
  TensorView<const std::int32_t, 3> page_index;  // without data: all tokens
  TensorView<const std::int32_t, 2> page_count;
  TensorView<float, 3> scores;
  std::int32_t dense_limit;
  int kv_heads;
  int group;
  int page_shift;
  int warp_tiles;  // kWarpTiles or kMostTiles
  float scale;
};

// Pairs of channels that a lane holds of a row, and the 32-bit words in which they arrive.
template <int kHeadDim>
constexpr int kPairs = kHeadDim / 8;
template <int kHeadDim, KeySource kSource>
constexpr int kWords = kSource == KeySource::kInt4 ? kHeadDim / 32 : kHeadDim / 8;

// Two codes, in bits 0-3 and 16-19, as a pair of T: put below the leading bit of a power of two whose last place is 1,
// which is then taken off.
template <typename T>
__device__ unsigned widen_codes(unsigned codes);
template <>
__device__ unsigned widen_codes<bf16>(unsigned codes) {
  const unsigned raised = codes | 0x43004300U;  // 128 + code
  const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&raised), __float2bfloat162_rn(128.0F));
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ unsigned widen_codes<f16>(unsigned codes) {
  const unsigned raised = codes | 0x64006400U;  // 1024 + code
  const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&raised), __float2half2_rn(1024.0F));
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Eight neighbouring channels as four pairs, in the order in which this source's keys arrive.
template <KeySource kSource>
__device__ void order_pairs(uint4 channels, unsigned* pairs) {
  if constexpr (kSource == KeySource::kInt4) {
    pairs[0] = __byte_perm(channels.x, channels.z, 0x5410);
    pairs[1] = __byte_perm(channels.x, channels.z, 0x7632);
    pairs[2] = __byte_perm(channels.y, channels.w, 0x5410);
    pairs[3] = __byte_perm(channels.y, channels.w, 0x7632);
  } else {
    pairs[0] = channels.x;
    pairs[1] = channels.y;
    pairs[2] = channels.z;
    pairs[3] = channels.w;
  }
}

// First of the eight channels that lane 4 r + c holds as its i-th four pairs.
template <int kHeadDim, KeySource kSource>
__device__ int channel_of(int c, int i) {
  return kSource == KeySource::kInt4 ? c * (kHeadDim / 4) + 8 * i : 8 * (c + 4 * i);
}

// This lane's part of B for the query heads of one product; zeros past the group.
template <typename T, int kHeadDim, KeySource kSource>
__device__ void load_query(const T* q, int head, int group, int c, unsigned (&pairs)[kPairs<kHeadDim>]) {
#pragma unroll
  for (int i = 0; i < kPairs<kHeadDim> / 4; ++i) {
    uint4 channels = {};
    if (head < group) {
      channels = *reinterpret_cast<const uint4*>(q + head * kHeadDim + channel_of<kHeadDim, kSource>(c, i));
    }
    order_pairs<kSource>(channels, &pairs[4 * i]);
  }
}

// This lane's words of line `line` of tile number `tile`; zeros where the line holds no token.
template <typename T, int kHeadDim, KeySource kSource>
__device__ void load_row(const ScoreArgs<T>& args, std::int64_t tile, int line, bool holds_token, int c,
                         unsigned (&words)[kWords<kHeadDim, kSource>]) {
#pragma unroll
  for (unsigned& word : words) word = 0;
  if (!holds_token) return;
  if constexpr (kSource == KeySource::kInt4) {
    const std::uint8_t* row = args.int4 + ((tile << args.page_shift) + line) * (kHeadDim / 2) + c * (kHeadDim / 8);
    if constexpr (kHeadDim == 128) {
      const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(row));
      words[0] = loaded.x;
      words[1] = loaded.y;
      words[2] = loaded.z;
      words[3] = loaded.w;
    } else {
      const uint2 loaded = __ldcs(reinterpret_cast<const uint2*>(row));
      words[0] = loaded.x;
      words[1] = loaded.y;
    }
  } else {
    const T* from = args.k + (tile << args.page_shift) * kHeadDim;
#pragma unroll
    for (int i = 0; i < kPairs<kHeadDim> / 4; ++i) {
      const int d = channel_of<kHeadDim, kSource>(c, i);
      order_pairs<kSource>(*reinterpret_cast<const uint4*>(from + tile_offset(line, d, kHeadDim)), &words[4 * i]);
    }
  }
}

// Pair i of a row, for A.
template <typename T, int kHeadDim, KeySource kSource>
__device__ unsigned pair_of(const unsigned (&words)[kWords<kHeadDim, kSource>], int i) {
  if constexpr (kSource == KeySource::kInt4) return widen_codes<T>((words[i / 4] >> (4 * (i % 4))) & 0x000F000FU);
  return words[i];
}

template <typename T, int kHeadDim, KeySource kSource, int kProducts>
__global__ void __launch_bounds__(kWarps * 32) score_candidates(const __grid_constant__ ScoreArgs<T> args) {
  // Tiles whose loads are in flight together; a row of 16 bits takes the registers of four of 4 bits.
  constexpr int kTogether = kSource == KeySource::kInt4 ? 4 : 1;
  const auto g = static_cast<int>(blockIdx.y);
  const auto s = static_cast<int>(blockIdx.z);
  let_next_start();
  wait_for_previous();
  const std::int32_t kv_len = args.kv_len(s);
  if (kv_len <= args.dense_limit) return;
  const bool listed = args.page_index.data() != nullptr;
  const int first = (static_cast<int>(blockIdx.x) * kWarps + this_warp()) * args.warp_tiles * kTile;
  // Lane i looks up the page of the warp's tile i; what lies behind the list's end is not used.
  const int own = first + this_lane() % kMostTiles * kTile;
  std::int32_t own_page = own >> args.page_shift;
  if (listed) own_page = own_page < args.page_index.shape(2) ? args.page_index(s, g, own_page) : 0;
  const std::int32_t candidates = listed ? args.page_count(s, g) << args.page_shift : kv_len;
  if (first >= candidates) return;
  const std::int32_t own_place = own < candidates ? args.page_table(s, own_page) : 0;

  const int r = this_lane() / 4;
  const int c = this_lane() % 4;
  unsigned query[kProducts][kPairs<kHeadDim>];
  float sum_of_q[kProducts][2] = {};  // of the two heads whose scores this lane holds
  const T* q = args.q + (std::int64_t{s} * args.kv_heads + g) * args.group * kHeadDim;
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
    load_query<T, kHeadDim, kSource>(q, m * kColumns + r, args.group, c, query[m]);
  }

#pragma unroll 1
  for (int batch = 0; batch < args.warp_tiles; batch += kTogether) {
    unsigned rows[kTogether][2][kWords<kHeadDim, kSource>];  // lines r and r + 8 of each tile
    unsigned params[kTogether][2];
    std::int32_t token[kTogether];  // first of the tile
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int j = first + (batch + i) * kTile;
      const std::int32_t page = __shfl_sync(kAllLanes, own_page, batch + i);
      const std::int32_t place = __shfl_sync(kAllLanes, own_place, batch + i);
      const int line = j & ((1 << args.page_shift) - 1);
      const std::int64_t tile = std::int64_t{place} * args.kv_heads + g;
      token[i] = j < candidates ? (page << args.page_shift) + line : INT32_MAX - kTile;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = line + r + 8 * half;
        const bool holds_token = token[i] + r + 8 * half < kv_len;
        load_row<T, kHeadDim, kSource>(args, tile, row, holds_token, c, rows[i][half]);
        if constexpr (kSource == KeySource::kInt4) {
          params[i][half] = holds_token ? args.int4_params[(tile << args.page_shift) + row] : 0U;
        }
      }
    }
    if (kSource == KeySource::kInt4 && batch == 0) {
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        float sum = 0.0F;
#pragma unroll
        for (const unsigned pair : query[m]) {
          const float2 two = widen_pair<T>(pair);
          sum += two.x + two.y;
        }
        sum = row_sum(sum);  // of head r, in its four lanes
        sum_of_q[m][0] = __shfl_sync(kAllLanes, sum, 8 * c);
        sum_of_q[m][1] = __shfl_sync(kAllLanes, sum, 8 * c + 4);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int j = first + (batch + i) * kTile + r;
      float d[kProducts][4] = {};
#pragma unroll
      for (int step = 0; step < kPairs<kHeadDim> / 2; ++step) {
        const unsigned a[4] = {pair_of<T, kHeadDim, kSource>(rows[i][0], 2 * step),
                               pair_of<T, kHeadDim, kSource>(rows[i][1], 2 * step),
                               pair_of<T, kHeadDim, kSource>(rows[i][0], 2 * step + 1),
                               pair_of<T, kHeadDim, kSource>(rows[i][1], 2 * step + 1)};
#pragma unroll
        for (int m = 0; m < kProducts; ++m) multiply_add<T>(d[m], a, query[m][2 * step], query[m][2 * step + 1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (j + 8 * half >= candidates) continue;
        const bool holds_token = token[i] + r + 8 * half < kv_len;
        const float2 scale_zero = kSource == KeySource::kInt4 ? widen_pair<f16>(params[i][half]) : float2{1.0F, 0.0F};
#pragma unroll
        for (int m = 0; m < kProducts; ++m) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int head = m * kColumns + 2 * c + e;
            if (head >= args.group) continue;
            const float score = args.scale * (scale_zero.x * d[m][2 * half + e] + scale_zero.y * sum_of_q[m][e]);
            args.scores(s, g * args.group + head, j + 8 * half) = holds_token ? score : -INFINITY;
          }
        }
      }
    }
  }
}

template <typename T, int kHeadDim, KeySource kSource>
void launch_scores(const Exec& exec, ScoreArgs<T> args, int seqs) {
  // Twice as many tiles a warp share the look-ups where blocks are many times what the device runs side by side.
  const std::int64_t few = std::int64_t{kWarps} * kWarpTiles * kTile;
  const std::int64_t blocks_of_few = (args.scores.shape(2) + few - 1) / few * args.kv_heads * seqs;
  constexpr std::int64_t kManyBlocks = 4096;
  args.warp_tiles = blocks_of_few < kManyBlocks ? kWarpTiles : kMostTiles;
  const std::int64_t of_block = std::int64_t{kWarps} * args.warp_tiles * kTile;
  const std::int64_t blocks = (args.scores.shape(2) + of_block - 1) / of_block;
  launch(
      "score_candidates",
      args.group <= kColumns ? score_candidates<T, kHeadDim, kSource, 1> : score_candidates<T, kHeadDim, kSource, 2>,
      {.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(args.kv_heads), static_cast<unsigned>(seqs)),
       .block = dim3(kWarps * 32),
       .overlap = true},
      exec.stream, args);
}

}  // namespace

void score_tokens(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                  const Batch& batch, const Selection& pages, KeySource source, DenseLimit dense,
                  TensorView<float, 3> scores) {
  check_attention_shape(shape);
  assert(q.dtype == kv.k.dtype && q.shape[1] == shape.heads * shape.head_dim);
  if (batch.seqs == 0 || scores.empty()) return;
  dispatch_16bit(kv.k.dtype, "scoring tokens on CUDA", [&](auto element) {
    using T = decltype(element);
    const ScoreArgs<T> args{.q = static_cast<const T*>(q.data),
                            .k = static_cast<const T*>(kv.k.data),
                            .int4 = static_cast<const std::uint8_t*>(kv.int4.data),
                            .int4_params = static_cast<const unsigned*>(kv.int4_params.data),
                            .kv_len = batch.kv_len,
                            .page_table = batch.page_table,
                            .page_index = pages.index,
                            .page_count = pages.count,
                            .scores = scores,
                            .dense_limit = dense.tokens,
                            .kv_heads = shape.kv_heads,
                            .group = shape.group(),
                            .page_shift = std::countr_zero(static_cast<unsigned>(shape.page_tokens)),
                            .warp_tiles = kWarpTiles,
                            .scale = shape.scale};
    const bool wide = shape.head_dim == 128;
    if (source == KeySource::kInt4) {
      return wide ? launch_scores<T, 128, KeySource::kInt4>(exec, args, batch.seqs)
                  : launch_scores<T, 64, KeySource::kInt4>(exec, args, batch.seqs);
    }
    return wide ? launch_scores<T, 128, KeySource::kExact>(exec, args, batch.seqs)
                : launch_scores<T, 64, KeySource::kExact>(exec, args, batch.seqs);
  });
}

}  // namespace vesper::cuda
