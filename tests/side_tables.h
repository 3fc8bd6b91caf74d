// One layer's keys and side tables on the CPU for tests, poisoned first: what nobody wrote must not be read, and what
// must not be written shows.
#pragma once

#include <cstdint>
#include <vector>

#include "kvcache/side_tables.h"
#include "tests/paged.h"

namespace vesper {

inline constexpr std::uint8_t kPoisonByte = 0xA5;
inline constexpr f16 kPoisonF16{0x7E5A};  // NaNs that no conversion makes
inline constexpr bf16 kPoisonBf16{0x7FDA};

struct SideTensors {
  std::int64_t pages;
  int kv_heads, page_tokens, head_dim;
  std::vector<float> bounds, moments;
  std::vector<std::uint8_t> int8_bounds, int4;
  std::vector<bf16> int8_scales;
  std::vector<f16> int4_params;

  explicit SideTensors(const PagedTensor& k)
      : pages(k.pages), kv_heads(k.kv_heads), page_tokens(k.page_tokens), head_dim(k.head_dim) {
    const auto page_heads = static_cast<std::size_t>(pages * kv_heads);
    bounds.assign(page_heads * 2 * static_cast<std::size_t>(head_dim), NAN);
    moments = bounds;
    int8_bounds.assign(bounds.size(), kPoisonByte);
    int8_scales.assign(page_heads * 2 * static_cast<std::size_t>(bound_spans(head_dim)), kPoisonBf16);
    int4.assign(page_heads * static_cast<std::size_t>(page_tokens * (head_dim / 2)), kPoisonByte);
    int4_params.assign(page_heads * static_cast<std::size_t>(page_tokens) * 2, kPoisonF16);
  }

  // The layer of `k` with these tables, values left out.
  LayerKv layer(PagedTensor& k) {
    return {.k = k.ref(),
            .v = {},
            .bounds = tensor_ref(bounds.data(), DType::kF32, pages, kv_heads, 2, head_dim),
            .int8_bounds = tensor_ref(int8_bounds.data(), DType::kU8, pages, kv_heads, 2, head_dim),
            .int8_scales = tensor_ref(int8_scales.data(), DType::kBf16, pages, kv_heads, 2, bound_spans(head_dim)),
            .moments = tensor_ref(moments.data(), DType::kF32, pages, kv_heads, 2, head_dim),
            .int4 = tensor_ref(int4.data(), DType::kU8, pages, kv_heads, page_tokens, head_dim / 2),
            .int4_params = tensor_ref(int4_params.data(), DType::kF16, pages, kv_heads, page_tokens, 2)};
  }
};

}  // namespace vesper
