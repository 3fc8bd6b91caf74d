// The paged KV cache: one pool of pages that all sequences draw from, and the tiles and side tables of every layer.
#pragma once

#include <cstdint>
#include <span>
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
  int prompt_length = 0;  // tokens that it holds once the prompt whose steps are under way is stored; 0: none announced
  std::int32_t request = 0;  // number of the request it serves: part of the key of its random draws
};

// Owns K, V and the side tables of `pages` pages over all layers, and the list of free pages. A physical page number is
// the same in all layers. Not thread-safe.
class KvCache {
 public:
  // Device memory that a cache of `pages` pages takes. `side_tables` has one entry a layer; empty: no layer has any.
  static std::int64_t bytes(const KvShape& shape, std::int64_t pages, std::span<const SideTables> side_tables = {});

  // Throws an input error where a layer is to have int4 keys and head_dim is odd.
  KvCache(const KvShape& shape, int pages, DeviceKind device, std::span<const SideTables> side_tables = {});

  [[nodiscard]] const KvShape& shape() const { return shape_; }
  [[nodiscard]] int pages() const { return pages_; }
  [[nodiscard]] int free_pages() const { return static_cast<int>(free_.size()); }
  [[nodiscard]] int pages_for(int tokens) const { return page_count(tokens, shape_.page_tokens); }

  // Views of one layer's tiles and side tables.
  [[nodiscard]] const LayerKv& layer(int l) const { return layers_[static_cast<std::size_t>(l)]; }
  [[nodiscard]] std::span<const LayerKv> layers() const { return layers_; }

  // Puts the free pages into an order drawn from `seed`: page tables that are not consecutive, as after many requests.
  void shuffle_free_pages(std::uint64_t seed);

  // Gives `sequence` pages for `tokens` tokens in all. Running out is an ordinary answer: false, and nothing is taken.
  [[nodiscard]] bool reserve(CachedSequence& sequence, int tokens);

  // Rewinds `sequence` to its first `length` tokens and takes back the pages that no token of it needs any more. The
  // side tables of a page that is cut in the middle still count the lost tokens until the next step, which stores a
  // token on that page, rebuilds them.
  void truncate(CachedSequence& sequence, int length);

 private:
  KvShape shape_;
  int pages_;
  Buffer storage_;  // [layers, {k, v}, pages, kv_heads, page_tokens, head_dim], then the side tables, layer by layer
  std::vector<LayerKv> layers_;     // views of it
  std::vector<std::int32_t> free_;  // taken from the back
};

}  // namespace vesper
