// How keys and values lie in memory. A page is `page_tokens` tokens; K and V of one (page, KV head) are tiles
// [page_tokens, head_dim], contiguous, 4 KiB at 16 x 128 x 16 bits, so that one bulk copy fetches a tile.
#pragma once

#include <cstdint>

#include "engine/core/tensor.h"

namespace vesper {

// Facts about stored keys that a cache keeps for a layer besides K and V (kvcache/side_tables.h).
struct SideTables {
  bool page_bounds = false;
  bool int8_bounds = false;
  bool page_moments = false;
  bool int4_keys = false;
  bool operator==(const SideTables&) const = default;
};

// Page bounds in 8 bits (kvcache/side_tables.h).
inline constexpr int kBoundSpan = 32;   // neighbouring channels that share a scale
inline constexpr int kBoundZero = 128;  // a code of 0 as it is stored
VESPER_HD constexpr std::int64_t bound_spans(std::int64_t head_dim) {
  return (head_dim + kBoundSpan - 1) / kBoundSpan;
}

// Pages that hold `tokens`.
VESPER_HD constexpr int page_count(int tokens, int page_tokens) {
  return (tokens + page_tokens - 1) / page_tokens;
}

// The sizes of a cache; all counts, `dtype` is that of K and V (f32 on the CPU, the checkpoint's 16-bit type on CUDA).
struct KvShape {
  int layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int page_tokens = 16;
  DType dtype = DType::kF32;

  // K and V of one page over all layers and KV heads.
  [[nodiscard]] std::int64_t page_bytes() const {
    return std::int64_t{2} * layers * kv_heads * page_tokens * head_dim * dtype_bytes(dtype);
  }
  // The side tables of one page in one layer that has `tables`.
  [[nodiscard]] std::int64_t side_table_bytes(const SideTables& tables) const {
    std::int64_t bytes = 0;  // of a KV head
    if (tables.page_bounds) bytes += std::int64_t{2} * head_dim * dtype_bytes(dtype);
    if (tables.int8_bounds) bytes += 2 * (head_dim + bound_spans(head_dim) * dtype_bytes(DType::kBf16));
    if (tables.page_moments) bytes += std::int64_t{2} * head_dim * dtype_bytes(DType::kF32);
    if (tables.int4_keys) bytes += page_tokens * (head_dim / 2 + 2 * dtype_bytes(DType::kF16));
    return kv_heads * bytes;
  }
};

// Element offset of (token row t, channel d) inside a tile. Within a tile the chunk c of 8 channels (16 bytes at 16
// bits) of row t lies at chunk c XOR (t mod 8): a tile copied as it is feeds ldmatrix without bank conflicts, since the
// eight rows of an 8x8 matrix then lie in eight different 16-byte columns. Rows that are no multiple of 8 chunks (head
// dims the CUDA half does not take) stay plain. Only this function knows the order.
VESPER_HD constexpr int tile_offset(int t, int d, int head_dim) {
  if (head_dim % 64 != 0) return t * head_dim + d;
  return t * head_dim + (((d / 8) ^ (t % 8)) * 8) + d % 8;
}

// One layer's K and V, and its side tables; those that the layer does not have are null.
struct LayerKv {
  TensorRef k;                 // [pages, kv_heads, page_tokens, head_dim], each tile in the order of tile_offset
  TensorRef v;                 // likewise
  TensorRef bounds = {};       // [pages, kv_heads, {min, max}, head_dim], K's dtype
  TensorRef int8_bounds = {};  // [pages, kv_heads, {min, max}, head_dim] u8
  TensorRef int8_scales = {};  // [pages, kv_heads, {min, max}, bound_spans(head_dim)] bf16
  TensorRef moments = {};      // [pages, kv_heads, {sum, sum of squares}, head_dim] f32
  TensorRef int4 = {};         // [pages, kv_heads, page_tokens, head_dim / 2] u8
  TensorRef int4_params = {};  // [pages, kv_heads, page_tokens, {scale, zero}] f16
};

}  // namespace vesper
