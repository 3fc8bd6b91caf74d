// Rows of attention scores on which top-p thresholds have gone wrong or might, and batches of them, for tests.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "attention/attend.h"
#include "tests/page_lists.h"
#include "tests/paged.h"

namespace vesper {

struct ScoreRows {
  std::string name;
  std::function<float(std::mt19937&, int token, int tokens)> score;
};

inline const std::vector<ScoreRows>& score_rows() {
  const auto normal = [](std::mt19937& random, float sigma) {
    return std::normal_distribution<float>(0.0F, sigma)(random);
  };
  static const std::vector<ScoreRows> rows = {
      {"sink first", [=](auto& random, int t, int) { return t == 0 ? 9.0F : normal(random, 1.5F); }},
      {"no sink, narrow", [=](auto& random, int, int) { return normal(random, 0.5F); }},
      {"no sink", [=](auto& random, int, int) { return normal(random, 3.0F); }},
      {"no sink, wide", [=](auto& random, int, int) { return normal(random, 12.0F); }},
      {"far from zero", [=](auto& random, int, int) { return 3000.0F + normal(random, 2.0F); }},
      {"near zero", [=](auto& random, int, int) { return 1e-3F * normal(random, 1.0F); }},
      {"all equal", [](auto&, int, int) { return -2.5F; }},
      {"all zero, of both signs", [](auto&, int t, int) { return t % 2 == 0 ? 0.0F : -0.0F; }},
      {"one-hot", [](auto&, int t, int tokens) { return t == tokens / 2 ? 60.0F : -60.0F; }},
      {"heavy ties", [=](auto& random, int, int) { return std::round(normal(random, 2.0F)); }},
      {"two values", [](auto& random, int, int) { return random() % 4 == 0 ? 1.0F : 0.0F; }},
      {"neighbouring floats",
       [](auto& random, int, int) { return std::nextafter(1.0F, random() % 2 == 0 ? 0.0F : 2.0F); }},
      {"ascending",
       [](auto&, int t, int tokens) { return 10.0F * static_cast<float>(t) / static_cast<float>(tokens); }},
      {"beyond every mass", [](auto& random, int, int) { return 1e4F * static_cast<float>(random() % 1000); }},
      {"infinite", [=](auto& random, int t, int) { return t % 50 == 3 ? INFINITY : normal(random, 1.0F); }},
      {"some minus infinite, some NaN",
       [=](auto& random, int t, int) { return t % 7 == 3 ? -INFINITY : (t % 11 == 5 ? NAN : normal(random, 2.0F)); }},
      {"all minus infinite", [](auto&, int, int) { return -INFINITY; }},
  };
  return rows;
}

// A decode step whose candidates have scores of such rows.
struct ScoredBatch {
  AttentionShape shape;
  RaggedBatch ragged;
  Selection pages;
  std::int64_t capacity = 0;
  std::vector<float> scores;  // [seqs, heads, capacity]

  ScoredBatch(std::mt19937& random, int kv_heads, int group, int page_tokens, const std::vector<int>& lengths)
      : shape{.heads = kv_heads * group,
              .kv_heads = kv_heads,
              .head_dim = 64,
              .page_tokens = page_tokens,
              .scale = 1.0F},
        ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), page_tokens) {}

  [[nodiscard]] int candidates(int s, int g) const {
    return candidate_count(pages, ragged.batch, shape.page_tokens, s, g);
  }
  [[nodiscard]] std::int32_t token(int s, int g, int j) const {
    return candidate_token(pages, shape.page_tokens, s, g, j);
  }
  float& at(int s, int h, int j) {
    return scores[static_cast<std::size_t>((std::int64_t{s} * shape.heads + h) * capacity + j)];
  }

  // As score_tokens leaves them: candidates behind the end are -inf, what is no candidate is not written.
  void score(std::mt19937& random, const Selection& list, const std::function<const ScoreRows&(int)>& rows_of_head) {
    pages = list;
    const Batch& batch = ragged.batch;
    capacity = candidate_capacity(pages, batch, shape.page_tokens);
    scores.assign(static_cast<std::size_t>(batch.seqs * shape.heads * capacity), NAN);
    for (int s = 0; s < batch.seqs; ++s) {
      for (int h = 0; h < shape.heads; ++h) {
        for (int j = 0; j < candidates(s, h / shape.group()); ++j) {
          const std::int32_t t = token(s, h / shape.group(), j);
          at(s, h, j) = t < batch.kv_len(s) ? rows_of_head(h).score(random, t, batch.kv_len(s)) : -INFINITY;
        }
      }
    }
  }
};

// What prune_top_p writes on the CPU, filled with -1.
struct TokenLists {
  std::vector<std::int32_t> index, count, tail_begin;
  Selection tokens;

  TokenLists(int seqs, int kv_heads, std::int64_t capacity) {
    const auto lists = static_cast<std::size_t>(seqs * kv_heads);
    index.assign(lists * static_cast<std::size_t>(capacity), -1);
    count.assign(lists, -1);
    tail_begin.assign(lists, -1);
    tokens.index = TensorView<std::int32_t, 3>(index.data(), seqs, kv_heads, capacity);
    tokens.count = TensorView<std::int32_t, 2>(count.data(), seqs, kv_heads);
    tokens.tail_begin = TensorView<std::int32_t, 2>(tail_begin.data(), seqs, kv_heads);
  }
  TokenLists(const TokenLists&) = delete;  // `tokens` views the vectors
  TokenLists& operator=(const TokenLists&) = delete;
};

}  // namespace vesper
