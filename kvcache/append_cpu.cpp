// The append pass on the CPU, a row a query token; see kvcache/append.h.
#include <cmath>
#include <cstdint>
#include <vector>

#include "engine/core/parallel.h"
#include "kvcache/append.h"

namespace vesper::cpu {
namespace {

// Cosines and sines of one position, shared by all heads of its token.
struct Rotation {
  std::vector<float> cosine;
  std::vector<float> sine;

  explicit Rotation(std::int64_t half) : cosine(static_cast<std::size_t>(half)), sine(static_cast<std::size_t>(half)) {}

  void turn_to(std::int32_t position, const float* inv_freq, float factor) {
    for (std::size_t d = 0; d < cosine.size(); ++d) {
      const float angle = static_cast<float>(position) * inv_freq[d];
      cosine[d] = std::cos(angle) * factor;
      sine[d] = std::sin(angle) * factor;
    }
  }

  // The two channels that rotate-half pairs with `d`, for d < half.
  [[nodiscard]] float low(const float* x, std::size_t d) const {
    return x[d] * cosine[d] - x[d + cosine.size()] * sine[d];
  }
  [[nodiscard]] float high(const float* x, std::size_t d) const {
    return x[d + cosine.size()] * cosine[d] + x[d] * sine[d];
  }
};

}  // namespace

void append_kv(TensorView<const float, 2> qkv, const Rope& rope, const Batch& batch, const LayerKv& kv,
               TensorView<float, 2> q_out) {
  const auto k_cache = kv.k.as<float, 4>();
  const auto v_cache = kv.v.as<float, 4>();
  const auto kv_heads = static_cast<int>(k_cache.shape(1));
  const auto page_tokens = static_cast<int>(k_cache.shape(2));
  const auto head_dim = static_cast<int>(k_cache.shape(3));
  const int heads = static_cast<int>(q_out.shape(1)) / head_dim;
  const int half = head_dim / 2;

  parallel_for(batch.tokens, 8, [&](std::int64_t begin, std::int64_t end) {
    Rotation rotation(half);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int32_t position = batch.positions(t);
      const std::int32_t seq = batch.seq_of_token(t);
      rotation.turn_to(position, &rope.inv_freq(std::int64_t{seq} * rope.seq_stride), rope.attention_factor);

      for (int h = 0; h < heads; ++h) {
        const float* from = &qkv(t, h * head_dim);
        float* to = &q_out(t, h * head_dim);
        for (int d = 0; d < half; ++d) {
          to[d] = rotation.low(from, static_cast<std::size_t>(d));
          to[d + half] = rotation.high(from, static_cast<std::size_t>(d));
        }
      }

      const std::int32_t page = batch.page_table(seq, position / page_tokens);
      const int line = position % page_tokens;
      for (int g = 0; g < kv_heads; ++g) {
        const float* k = &qkv(t, (heads + g) * head_dim);
        const float* v = &qkv(t, (heads + kv_heads + g) * head_dim);
        float* k_tile = &k_cache(page, g, 0, 0);
        float* v_tile = &v_cache(page, g, 0, 0);
        for (int d = 0; d < half; ++d) {
          k_tile[tile_offset(line, d, head_dim)] = rotation.low(k, static_cast<std::size_t>(d));
          k_tile[tile_offset(line, d + half, head_dim)] = rotation.high(k, static_cast<std::size_t>(d));
        }
        for (int d = 0; d < head_dim; ++d) v_tile[tile_offset(line, d, head_dim)] = v[d];
      }
    }
  });
}

}  // namespace vesper::cpu
