// The paged KV cache: one pool of pages that all sequences draw from, and the tiles of every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/core/buffer.h"
#include "engine/core/exec.h"
#include "kvcache/layout.h"

namespace vesper {

// The pages of one sequence, in the order of its tokens, and how many tokens have been stored. Token i lies on page
// pages[i / page_tokens], line i % page_tokens. Belongs to the cache that filled it and must be given back to it.
struct CachedSequence {
  std::vector<std::int32_t> pages;
  int length = 0;
};

// Owns K and V of `pages` pages over all layers, and the list of free pages. A physical page number is the same in all
// layers. Not thread-safe.
class KvCache {
 public:
  // Device memory that a cache of `pages` pages takes.
  static std::int64_t bytes(const KvShape& shape, std::int64_t pages) { return pages * shape.page_bytes(); }

  KvCache(const KvShape& shape, int pages, DeviceKind device);

  [[nodiscard]] const KvShape& shape() const { return shape_; }
  [[nodiscard]] int pages() const { return pages_; }
  [[nodiscard]] int free_pages() const { return static_cast<int>(free_.size()); }
  [[nodiscard]] int pages_for(int tokens) const { return (tokens + shape_.page_tokens - 1) / shape_.page_tokens; }

  // Views of one layer's tiles.
  [[nodiscard]] LayerKv layer(int l) const;

  // Gives `sequence` pages for `tokens` tokens in all. Running out is an ordinary answer: false, and nothing is taken.
  [[nodiscard]] bool reserve(CachedSequence& sequence, int tokens);

  // Rewinds `sequence` to its first `length` tokens and takes back the pages that no token of it needs any more.
  void truncate(CachedSequence& sequence, int length);

 private:
  KvShape shape_;
  int pages_;
  Buffer storage_;                  // [layers, {k, v}, pages, kv_heads, page_tokens, head_dim]
  std::vector<std::int32_t> free_;  // taken from the back
};

}  // namespace vesper
