// Where the rows of a block of keys lie. For the files that are compiled twice (engine/core/lanes.h).
#pragma once

#include "attention/attend_lanes.h"
#include "engine/core/lanes.h"

namespace vesper::cpu::VESPER_LANES {

// Tiles and chunk offsets of each key of a block, so that the inner loops divide by no page size.
struct KeyRows {
  int count = 0;
  const float* k[kBlockKeys];
  const float* v[kBlockKeys];
  const std::int32_t* chunk[kBlockKeys];
};

// The rows of keys [first, end), at most kBlockKeys of them; none where first >= end.
VESPER_INLINE void find_rows(const KvTiles& kv, int first, int end, KeyRows& rows) {
  const int left = end > first ? end - first : 0;
  rows.count = left < kBlockKeys ? left : kBlockKeys;
  int page = first / kv.page_tokens;
  int line = first % kv.page_tokens;
  for (int t = 0; t < rows.count; ++t) {
    rows.k[t] = kv.k[page];
    rows.v[t] = kv.v[page];
    rows.chunk[t] = kv.chunk + std::int64_t{line} * kv.chunks;
    if (++line == kv.page_tokens) {
      line = 0;
      ++page;
    }
  }
}

// The same of a list.
VESPER_INLINE void find_rows(const KeyList& list, int first, int end, KeyRows& rows) {
  const int left = end > first ? end - first : 0;
  rows.count = left < kBlockKeys ? left : kBlockKeys;
  for (int t = 0; t < rows.count; ++t) {
    rows.k[t] = list.k[first + t];
    rows.v[t] = list.v[first + t];
    rows.chunk[t] = list.chunk[first + t];
  }
}

// Chunk c of a row; `width` < 8 where it is the last of a head_dim that is no multiple of 8.
VESPER_INLINE f32x8 load_chunk(const float* tile, const std::int32_t* chunk, int c, int width) {
  const float* from = tile + chunk[c];
  return width == 8 ? load(from) : load_some(from, width, load);
}

// Asks for a row before it is read, into the second-level cache, since a block of keys and values fills the first. Two
// chunks are one cache line of 64 bytes, also where the order is swizzled.
VESPER_INLINE void prefetch_row(const float* tile, const std::int32_t* chunk, int chunks) {
  for (int c = 0; c < chunks; c += 2) __builtin_prefetch(tile + chunk[c], 0, 2);
}

// Channels in chunk c.
VESPER_INLINE int chunk_width(const KvTiles& kv, int c) {
  const int left = kv.head_dim - 8 * c;
  return left < 8 ? left : 8;
}

}  // namespace vesper::cpu::VESPER_LANES
