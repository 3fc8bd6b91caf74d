// The pages of one sequence and KV head as the CPU's inner loops see them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/attend.h"
#include "attention/attend_lanes.h"

namespace vesper::cpu {

// Where the chunks of a tile's rows begin, asked of tile_offset once an operation. [page_tokens, chunks]
inline std::vector<std::int32_t> chunk_offsets(const AttentionShape& shape) {
  std::vector<std::int32_t> offsets;
  for (int t = 0; t < shape.page_tokens; ++t) {
    for (int d = 0; d < shape.head_dim; d += 8) offsets.push_back(tile_offset(t, d, shape.head_dim));
  }
  return offsets;
}

// Owns the lists of tiles that a KvTiles views; reused from one piece of work to the next.
class TileList {
 public:
  // The tiles that hold keys 0 ... keys - 1 of sequence s. Valid until the next call; `offsets` must outlive it.
  KvTiles list(const AttentionShape& shape, const LayerKv& kv, const Batch& batch, int s, int g, int keys,
               const std::vector<std::int32_t>& offsets) {
    const auto k = kv.k.as<const float, 4>();
    const auto v = kv.v.as<const float, 4>();
    k_.clear();
    v_.clear();
    for (int p = 0; p * shape.page_tokens < keys; ++p) {
      const std::int32_t page = batch.page_table(s, p);
      k_.push_back(&k(page, g, 0, 0));
      v_.push_back(&v(page, g, 0, 0));
    }
    return {.k = k_.data(),
            .v = v_.data(),
            .chunk = offsets.data(),
            .page_tokens = shape.page_tokens,
            .head_dim = shape.head_dim,
            .chunks = (shape.head_dim + 7) / 8};
  }

 private:
  std::vector<const float*> k_;
  std::vector<const float*> v_;
};

// Scratch memory whose rows of eight lanes cross no cache line.
class LaneScratch {
 public:
  explicit LaneScratch(std::int64_t floats) : lines_(static_cast<std::size_t>((floats + 15) / 16)) {}
  float* data() { return lines_.data()->lane; }

 private:
  struct alignas(64) Line {
    float lane[16];
  };
  std::vector<Line> lines_;
};

}  // namespace vesper::cpu
