// A ragged batch over a paged cache with shuffled pages, and the same keys and values as plain rows, for tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "kvcache/batch.h"
#include "kvcache/layout.h"

namespace vesper {

inline std::vector<float> random_floats(std::mt19937& random, std::size_t count, float low = -1.0F, float high = 1.0F) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

// Lengths and query tokens of a step, and the arrays that a Batch views. `query_tokens` are the last ones of each
// sequence. Pages are given out in random order, and the pool holds a few that nobody owns.
struct RaggedBatch {
  std::vector<std::int32_t> ids, positions, seq_of_token, query_start, kv_len, page_table, request;
  Batch batch;
  int pages = 0;  // of the pool

  RaggedBatch(std::mt19937& random, Phase phase, const std::vector<int>& lengths, const std::vector<int>& query_tokens,
              int page_tokens) {
    const auto seqs = static_cast<int>(lengths.size());
    query_start.push_back(0);
    int capacity = 1;
    for (int s = 0; s < seqs; ++s) {
      const int length = lengths[static_cast<std::size_t>(s)];
      const int queries = query_tokens[static_cast<std::size_t>(s)];
      kv_len.push_back(length);
      request.push_back(s);
      for (int t = length - queries; t < length; ++t) {
        ids.push_back(0);
        positions.push_back(t);
        seq_of_token.push_back(s);
      }
      query_start.push_back(static_cast<std::int32_t>(positions.size()));
      const int needed = (length + page_tokens - 1) / page_tokens;
      capacity = std::max(capacity, needed);
      pages += needed;
    }
    pages += 3;
    std::vector<std::int32_t> pool(static_cast<std::size_t>(pages));
    std::iota(pool.begin(), pool.end(), 0);
    std::shuffle(pool.begin(), pool.end(), random);
    // Entries past a sequence's last page must not be read: they name a page that does not exist.
    page_table.assign(static_cast<std::size_t>(seqs * capacity), pages + 1000000);
    for (int s = 0; s < seqs; ++s) {
      const int needed = (lengths[static_cast<std::size_t>(s)] + page_tokens - 1) / page_tokens;
      for (int p = 0; p < needed; ++p) {
        page_table[static_cast<std::size_t>(s * capacity + p)] = pool.back();
        pool.pop_back();
      }
    }
    const auto tokens = static_cast<int>(positions.size());
    batch.phase = phase;
    batch.seqs = seqs;
    batch.tokens = tokens;
    batch.max_query_tokens = *std::max_element(query_tokens.begin(), query_tokens.end());
    batch.max_kv_len = *std::max_element(lengths.begin(), lengths.end());
    batch.ids = TensorView<const std::int32_t, 1>(ids.data(), tokens);
    batch.positions = TensorView<const std::int32_t, 1>(positions.data(), tokens);
    batch.seq_of_token = TensorView<const std::int32_t, 1>(seq_of_token.data(), tokens);
    batch.query_start = TensorView<const std::int32_t, 1>(query_start.data(), seqs + 1);
    batch.kv_len = TensorView<const std::int32_t, 1>(kv_len.data(), seqs);
    batch.request = TensorView<const std::int32_t, 1>(request.data(), seqs);
    batch.page_table = TensorView<const std::int32_t, 2>(page_table.data(), seqs, capacity);
    batch.host_kv_len = kv_len;
  }
  RaggedBatch(const RaggedBatch&) = delete;  // `batch` views the vectors
  RaggedBatch& operator=(const RaggedBatch&) = delete;
};

// One layer's K or V of such a batch, fp32, first filled with NaN: what nobody wrote must not be read.
struct PagedTensor {
  int kv_heads, page_tokens, head_dim;
  std::vector<float> data;
  std::int64_t pages;

  PagedTensor(std::int64_t pool_pages, int heads, int tokens, int channels)
      : kv_heads(heads),
        page_tokens(tokens),
        head_dim(channels),
        data(static_cast<std::size_t>(pool_pages * heads * tokens * channels), NAN),
        pages(pool_pages) {}

  [[nodiscard]] TensorRef ref() { return tensor_ref(data.data(), DType::kF32, pages, kv_heads, page_tokens, head_dim); }

  // Channel d of token t of sequence s, KV head g.
  float& at(const Batch& batch, int s, int t, int g, int d) {
    const std::int64_t tile = std::int64_t{batch.page_table(s, t / page_tokens)} * kv_heads + g;
    return data[static_cast<std::size_t>(tile * page_tokens * head_dim + tile_offset(t % page_tokens, d, head_dim))];
  }

  void fill(const Batch& batch, std::mt19937& random) {
    std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
    for (int s = 0; s < batch.seqs; ++s) {
      for (int t = 0; t < batch.kv_len(s); ++t) {
        for (int g = 0; g < kv_heads; ++g) {
          for (int d = 0; d < head_dim; ++d) at(batch, s, t, g, d) = uniform(random);
        }
      }
    }
  }
};

}  // namespace vesper
