// What tests of page selection share between the devices: score arrays with traps, budgets, lists that show writes
// beside them, and the answer of a sort.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention/select_pages.h"
#include "tests/paged.h"

namespace vesper {

// The batch of a decode step as the prefill that stored all of its tokens, for making side tables.
struct RaggedPrefill {
  std::vector<std::int32_t> positions, query_start;
  Batch batch;

  explicit RaggedPrefill(const RaggedBatch& ragged) : query_start{0}, batch(ragged.batch) {
    for (int s = 0; s < batch.seqs; ++s) {
      for (int t = 0; t < batch.kv_len(s); ++t) positions.push_back(t);
      query_start.push_back(static_cast<std::int32_t>(positions.size()));
    }
    batch.phase = Phase::kPrefill;
    batch.tokens = static_cast<int>(positions.size());
    batch.max_query_tokens = batch.max_kv_len;
    batch.positions = TensorView<const std::int32_t, 1>(positions.data(), batch.tokens);
    batch.query_start = TensorView<const std::int32_t, 1>(query_start.data(), batch.seqs + 1);
    batch.seq_of_token = {};
    batch.ids = {};
  }
  RaggedPrefill(const RaggedPrefill&) = delete;  // `batch` views the vectors
  RaggedPrefill& operator=(const RaggedPrefill&) = delete;
};

enum class ScoreKind { kRandom, kTies, kAllEqual, kNaN, kAllNaN, kExtremes, kClose };
inline constexpr std::array kScoreKinds = {ScoreKind::kRandom, ScoreKind::kTies,   ScoreKind::kAllEqual,
                                           ScoreKind::kNaN,    ScoreKind::kAllNaN, ScoreKind::kExtremes,
                                           ScoreKind::kClose};

// Scores [seqs, kv_heads, page capacity]; behind a sequence's end lies the largest score of all.
inline std::vector<float> make_scores(std::mt19937& random, ScoreKind kind, const Batch& batch, int kv_heads) {
  const std::array extremes = {-INFINITY,
                               INFINITY,
                               0.0F,
                               -0.0F,
                               std::numeric_limits<float>::denorm_min(),
                               -std::numeric_limits<float>::denorm_min(),
                               std::numeric_limits<float>::max(),
                               std::numeric_limits<float>::lowest(),
                               NAN,
                               -NAN};
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> die(0, 9);
  const auto draw = [&] {
    switch (kind) {
      case ScoreKind::kRandom:
        return normal(random);
      case ScoreKind::kTies:
        return static_cast<float>(die(random) - 5);
      case ScoreKind::kAllEqual:
        return -1.5F;
      case ScoreKind::kNaN:
        return die(random) < 5 ? NAN : normal(random);
      case ScoreKind::kAllNaN:
        return NAN;
      case ScoreKind::kExtremes:
        return extremes[static_cast<std::size_t>(die(random))];
      case ScoreKind::kClose:  // the upper three bytes are equal
        return 100.0F + static_cast<float>(die(random)) * 0x1p-17F;
    }
    return 0.0F;
  };
  const std::int64_t capacity = batch.page_table.shape(1);
  std::vector<float> scores;
  for (std::int64_t i = 0; i < batch.seqs * kv_heads * capacity; ++i) scores.push_back(draw());
  return scores;
}

inline TensorView<const float, 3> view_scores(const std::vector<float>& scores, const Batch& batch, int kv_heads) {
  return TensorView<const float, 3>(scores.data(), batch.seqs, kv_heads, batch.page_table.shape(1));
}

inline constexpr std::array kBudgets = {
    PageBudget{.tokens = {1.0}},
    PageBudget{.tokens = {160.0}},
    PageBudget{.tokens = {1024.0}},
    PageBudget{.tokens = {0.25}},
    PageBudget{.tokens = {0.999}},
    PageBudget{.tokens = {40000.0}},
    PageBudget{.tokens = {512.0}, .sink_tokens = {4.0}, .window_tokens = {100.0}},
    PageBudget{.tokens = {64.0}, .sink_tokens = {128.0}, .window_tokens = {128.0}},
    PageBudget{.tokens = {0.5}, .sink_tokens = {0.125}, .window_tokens = {0.125}},
};

inline std::string describe(ScoreKind kind, const PageBudget& budget, int page_tokens) {
  return "scores " + std::to_string(static_cast<int>(kind)) + ", budget " + std::to_string(budget.tokens.value) +
         ", sink " + std::to_string(budget.sink_tokens.value) + ", window " +
         std::to_string(budget.window_tokens.value) + ", page_tokens " + std::to_string(page_tokens);
}

// Lists of pages on the CPU, poisoned with numbers that no page has.
struct PageLists {
  static constexpr std::int32_t kPoison = -7;
  std::int64_t seqs, kv_heads, capacity;
  std::vector<std::int32_t> index, count, tail_begin;

  PageLists(const Batch& batch, int heads) : seqs(batch.seqs), kv_heads(heads), capacity(batch.page_table.shape(1)) {
    const auto lists = static_cast<std::size_t>(seqs * kv_heads);
    index.assign(lists * static_cast<std::size_t>(capacity), kPoison);
    count.assign(lists, kPoison);
    tail_begin.assign(lists, kPoison);
  }
  Selection selection() {
    return {.unit = SelectionUnit::kPages,
            .index = TensorView<std::int32_t, 3>(index.data(), seqs, kv_heads, capacity),
            .count = TensorView<std::int32_t, 2>(count.data(), seqs, kv_heads),
            .tail_begin = TensorView<std::int32_t, 2>(tail_begin.data(), seqs, kv_heads),
            .tail_log_weight = {}};
  }
};

// The list of one (sequence, KV head), by marking forced pages and sorting the others.
inline std::vector<std::int32_t> sorted_choice(const float* scores, const PageBudget& budget, int kv_len,
                                               int page_tokens) {
  const auto tokens = [&](Amount amount) {
    const double count = amount.value < 1.0 ? std::ceil(amount.value * kv_len) : std::floor(amount.value);
    return std::min(static_cast<double>(kv_len), count);
  };
  const int pages = (kv_len + page_tokens - 1) / page_tokens;
  std::vector<bool> taken(static_cast<std::size_t>(pages), false);
  for (int t = 0; t < kv_len; ++t) {
    const bool forced = t < tokens(budget.sink_tokens) || t >= kv_len - tokens(budget.window_tokens) || t == kv_len - 1;
    if (forced) taken[static_cast<std::size_t>(t / page_tokens)] = true;
  }
  std::vector<std::int32_t> others;
  for (std::int32_t p = 0; p < pages; ++p) {
    if (!taken[static_cast<std::size_t>(p)]) others.push_back(p);
  }
  std::stable_sort(others.begin(), others.end(), [&](std::int32_t a, std::int32_t b) {
    const auto number = [&](std::int32_t p) { return std::isnan(scores[p]) ? -INFINITY : scores[p]; };
    return number(a) > number(b);
  });
  const bool covered = tokens(budget.tokens) >= kv_len;
  const auto room = static_cast<std::int64_t>(covered ? pages : std::floor(tokens(budget.tokens) / page_tokens));
  const std::int64_t left = room - std::count(taken.begin(), taken.end(), true);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(left, static_cast<std::int64_t>(others.size())); ++i) {
    taken[static_cast<std::size_t>(others[static_cast<std::size_t>(i)])] = true;
  }
  std::vector<std::int32_t> list;
  for (std::int32_t p = 0; p < pages; ++p) {
    if (taken[static_cast<std::size_t>(p)]) list.push_back(p);
  }
  return list;
}

// Every list is the sort's, nothing is written behind it, and sequences that attend dense have none.
inline void expect_as_sorted(const AttentionShape& shape, const Batch& batch, const std::vector<float>& scores,
                             const PageBudget& budget, DenseLimit dense, const PageLists& lists,
                             const std::string& what) {
  for (int s = 0; s < batch.seqs; ++s) {
    const int kv_len = batch.host_kv_len[static_cast<std::size_t>(s)];
    for (int g = 0; g < shape.kv_heads; ++g) {
      const auto list = static_cast<std::size_t>(s * shape.kv_heads + g);
      const std::string where = what + ", sequence of " + std::to_string(kv_len) + ", KV head " + std::to_string(g);
      const auto begin = lists.index.begin() + static_cast<std::ptrdiff_t>(list) * lists.capacity;
      std::vector<std::int32_t> expected;
      if (kv_len <= dense.tokens) {
        ASSERT_EQ(lists.count[list], PageLists::kPoison) << where;
        ASSERT_EQ(lists.tail_begin[list], PageLists::kPoison) << where;
      } else {
        expected = sorted_choice(scores.data() + static_cast<std::ptrdiff_t>(list) * lists.capacity, budget, kv_len,
                                 shape.page_tokens);
        ASSERT_EQ(lists.count[list], static_cast<std::int32_t>(expected.size())) << where;
        ASSERT_EQ(lists.tail_begin[list], lists.count[list]) << where;
      }
      const auto [found, wanted] =
          std::mismatch(begin, begin + static_cast<std::ptrdiff_t>(expected.size()), expected.begin());
      ASSERT_EQ(wanted - expected.begin(), static_cast<std::ptrdiff_t>(expected.size()))
          << where << ": entry " << wanted - expected.begin() << " is " << *found << ", expected " << *wanted;
      const auto untouched = [](std::int32_t entry) { return entry == PageLists::kPoison; };
      ASSERT_TRUE(std::all_of(begin + static_cast<std::ptrdiff_t>(expected.size()), begin + lists.capacity, untouched))
          << where << ": written behind the list";
    }
  }
}

}  // namespace vesper
