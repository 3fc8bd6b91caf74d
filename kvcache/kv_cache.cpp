#include "kvcache/kv_cache.h"

#include <cassert>

namespace vesper {

KvCache::KvCache(const KvShape& shape, int pages, DeviceKind device)
    : shape_(shape),
      pages_(pages),
      storage_(device == DeviceKind::kCuda ? Memory::kDevice : Memory::kHost, bytes(shape, pages), "the KV cache") {
  free_.reserve(static_cast<std::size_t>(pages));
  for (std::int32_t page = pages - 1; page >= 0; --page) free_.push_back(page);
}

LayerKv KvCache::layer(int l) const {
  const std::int64_t tensor_bytes =
      std::int64_t{pages_} * shape_.kv_heads * shape_.page_tokens * shape_.head_dim * dtype_bytes(shape_.dtype);
  auto* base = static_cast<std::byte*>(storage_.data()) + std::int64_t{2} * l * tensor_bytes;
  const auto tensor = [&](std::byte* data) {
    return tensor_ref(data, shape_.dtype, pages_, shape_.kv_heads, shape_.page_tokens, shape_.head_dim);
  };
  return LayerKv{.k = tensor(base), .v = tensor(base + tensor_bytes)};
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
  while (static_cast<int>(sequence.pages.size()) > pages_for(length)) {
    free_.push_back(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

}  // namespace vesper
