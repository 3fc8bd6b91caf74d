// How keys and values lie in memory. A page is `page_tokens` tokens; K and V of one (page, KV head) are tiles
// [page_tokens, head_dim], contiguous, 4 KiB at 16 x 128 x 16 bits, so that one bulk copy fetches a tile.
#pragma once

#include <cstdint>

#include "engine/core/tensor.h"

namespace vesper {

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
};

// Element offset of (token row t, channel d) inside a tile. Within a tile the chunk c of 8 channels (16 bytes at 16
// bits) of row t lies at chunk c XOR (t mod 8): a tile copied as it is feeds ldmatrix without bank conflicts, since the
// eight rows of an 8x8 matrix then lie in eight different 16-byte columns. Rows that are no multiple of 8 chunks (head
// dims the CUDA half does not take) stay plain. Only this function knows the order.
VESPER_HD constexpr int tile_offset(int t, int d, int head_dim) {
  if (head_dim % 64 != 0) return t * head_dim + d;
  return t * head_dim + (((d / 8) ^ (t % 8)) * 8) + d % 8;
}

// One layer's K and V.
struct LayerKv {
  TensorRef k;  // [pages, kv_heads, page_tokens, head_dim], each tile in the order of tile_offset
  TensorRef v;  // likewise
};

}  // namespace vesper
