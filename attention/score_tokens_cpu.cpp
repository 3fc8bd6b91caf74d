// Scores of single tokens on the CPU; see attention/score_tokens.h. A piece of work is a block of one KV head's
// candidates: a key is read once for the query heads of the group.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/score_tokens.h"
#include "engine/core/lanes.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {
namespace {

constexpr int kBlockCandidates = 256;

// What one line of a page says about its key: q . k = factor * (q . row) + offset * sum(q).
struct KeyRow {
  float factor = 1.0F;
  float offset = 0.0F;
};

KeyRow read_key(const LayerKv& kv, KeySource source, int page, int g, int line, int head_dim, float* row) {
  if (source == KeySource::kExact) {
    const float* tile = &kv.k.as<const float, 4>()(page, g, 0, 0);
    for (int d = 0; d < head_dim; ++d) row[d] = tile[tile_offset(line, d, head_dim)];
    return {};
  }
  const std::uint8_t* codes = &kv.int4.as<const std::uint8_t, 4>()(page, g, line, 0);
  for (int d = 0; d < head_dim; d += 2) {
    row[d] = static_cast<float>(codes[d / 2] & 0xF);
    row[d + 1] = static_cast<float>(codes[d / 2] >> 4);
  }
  const f16* scale_zero = &kv.int4_params.as<const f16, 4>()(page, g, line, 0);
  return {.factor = to_float(scale_zero[0]), .offset = to_float(scale_zero[1])};
}

float dot(const float* a, const float* b, int padded) {
  baseline::f32x8 sum = baseline::splat(0.0F);
  for (int d = 0; d < padded; d += 8) sum += baseline::load(a + d) * baseline::load(b + d);
  return baseline::join(sum);
}

}  // namespace

void score_tokens(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                  const Selection& pages, KeySource source, DenseLimit dense, TensorView<float, 3> scores) {
  const int group = shape.group();
  const int head_dim = shape.head_dim;
  const int page_tokens = shape.page_tokens;
  const int padded = (head_dim + 7) / 8 * 8;
  const std::int64_t blocks = (scores.shape(2) + kBlockCandidates - 1) / kBlockCandidates;

  parallel_for(std::int64_t{batch.seqs} * shape.kv_heads * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(padded));
    std::vector<float> queries(static_cast<std::size_t>(std::int64_t{group} * padded));  // rows padded with zeros
    std::vector<float> sum_of_q(static_cast<std::size_t>(group));
    const std::vector<float> ones(static_cast<std::size_t>(padded), 1.0F);
    for (std::int64_t i = begin; i < end; ++i) {
      const auto first = static_cast<int>(i % blocks) * kBlockCandidates;
      const auto g = static_cast<int>(i / blocks % shape.kv_heads);
      const auto s = static_cast<int>(i / blocks / shape.kv_heads);
      const std::int32_t kv_len = batch.kv_len(s);
      if (kv_len <= dense.tokens) continue;
      const bool listed = pages.index.data() != nullptr;
      const int candidates = listed ? pages.count(s, g) * page_tokens : kv_len;
      const int last = std::min(candidates, first + kBlockCandidates);
      if (first >= last) continue;

      for (int h = 0; h < group; ++h) {
        float* padded_q = queries.data() + std::int64_t{h} * padded;
        std::copy_n(&q(s, std::int64_t{g * group + h} * head_dim), head_dim, padded_q);
        sum_of_q[static_cast<std::size_t>(h)] = dot(padded_q, ones.data(), padded);
      }
      for (int j = first; j < last; ++j) {
        const int page = listed ? pages.index(s, g, j / page_tokens) : j / page_tokens;
        const int line = j % page_tokens;
        if (page * page_tokens + line >= kv_len) {
          for (int h = g * group; h < (g + 1) * group; ++h) scores(s, h, j) = -INFINITY;
          continue;
        }
        const KeyRow key = read_key(kv, source, batch.page_table(s, page), g, line, head_dim, row.data());
        for (int h = 0; h < group; ++h) {
          const float q_row = dot(queries.data() + std::int64_t{h} * padded, row.data(), padded);
          scores(s, g * group + h, j) =
              shape.scale * (key.factor * q_row + key.offset * sum_of_q[static_cast<std::size_t>(h)]);
        }
      }
    }
  });
}

}  // namespace vesper::cpu
