// What dense decode attention and attention to a selection share on the host: which sequences of a batch are theirs,
// and how partial results are joined.
#pragma once

#include <cstdint>

#include "attention/attend.h"

namespace vesper {

// The sequences of a batch that an operation attends for, by their kv_len; it leaves all others alone.
struct LengthRange {
  std::int32_t above = -1;
  std::int32_t longest = INT32_MAX;
  [[nodiscard]] VESPER_HD bool contains(std::int32_t kv_len) const { return kv_len > above && kv_len <= longest; }
};

// out = sum_i e^{lse_i} out_i / sum_i e^{lse_i} over the splits i of `partials`, for the sequences in `lengths`. An
// empty split has lse = -inf, and its partial output is not read.
//   out [seqs, heads * head_dim];  lse [seqs, heads] where its data is not null
namespace cpu {
void merge_splits(const AttentionShape& shape, const Batch& batch, LengthRange lengths, const SplitPartials& partials,
                  TensorView<float, 2> out, TensorView<float, 2> lse);
}  // namespace cpu
namespace cuda {
void merge_splits(const Exec& exec, const AttentionShape& shape, const Batch& batch, LengthRange lengths,
                  const SplitPartials& partials, const TensorRef& out, TensorView<float, 2> lse);
}  // namespace cuda

}  // namespace vesper
