// Selections for tests: lists of pages or tokens of every (sequence, KV head) of a batch. What no list holds is poison:
// index entries behind the count, and the log-weight where there is no tail.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention/selection.h"
#include "kvcache/batch.h"
#include "tests/attention/attend_reference.h"

namespace vesper {

// One list.
struct Entries {
  std::vector<std::int32_t> index;
  int tail_begin = 0;
  float tail_log_weight = NAN;
};

class Lists {
 public:
  // `make(entries)` gives the list of a sequence that has so many pages or tokens. `spare` entries of capacity are
  // beyond what the longest sequence needs.
  Lists(SelectionUnit unit, const AttentionShape& shape, const Batch& batch, int spare,
        const std::function<Entries(int)>& make)
      : entry_tokens_(unit == SelectionUnit::kPages ? shape.page_tokens : 1),
        capacity_((batch.max_kv_len + entry_tokens_ - 1) / entry_tokens_ + spare),
        kv_heads_(shape.kv_heads),
        unit_(unit) {
    constexpr std::int32_t kPoison = 1 << 30;
    for (int s = 0; s < batch.seqs; ++s) {
      for (int g = 0; g < shape.kv_heads; ++g) {
        const Entries list = make((batch.kv_len(s) + entry_tokens_ - 1) / entry_tokens_);
        index.insert(index.end(), list.index.begin(), list.index.end());
        index.resize(static_cast<std::size_t>((s * kv_heads_ + g + 1) * capacity_), kPoison);
        count.push_back(static_cast<std::int32_t>(list.index.size()));
        tail_begin.push_back(list.tail_begin);
        tail_log_weight.push_back(list.tail_log_weight);
      }
    }
  }

  [[nodiscard]] int capacity() const { return capacity_; }
  [[nodiscard]] SelectionUnit unit() const { return unit_; }
  [[nodiscard]] int entry_tokens() const { return entry_tokens_; }
  [[nodiscard]] Selection view(int seqs) {
    return {.unit = unit_,
            .index = TensorView<std::int32_t, 3>(index.data(), seqs, kv_heads_, capacity_),
            .count = TensorView<std::int32_t, 2>(count.data(), seqs, kv_heads_),
            .tail_begin = TensorView<std::int32_t, 2>(tail_begin.data(), seqs, kv_heads_),
            .tail_log_weight = TensorView<float, 2>(tail_log_weight.data(), seqs, kv_heads_)};
  }

  // The keys of a list, with their weights.
  [[nodiscard]] std::vector<WeightedKey> keys(const Batch& batch, int s, int g) const {
    const auto list = static_cast<std::size_t>(s * kv_heads_ + g);
    std::vector<WeightedKey> result;
    for (int i = 0; i < count[list]; ++i) {
      const int first = index[list * static_cast<std::size_t>(capacity_) + static_cast<std::size_t>(i)] * entry_tokens_;
      const double log_weight = i < tail_begin[list] ? 0.0 : static_cast<double>(tail_log_weight[list]);
      for (int t = first; t < std::min(first + entry_tokens_, batch.kv_len(s)); ++t) result.push_back({t, log_weight});
    }
    return result;
  }

  std::vector<std::int32_t> index, count, tail_begin;
  std::vector<float> tail_log_weight;

 private:
  int entry_tokens_, capacity_, kv_heads_;
  SelectionUnit unit_;
};

inline Entries everything(int entries) {
  Entries list;
  list.index.resize(static_cast<std::size_t>(entries));
  std::iota(list.index.begin(), list.index.end(), 0);
  list.tail_begin = entries;
  return list;
}

inline Entries newest_alone(int entries) {
  return {.index = {entries - 1}, .tail_begin = 1};
}

// About `share` of the entries and the newest, ascending, and then `tail` of the rest in random order, as if drawn.
inline Entries random_list(std::mt19937& random, int entries, double share, double tail = 0.0) {
  Entries list;
  std::vector<std::int32_t> rest;
  std::bernoulli_distribution chosen(share);
  for (int i = 0; i < entries; ++i) (i == entries - 1 || chosen(random) ? list.index : rest).push_back(i);
  list.tail_begin = static_cast<int>(list.index.size());
  const auto drawn = static_cast<std::size_t>(std::ceil(tail * static_cast<double>(rest.size())));
  if (drawn == 0) return list;
  std::shuffle(rest.begin(), rest.end(), random);
  list.index.insert(list.index.end(), rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(drawn));
  list.tail_log_weight = std::log(static_cast<float>(rest.size()) / static_cast<float>(drawn));
  return list;
}

inline std::string describe(const Lists& lists) {
  return lists.unit() == SelectionUnit::kPages ? "pages" : "tokens";
}

}  // namespace vesper
