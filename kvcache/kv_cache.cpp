#include "kvcache/kv_cache.h"

#include <cassert>
#include <string>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/philox.h"

namespace vesper {
namespace {

// Every layer's tensors in the cache's memory: K and V of all layers, then side tables, each of which starts on 256
// bytes. Without memory (null) only the size is of use.
struct Placement {
  std::vector<LayerKv> layers;
  std::int64_t bytes = 0;
};

Placement place(const KvShape& shape, std::int64_t pages, std::span<const SideTables> side_tables, void* memory) {
  assert(side_tables.empty() || static_cast<int>(side_tables.size()) == shape.layers);
  Placement placed;
  const auto put = [&](TensorRef& tensor, DType dtype, std::int64_t rows, std::int64_t columns) {
    tensor = tensor_ref(nullptr, dtype, pages, shape.kv_heads, rows, columns);
    if (memory != nullptr) tensor.data = static_cast<std::byte*>(memory) + placed.bytes;
    placed.bytes += tensor.bytes();
  };
  const auto put_aligned = [&](TensorRef& tensor, DType dtype, std::int64_t rows, std::int64_t columns) {
    placed.bytes = (placed.bytes + 255) / 256 * 256;
    put(tensor, dtype, rows, columns);
  };

  for (int l = 0; l < shape.layers; ++l) {
    LayerKv& layer = placed.layers.emplace_back();
    put(layer.k, shape.dtype, shape.page_tokens, shape.head_dim);
    put(layer.v, shape.dtype, shape.page_tokens, shape.head_dim);
  }
  for (std::size_t l = 0; l < side_tables.size(); ++l) {
    LayerKv& layer = placed.layers[l];
    if (side_tables[l].page_bounds) put_aligned(layer.bounds, shape.dtype, 2, shape.head_dim);
    if (side_tables[l].int8_bounds) {
      put_aligned(layer.int8_bounds, DType::kU8, 2, shape.head_dim);
      put_aligned(layer.int8_scales, DType::kBf16, 2, bound_spans(shape.head_dim));
    }
    if (side_tables[l].page_moments) put_aligned(layer.moments, DType::kF32, 2, shape.head_dim);
    if (side_tables[l].int4_keys) {
      put_aligned(layer.int4, DType::kU8, shape.page_tokens, shape.head_dim / 2);
      put_aligned(layer.int4_params, DType::kF16, shape.page_tokens, 2);
    }
  }
  return placed;
}

// The shape, if it can have these side tables.
const KvShape& checked(const KvShape& shape, std::span<const SideTables> side_tables) {
  for (const SideTables& tables : side_tables) {
    if (!tables.int4_keys || shape.head_dim % 2 == 0) continue;
    refuse({"keeping int4 keys", "head_dim " + std::to_string(shape.head_dim), "an even number: two keys share a byte",
            "choose an attention backend that needs no int4 keys"});
  }
  return shape;
}

}  // namespace

std::int64_t KvCache::bytes(const KvShape& shape, std::int64_t pages, std::span<const SideTables> side_tables) {
  return place(shape, pages, side_tables, nullptr).bytes;
}

KvCache::KvCache(const KvShape& shape, int pages, DeviceKind device, std::span<const SideTables> side_tables)
    : shape_(checked(shape, side_tables)),
      pages_(pages),
      storage_(memory_of(device), bytes(shape, pages, side_tables), "the KV cache"),
      layers_(place(shape, pages, side_tables, storage_.data()).layers) {
  free_.reserve(static_cast<std::size_t>(pages));
  for (std::int32_t page = pages - 1; page >= 0; --page) free_.push_back(page);
}

// Fisher and Yates, from the last page down. The draw's remainder favours low pages by less than pages / 2^32.
void KvCache::shuffle_free_pages(std::uint64_t seed) {
  const PhiloxKey key{{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}};
  for (std::size_t i = free_.size(); i > 1; --i) {
    const std::uint32_t drawn = philox({{static_cast<std::uint32_t>(i), 0, 0, 0}}, key).word[0];
    std::swap(free_[i - 1], free_[drawn % i]);
  }
}

bool KvCache::reserve(CachedSequence& sequence, int tokens) {
  const int missing = pages_for(tokens) - static_cast<int>(sequence.pages.size());
  if (missing > free_pages()) return false;
  for (int i = 0; i < missing; ++i) {
    sequence.pages.push_back(free_.back());
    free_.pop_back();
  }
  return true;
}

void KvCache::truncate(CachedSequence& sequence, int length) {
  assert(length >= 0 && length <= sequence.length);
  sequence.length = length;
  sequence.prompt_length = std::min(sequence.prompt_length, length);
  while (static_cast<int>(sequence.pages.size()) > pages_for(length)) {
    free_.push_back(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

}  // namespace vesper
