#include "models/rope_table.h"

#include <algorithm>
#include <cassert>

#include "engine/core/stream.h"

namespace vesper {

RopeTable::RopeTable(const RopeConfig& rope, int head_dim, int max_seqs, const Exec& exec)
    : rope_(rope), head_dim_(head_dim), lengths_(static_cast<std::size_t>(is_dynamic() ? max_seqs : 1)) {
  std::fill(lengths_.begin(), lengths_.end(), rope.original_positions);
  const std::vector<float> row = rope_inv_freq(rope, head_dim, rope.original_positions);
  for (std::size_t s = 0; s < lengths_.size(); ++s) rows_.insert(rows_.end(), row.begin(), row.end());
  const auto bytes = static_cast<std::int64_t>(rows_.size() * sizeof(float));
  device_ = Buffer(memory_of(exec.device), bytes, "the rotary frequencies");
  copy_bytes(exec, device_.data(), rows_.data(), bytes);
}

void RopeTable::update(const Exec& exec, std::span<const int> lengths) {
  if (!is_dynamic()) return;
  assert(lengths.size() <= lengths_.size());
  bool changed = false;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    const int length = std::max(lengths[s], rope_.original_positions);
    if (length == lengths_[s]) continue;
    const std::vector<float> row = rope_inv_freq(rope_, head_dim_, length);
    std::copy(row.begin(), row.end(), rows_.begin() + static_cast<std::ptrdiff_t>(s) * pairs());
    lengths_[s] = length;
    changed = true;
  }
  if (!changed) return;
  // From pageable memory, which the driver has read when the call returns: the rows may change again at once.
  const auto count = static_cast<std::int64_t>(lengths.size()) * pairs();
  copy_bytes(exec, device_.data(), rows_.data(), count * static_cast<std::int64_t>(sizeof(float)));
}

Rope RopeTable::rope() const {
  return {.inv_freq = device_.view<const float>(static_cast<std::int64_t>(rows_.size())),
          .seq_stride = is_dynamic() ? pairs() : 0,
          .attention_factor = static_cast<float>(rope_.attention_factor)};
}

}  // namespace vesper
