// The 4-bit copies of a paged tensor of keys (kvcache/side_tables.h), made one row at a time, for tests that read them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/paged.h"

namespace vesper {

struct Int4Keys {
  std::int64_t pages;
  int kv_heads, page_tokens, head_dim;
  std::vector<std::uint8_t> codes;  // [pages, kv_heads, page_tokens, head_dim / 2]
  std::vector<f16> params;          // [pages, kv_heads, page_tokens, {scale, zero}]

  // Lines that hold no token keep codes of 15 and parameters of NaN: they must not be read.
  Int4Keys(PagedTensor& k, const Batch& batch)
      : pages(k.pages),
        kv_heads(k.kv_heads),
        page_tokens(k.page_tokens),
        head_dim(k.head_dim),
        codes(k.data.size() / 2, 0xFF),
        params(static_cast<std::size_t>(pages * kv_heads * page_tokens * 2), to_f16(NAN)) {
    std::vector<float> row(static_cast<std::size_t>(head_dim));
    for (int s = 0; s < batch.seqs; ++s) {
      for (int t = 0; t < batch.kv_len(s); ++t) {
        for (int g = 0; g < kv_heads; ++g) {
          for (int d = 0; d < head_dim; ++d) row[static_cast<std::size_t>(d)] = k.at(batch, s, t, g, d);
          quantise(row, line_of(batch, s, t, g));
        }
      }
    }
  }

  // Number of the line that holds token t of sequence s, KV head g.
  [[nodiscard]] std::size_t line_of(const Batch& batch, int s, int t, int g) const {
    const std::int64_t tile = std::int64_t{batch.page_table(s, t / page_tokens)} * kv_heads + g;
    return static_cast<std::size_t>(tile * page_tokens + t % page_tokens);
  }
  [[nodiscard]] float code(std::size_t line, int d) const {
    const int both = codes[line * static_cast<std::size_t>(head_dim / 2) + static_cast<std::size_t>(d / 2)];
    return static_cast<float>(d % 2 == 0 ? both & 0xF : both >> 4);
  }
  [[nodiscard]] double scale(std::size_t line) const { return to_float(params[2 * line]); }
  [[nodiscard]] double zero(std::size_t line) const { return to_float(params[2 * line + 1]); }

  [[nodiscard]] TensorRef codes_ref() {
    return tensor_ref(codes.data(), DType::kU8, pages, kv_heads, page_tokens, head_dim / 2);
  }
  [[nodiscard]] TensorRef params_ref() {
    return tensor_ref(params.data(), DType::kF16, pages, kv_heads, page_tokens, 2);
  }

 private:
  void quantise(const std::vector<float>& row, std::size_t line) {
    const auto [least, largest] = std::minmax_element(row.begin(), row.end());
    const f16 zero = to_f16(*least);
    const f16 scale = to_f16((*largest - to_float(zero)) / 15.0F);
    params[2 * line] = scale;
    params[2 * line + 1] = zero;
    std::uint8_t* packed = &codes[line * static_cast<std::size_t>(head_dim / 2)];
    for (int d = 0; d < head_dim; ++d) {
      const float step = to_float(scale);
      const float level =
          step > 0.0F ? std::nearbyint((row[static_cast<std::size_t>(d)] - to_float(zero)) / step) : 0.0F;
      const int code = static_cast<int>(std::clamp(level, 0.0F, 15.0F));
      packed[d / 2] = static_cast<std::uint8_t>(d % 2 == 0 ? code : packed[d / 2] | code << 4);
    }
  }
};

}  // namespace vesper
