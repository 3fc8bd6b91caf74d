// Top-p pruning on the CPU; see attention/prune_top_p.h. A piece of work is one sequence and KV head.
//
// The threshold of a query head: weights are summed by distance below the largest score; only the scores of the bin in
// which the sum reaches what is needed are then put in order.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "attention/mass.h"
#include "attention/prune_top_p.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {
namespace {

// The order of the largest score tau for which the scores >= tau weigh at least needed_of(weight of all); 0, which
// every score reaches, where all together weigh less.
template <typename Weight, typename Needed>
std::uint32_t find_threshold(const float* row, int candidates, float largest, const Weight& weight,
                             const Needed& needed_of) {
  std::uint64_t of_bin[kDistanceBins] = {};
  std::uint64_t total = 0;
  for (int j = 0; j < candidates; ++j) {
    const std::uint64_t weighs = weight(row[j]);
    of_bin[distance_bin(row[j], largest)] += weighs;
    total += weighs;
  }
  const std::uint64_t needed = needed_of(total);
  if (needed > total) return 0;
  int bin = 0;
  std::uint64_t sum = 0;
  while (sum + of_bin[bin] < needed) sum += of_bin[bin++];

  std::vector<std::pair<std::uint32_t, std::uint64_t>> members;  // order, weight
  for (int j = 0; j < candidates; ++j) {
    if (distance_bin(row[j], largest) == bin) members.emplace_back(order_of(row[j]), weight(row[j]));
  }
  std::sort(members.begin(), members.end(), std::greater<>());
  std::size_t i = 0;
  for (sum += members[0].second; sum < needed; sum += members[++i].second) {
  }
  return members[i].first;
}

// The order of the least score that one query head keeps.
std::uint32_t threshold_of_head(const float* row, int candidates, const TopPRule& rule) {
  if (rule.top_p >= 1.0F) return 0;
  float largest = -INFINITY;
  for (int j = 0; j < candidates; ++j) largest = row[j] > largest ? row[j] : largest;
  const std::uint32_t by_mass = find_threshold(
      row, candidates, largest, [largest](float score) { return mass_of(score, largest); },
      [&](std::uint64_t total) { return mass_to_keep(share_to_keep(rule.top_p), total, candidates); });

  const auto reaches = [by_mass](float score) { return order_of(score) >= by_mass; };
  if (std::count_if(row, row + candidates, reaches) >= rule.min_tokens) return by_mass;
  return find_threshold(
      row, candidates, largest,
      [](float score) { return std::uint64_t{order_of(score) > kOrderOfMinusInfinity ? 1U : 0U}; },
      [&](std::uint64_t) { return static_cast<std::uint64_t>(rule.min_tokens); });
}

}  // namespace

void prune_top_p(const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                 const Selection& pages, const TopPRule& rule, DenseLimit dense, const Selection& tokens) {
  const int page_tokens = shape.page_tokens;
  parallel_for(std::int64_t{batch.seqs} * shape.kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint8_t> kept;
    for (std::int64_t i = begin; i < end; ++i) {
      const auto g = static_cast<int>(i % shape.kv_heads);
      const auto s = static_cast<int>(i / shape.kv_heads);
      const std::int32_t kv_len = batch.kv_len(s);
      if (kv_len <= dense.tokens) continue;
      const bool listed = pages.index.data() != nullptr;
      const int candidates = listed ? pages.count(s, g) * page_tokens : kv_len;

      kept.assign(static_cast<std::size_t>(candidates), 0);
      for (int h = g * shape.group(); h < (g + 1) * shape.group(); ++h) {
        const float* row = &scores(s, h, 0);
        const std::uint32_t threshold = threshold_of_head(row, candidates, rule);
        for (int j = 0; j < candidates; ++j) {
          if (order_of(row[j]) >= threshold) kept[static_cast<std::size_t>(j)] = 1;
        }
      }

      const std::int32_t sink_end = tokens_of(rule.sink_tokens, kv_len);
      const std::int32_t window_begin = kv_len - std::max(1, tokens_of(rule.window_tokens, kv_len));
      std::int32_t count = 0;
      for (int j = 0; j < candidates; ++j) {
        const std::int32_t token = listed ? pages.index(s, g, j / page_tokens) * page_tokens + j % page_tokens : j;
        if (token >= kv_len) continue;
        const bool forced = token < sink_end || token >= window_begin;
        if (forced || kept[static_cast<std::size_t>(j)] != 0) tokens.index(s, g, count++) = token;
      }
      tokens.count(s, g) = count;
      tokens.tail_begin(s, g) = count;
    }
  });
}

}  // namespace vesper::cpu
