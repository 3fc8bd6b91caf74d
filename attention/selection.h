// Which cached keys a decode step reads: the vocabulary that selectors write and `attend_selected` reads.
#pragma once

#include <cmath>
#include <cstdint>

#include "engine/core/tensor.h"

namespace vesper {

// A number of tokens: below 1 a fraction of the visible context, rounded up; from 1 on a count.
struct Amount {
  double value = 0.0;
  bool operator==(const Amount&) const = default;
};

// Tokens that `amount` means where `visible` tokens are visible; never more than these. Same bits on host and device.
VESPER_HD inline std::int32_t tokens_of(Amount amount, std::int32_t visible) {
  const double tokens = amount.value < 1.0 ? ceil(amount.value * visible) : floor(amount.value);
  return tokens < visible ? static_cast<std::int32_t>(tokens) : visible;
}

enum class SelectionUnit : std::uint8_t { kPages, kTokens };

// A list for each (sequence, KV head), on the step's device at fixed addresses; the query heads of the group attend to
// the whole of it. Entries are unique and in range; the newest token (or its page) is on every list. The static part,
// entries [0, tail_begin), is ascending; entries [tail_begin, count) are the random tail in draw order, its first
// entries being the pilot. Capacity covers the worst case; nothing is truncated. Lists of sequences that attend dense
// are left as they are and never read.
struct Selection {
  SelectionUnit unit = SelectionUnit::kTokens;
  TensorView<std::int32_t, 3> index;       // [seqs, kv_heads, capacity] token or page numbers of the sequence
  TensorView<std::int32_t, 2> count;       // [seqs, kv_heads]
  TensorView<std::int32_t, 2> tail_begin;  // [seqs, kv_heads]; = count where there is no tail
  TensorView<float, 2> tail_log_weight;    // [seqs, kv_heads] log(n_rest / b); read where there is a tail
};

// Sequences with kv_len <= dense_limit attend dense; every selector and attend_selected skip them, and attend_decode
// skips the others. Host and device decide alike, from the length only.
struct DenseLimit {
  std::int32_t tokens = 0;
};

}  // namespace vesper
