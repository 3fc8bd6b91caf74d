// Causal prefill attention on the CPU; see attention/attend.h.
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention/attend.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {

void attend_prefill(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                    TensorView<float, 2> out) {
  const auto k_cache = kv.k.as<const float, 4>();
  const auto v_cache = kv.v.as<const float, 4>();
  const int head_dim = shape.head_dim;
  parallel_for(std::int64_t{batch.tokens} * shape.heads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t t = i / shape.heads;
      const auto h = static_cast<int>(i % shape.heads);
      const int g = h / shape.group();
      const float* query = &q(t, h * head_dim);
      float* result = &out(t, h * head_dim);
      const std::int32_t s = batch.seq_of_token(t);
      std::vector<float> score(static_cast<std::size_t>(batch.positions(t)) + 1);
      float largest = -INFINITY;
      for (std::size_t key = 0; key < score.size(); ++key) {
        const auto at = static_cast<int>(key);
        const float* k = &k_cache(batch.page_table(s, at / shape.page_tokens), g, 0, 0);
        float sum = 0.0F;
        for (int d = 0; d < head_dim; ++d) sum += query[d] * k[tile_offset(at % shape.page_tokens, d, head_dim)];
        score[key] = sum * shape.scale;
        largest = std::fmax(largest, score[key]);
      }
      float total = 0.0F;
      for (int d = 0; d < head_dim; ++d) result[d] = 0.0F;
      for (std::size_t key = 0; key < score.size(); ++key) {
        const auto at = static_cast<int>(key);
        const float* v = &v_cache(batch.page_table(s, at / shape.page_tokens), g, 0, 0);
        const float weight = std::exp(score[key] - largest);
        total += weight;
        for (int d = 0; d < head_dim; ++d) result[d] += weight * v[tile_offset(at % shape.page_tokens, d, head_dim)];
      }
      for (int d = 0; d < head_dim; ++d) result[d] /= total;
    }
  });
}

}  // namespace vesper::cpu
