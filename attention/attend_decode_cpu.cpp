// Decode attention on the CPU, split over keys and merged; see attention/attend.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention/attend.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {
namespace {

// One head over the keys [key_begin, key_end) of sequence s.
void attend_split(const AttentionShape& shape, const float* query, const LayerKv& kv, const Batch& batch, int s, int g,
                  int key_begin, int key_end, float* result, float* lse) {
  const auto k_cache = kv.k.as<const float, 4>();
  const auto v_cache = kv.v.as<const float, 4>();
  const int head_dim = shape.head_dim;
  *lse = -INFINITY;
  for (int d = 0; d < head_dim; ++d) result[d] = 0.0F;
  if (key_begin >= key_end) return;
  std::vector<float> score(static_cast<std::size_t>(key_end - key_begin));
  float largest = -INFINITY;
  for (int key = key_begin; key < key_end; ++key) {
    const float* k = &k_cache(batch.page_table(s, key / shape.page_tokens), g, 0, 0);
    float sum = 0.0F;
    for (int d = 0; d < head_dim; ++d) sum += query[d] * k[tile_offset(key % shape.page_tokens, d, head_dim)];
    score[static_cast<std::size_t>(key - key_begin)] = sum * shape.scale;
    largest = std::max(largest, sum * shape.scale);
  }
  float total = 0.0F;
  for (int key = key_begin; key < key_end; ++key) {
    const float* v = &v_cache(batch.page_table(s, key / shape.page_tokens), g, 0, 0);
    const float weight = std::exp(score[static_cast<std::size_t>(key - key_begin)] - largest);
    total += weight;
    for (int d = 0; d < head_dim; ++d) result[d] += weight * v[tile_offset(key % shape.page_tokens, d, head_dim)];
  }
  for (int d = 0; d < head_dim; ++d) result[d] /= total;
  *lse = largest + std::log(total);
}

}  // namespace

void attend_decode(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                   const SplitPlan& plan, const SplitPartials& partials, TensorView<float, 2> out,
                   TensorView<float, 2> lse) {
  const int head_dim = shape.head_dim;
  const std::int64_t work = std::int64_t{batch.seqs} * shape.heads * plan.splits;
  parallel_for(work, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto split = static_cast<int>(i % plan.splits);
      const auto h = static_cast<int>(i / plan.splits % shape.heads);
      const auto s = static_cast<int>(i / plan.splits / shape.heads);
      const int key_begin = split * plan.split_tokens;
      const int key_end = std::min(batch.kv_len(s), key_begin + plan.split_tokens);
      attend_split(shape, &q(s, h * head_dim), kv, batch, s, h / shape.group(), key_begin, key_end,
                   &partials.out(s, h, split, 0), &partials.lse(s, h, split));
    }
  });

  for (int s = 0; s < batch.seqs; ++s) {
    for (int h = 0; h < shape.heads; ++h) {
      float largest = -INFINITY;
      for (int split = 0; split < plan.splits; ++split) largest = std::max(largest, partials.lse(s, h, split));
      float total = 0.0F;
      for (int d = 0; d < head_dim; ++d) out(s, h * head_dim + d) = 0.0F;
      for (int split = 0; split < plan.splits; ++split) {
        const float weight = std::exp(partials.lse(s, h, split) - largest);
        if (weight == 0.0F) continue;
        total += weight;
        for (int d = 0; d < head_dim; ++d) out(s, h * head_dim + d) += weight * partials.out(s, h, split, d);
      }
      for (int d = 0; d < head_dim; ++d) out(s, h * head_dim + d) /= total;
      if (lse.data() != nullptr) lse(s, h) = largest + std::log(total);
    }
  }
}

}  // namespace vesper::cpu
