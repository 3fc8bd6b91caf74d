// Page lists as a base selector leaves them: some of a sequence's pages, ascending, the newest among them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "attention/selection.h"
#include "kvcache/batch.h"
#include "kvcache/layout.h"

namespace vesper {

struct PageLists {
  std::vector<std::int32_t> index, count;
  Selection pages;

  // Keeps each page with probability `share`; the first one only where `with_first` says so. Entries past the count
  // name pages that do not exist.
  PageLists(std::mt19937& random, const Batch& batch, int kv_heads, int page_tokens, double share,
            bool with_first = true) {
    const auto pages_of = [&](int s) { return (batch.kv_len(s) + page_tokens - 1) / page_tokens; };
    int capacity = 1;
    for (int s = 0; s < batch.seqs; ++s) capacity = std::max(capacity, pages_of(s));
    index.assign(static_cast<std::size_t>(batch.seqs * kv_heads * capacity), 1 << 24);
    std::bernoulli_distribution keep(share);
    for (int list = 0; list < batch.seqs * kv_heads; ++list) {
      const int last = pages_of(list / kv_heads) - 1;
      std::int32_t* to = &index[static_cast<std::size_t>(list * capacity)];
      std::int32_t kept = 0;
      for (int p = 0; p <= last; ++p) {
        if (p == last || (keep(random) && (p > 0 || with_first))) to[kept++] = p;
      }
      count.push_back(kept);
    }
    pages.unit = SelectionUnit::kPages;
    pages.index = TensorView<std::int32_t, 3>(index.data(), batch.seqs, kv_heads, capacity);
    pages.count = TensorView<std::int32_t, 2>(count.data(), batch.seqs, kv_heads);
    pages.tail_begin = pages.count;
  }
  PageLists(const PageLists&) = delete;  // `pages` views the vectors
  PageLists& operator=(const PageLists&) = delete;
};

// The token of candidate j, or one past the sequence's end; all tokens are candidates where `pages` has no list.
inline std::int32_t candidate_token(const Selection& pages, int page_tokens, int s, int g, int j) {
  if (pages.index.data() == nullptr) return j;
  return pages.index(s, g, j / page_tokens) * page_tokens + j % page_tokens;
}
inline int candidate_count(const Selection& pages, const Batch& batch, int page_tokens, int s, int g) {
  return pages.index.data() == nullptr ? batch.kv_len(s) : pages.count(s, g) * page_tokens;
}
inline std::int64_t candidate_capacity(const Selection& pages, const Batch& batch, int page_tokens) {
  const std::int64_t most =
      pages.index.data() == nullptr ? page_count(batch.max_kv_len, page_tokens) : pages.index.shape(2);
  return most * page_tokens;
}

}  // namespace vesper
