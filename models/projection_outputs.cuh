// What becomes of the sums of the products that open a decoder block's halves, two partners at a time: channels d and
// d + head_dim / 2 of a head, or a gate and its up. Every value that the composition (models/projections.cpp) would
// have stored is rounded where it would have been. Source: formulas of kvcache/append.h, models/rows.h.
#pragma once

#include "engine/core/numeric.cuh"
#include "engine/core/tensor.h"
#include "kvcache/append.h"
#include "kvcache/rotate.cuh"

namespace vesper::cuda {

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

template <typename T>
QkvOutput<T> qkv_output(const Rope& rope, const Batch& batch, const LayerKv& kv, const TensorRef& query) {
  const std::int64_t head_dim = kv.k.shape[3];
  return {.query = TensorView<T, 3>(static_cast<T*>(query.data), query.shape[0], query.shape[1] / head_dim, head_dim),
          .k = kv.k.as<T, 4>(),
          .v = kv.v.as<T, 4>(),
          .rope = rope,
          .positions = batch.positions,
          .seq_of_token = batch.seq_of_token,
          .page_table = batch.page_table};
}

}  // namespace vesper::cuda
