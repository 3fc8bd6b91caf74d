// The side tables on the CPU, a page and KV head at a time; see kvcache/side_tables.h.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "engine/core/parallel.h"
#include "kvcache/side_tables.h"

namespace vesper::cpu {
namespace {

// The keys of one page and KV head, as far as they hold tokens.
struct PageKeys {
  const float* tile = nullptr;
  int lines = 0;
  int head_dim = 0;

  [[nodiscard]] float at(int t, int d) const { return tile[tile_offset(t, d, head_dim)]; }
};

void write_bounds(const PageKeys& keys, float* least, float* largest) {
  for (int d = 0; d < keys.head_dim; ++d) {
    least[d] = largest[d] = keys.at(0, d);
    for (int t = 1; t < keys.lines; ++t) {
      const float key = keys.at(t, d);
      if (key < least[d]) least[d] = key;
      if (key > largest[d]) largest[d] = key;
    }
  }
}

// The least scale whose 127-fold reaches `magnitude`.
bf16 bound_scale(float magnitude) {
  bf16 scale{static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(magnitude / 127.0F) >> 16)};
  while (127.0F * to_float(scale) < magnitude) ++scale.bits;
  return scale;
}

// The least number of steps that reaches `bound`; the quotient may have been rounded down to a whole number.
int steps_up(float bound, float scale) {
  if (scale == 0.0F) return 0;
  float steps = std::ceil(bound / scale);
  if (steps * scale < bound) steps += 1.0F;
  return static_cast<int>(std::fmax(std::fmin(steps, 127.0F), -127.0F));
}

// Bounds in 8 bits, all spans of both sides.
void write_int8_bounds(const std::vector<float>& least, const std::vector<float>& largest, std::uint8_t* codes,
                       bf16* scales) {
  const auto head_dim = static_cast<int>(least.size());
  const auto spans = static_cast<int>(bound_spans(head_dim));
  for (int span = 0; span < spans; ++span) {
    const int begin = span * kBoundSpan;
    const int end = std::min(begin + kBoundSpan, head_dim);
    float below = 0.0F;
    float above = 0.0F;
    for (int d = begin; d < end; ++d) {
      below = std::fmax(below, std::abs(least[static_cast<std::size_t>(d)]));
      above = std::fmax(above, std::abs(largest[static_cast<std::size_t>(d)]));
    }
    scales[span] = bound_scale(below);
    scales[spans + span] = bound_scale(above);
    for (int d = begin; d < end; ++d) {
      const int down = -steps_up(-least[static_cast<std::size_t>(d)], to_float(scales[span]));
      const int up = steps_up(largest[static_cast<std::size_t>(d)], to_float(scales[spans + span]));
      codes[d] = static_cast<std::uint8_t>(down + kBoundZero);
      codes[head_dim + d] = static_cast<std::uint8_t>(up + kBoundZero);
    }
  }
}

void write_moments(const PageKeys& keys, float* sum, float* squares) {
  for (int d = 0; d < keys.head_dim; ++d) {
    sum[d] = squares[d] = 0.0F;
    for (int t = 0; t < keys.lines; ++t) {
      const float key = keys.at(t, d);
      sum[d] += key;
      squares[d] += key * key;
    }
  }
}

// Line t in four bits a channel. A zero is added to the extremes because of -0: which of +0 and -0 is the extreme must
// not depend on the order of comparison.
void write_int4(const PageKeys& keys, int t, std::uint8_t* codes, f16* params) {
  float least = keys.at(t, 0);
  float largest = least;
  for (int d = 1; d < keys.head_dim; ++d) {
    least = std::min(least, keys.at(t, d));
    largest = std::max(largest, keys.at(t, d));
  }
  params[1] = to_f16(least + 0.0F);
  const float zero = to_float(params[1]);
  params[0] = to_f16(((largest + 0.0F) - zero) / 15.0F);
  const float scale = to_float(params[0]);

  const auto code = [&](int d) {
    if (scale == 0.0F) return 0U;
    const float steps = std::nearbyint((keys.at(t, d) - zero) / scale);
    return steps > 0.0F ? static_cast<unsigned>(std::min(steps, 15.0F)) : 0U;
  };
  for (int c = 0; c < keys.head_dim / 2; ++c) {
    codes[c] = static_cast<std::uint8_t>(code(2 * c) | (code(2 * c + 1) << 4));
  }
}

}  // namespace

void update_side_tables(const Batch& batch, const LayerKv& kv) {
  const auto k = kv.k.as<const float, 4>();
  const auto kv_heads = k.shape(1);
  const auto page_tokens = static_cast<int>(k.shape(2));
  const auto head_dim = static_cast<int>(k.shape(3));
  // Pages that the tokens of one sequence can touch: the first may begin in mid-page.
  const std::int64_t seq_pages = (batch.max_query_tokens + page_tokens - 2) / page_tokens + 1;

  parallel_for(batch.seqs * seq_pages * kv_heads, 8, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> least(static_cast<std::size_t>(head_dim));
    std::vector<float> largest(static_cast<std::size_t>(head_dim));
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t g = i % kv_heads;
      const std::int64_t s = i / kv_heads / seq_pages;
      const std::int32_t first = batch.query_start(s);
      const std::int32_t last = batch.query_start(s + 1) - 1;
      if (first > last) continue;
      const auto p = batch.positions(first) / page_tokens + static_cast<int>(i / kv_heads % seq_pages);
      if (p > batch.positions(last) / page_tokens) continue;

      const std::int32_t page = batch.page_table(s, p);
      const PageKeys keys{.tile = &k(page, g, 0, 0),
                          .lines = std::min(page_tokens, batch.kv_len(s) - p * page_tokens),
                          .head_dim = head_dim};
      if (kv.bounds.data != nullptr) {
        const auto bounds = kv.bounds.as<float, 4>();
        write_bounds(keys, &bounds(page, g, 0, 0), &bounds(page, g, 1, 0));
      }
      if (kv.int8_bounds.data != nullptr) {
        const auto codes = kv.int8_bounds.as<std::uint8_t, 4>();
        const auto scales = kv.int8_scales.as<bf16, 4>();
        write_bounds(keys, least.data(), largest.data());
        write_int8_bounds(least, largest, &codes(page, g, 0, 0), &scales(page, g, 0, 0));
      }
      if (kv.moments.data != nullptr) {
        const auto moments = kv.moments.as<float, 4>();
        write_moments(keys, &moments(page, g, 0, 0), &moments(page, g, 1, 0));
      }
      if (kv.int4.data != nullptr) {
        const auto codes = kv.int4.as<std::uint8_t, 4>();
        const auto params = kv.int4_params.as<f16, 4>();
        for (int t = 0; t < keys.lines; ++t) write_int4(keys, t, &codes(page, g, t, 0), &params(page, g, t, 0));
      }
    }
  });
}

}  // namespace vesper::cpu
