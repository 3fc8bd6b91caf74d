// Memory of a Selection of tokens and of its report on the host, for tests; filled with a number that nobody writes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/sample_tail.h"

namespace vesper {

struct ListBuffers {
  static constexpr std::int32_t kUntouched = -77;
  std::vector<std::int32_t> index, count, tail_begin, guard_hits;
  std::vector<float> tail_log_weight;
  Selection list;
  SampleReport report;

  ListBuffers(int seqs, int kv_heads, int capacity)
      : index(static_cast<std::size_t>(seqs) * static_cast<std::size_t>(kv_heads * capacity), kUntouched),
        count(static_cast<std::size_t>(seqs * kv_heads), kUntouched),
        tail_begin(count),
        guard_hits(count),
        tail_log_weight(count.size()) {
    view(seqs, kv_heads, capacity);
  }
  ListBuffers(const ListBuffers& other)
      : index(other.index),
        count(other.count),
        tail_begin(other.tail_begin),
        guard_hits(other.guard_hits),
        tail_log_weight(other.tail_log_weight) {
    view(other.list.index.shape(0), other.list.index.shape(1), other.list.index.shape(2));
  }
  ListBuffers& operator=(const ListBuffers&) = delete;

  // Views the vectors anew, after they were replaced by others of their size.
  void look() { view(list.index.shape(0), list.index.shape(1), list.index.shape(2)); }

  [[nodiscard]] std::vector<std::int32_t> entries(int s, int g) const {
    const std::int32_t* row = &list.index(s, g, 0);
    return {row, row + std::max(0, list.count(s, g))};
  }

 private:
  void view(std::int64_t seqs, std::int64_t kv_heads, std::int64_t capacity) {
    list = {.unit = SelectionUnit::kTokens,
            .index = TensorView<std::int32_t, 3>(index.data(), seqs, kv_heads, capacity),
            .count = TensorView<std::int32_t, 2>(count.data(), seqs, kv_heads),
            .tail_begin = TensorView<std::int32_t, 2>(tail_begin.data(), seqs, kv_heads),
            .tail_log_weight = TensorView<float, 2>(tail_log_weight.data(), seqs, kv_heads)};
    report = {.guard_hits = TensorView<std::int32_t, 2>(guard_hits.data(), seqs, kv_heads)};
  }
};

}  // namespace vesper
