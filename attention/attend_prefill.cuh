// What the two kernels of prefill attention share: their arguments, and how query heads and tokens become rows.
#pragma once

#include <bit>

#include "attention/attend.h"
#include "attention/mma.cuh"

namespace vesper::cuda {

inline constexpr int kPrefillRows = 128;  // query rows of a block

template <typename T>
struct PrefillArgs {
  TensorView<const T, 3> q;  // [tokens, heads, head_dim]
  TensorView<T, 3> out;
  const T* k = nullptr;  // [pages, kv_heads, page_tokens, head_dim] tiles
  const T* v = nullptr;
  TensorView<const std::int32_t, 1> positions;
  TensorView<const std::int32_t, 1> query_start;
  TensorView<const std::int32_t, 2> page_table;
  int group = 0;
  int page_shift = 0;       // page_tokens = 1 << page_shift
  int page_elements = 0;    // of one page, over its KV heads
  float scale_log2 = 0.0F;  // scale * log2(e): scores become exponents of 2
};

template <typename T>
PrefillArgs<T> prefill_args(const AttentionShape& shape, const TensorRef& q, const LayerKv& kv, const Batch& batch,
                            const TensorRef& out) {
  PrefillArgs<T> args;
  args.q = TensorView<const T, 3>(static_cast<const T*>(q.data), q.shape[0], shape.heads, shape.head_dim);
  args.out = TensorView<T, 3>(static_cast<T*>(out.data), out.shape[0], shape.heads, shape.head_dim);
  args.k = static_cast<const T*>(kv.k.data);
  args.v = static_cast<const T*>(kv.v.data);
  args.positions = batch.positions;
  args.query_start = batch.query_start;
  args.page_table = batch.page_table;
  args.group = shape.group();
  args.page_shift = std::countr_zero(static_cast<unsigned>(shape.page_tokens));
  args.page_elements = shape.kv_heads * shape.page_tokens * shape.head_dim;
  args.scale_log2 = shape.scale * kLog2E;
  return args;
}

// Grid (kv_heads, seqs, tiles of rows), the last tiles, which see the most keys, first.
inline dim3 prefill_grid(const AttentionShape& shape, const Batch& batch) {
  const std::int64_t rows = std::int64_t{batch.max_query_tokens} * shape.group();
  return {static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs),
          static_cast<unsigned>((rows + kPrefillRows - 1) / kPrefillRows)};
}

// The rows of this block: row r of a sequence and KV head is token r / group, head r % group, so any group fills the
// tiles and the diagonal wastes less. Rows behind the sequence's last stand for the last.
struct QueryRows {
  int first_token;  // of the sequence
  int group;
  int kv_head;
  int first;
  int last;  // of the sequence
  __device__ int token(int row) const { return first_token + min(row, last) / group; }
  __device__ int head(int row) const { return kv_head * group + min(row, last) % group; }
};

template <typename T>
__device__ QueryRows query_rows(const PrefillArgs<T>& args) {
  const int s = static_cast<int>(blockIdx.y);
  QueryRows rows;
  rows.first_token = args.query_start(s);
  rows.group = args.group;
  rows.kv_head = static_cast<int>(blockIdx.x);
  rows.first = static_cast<int>(gridDim.z - 1 - blockIdx.z) * kPrefillRows;
  rows.last = (args.query_start(s + 1) - rows.first_token) * args.group - 1;
  return rows;
}

// The same attention by products of whole warpgroups, for devices of compute capability 9.0 and code made for them.
bool has_wgmma();
void attend_prefill_wgmma(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                          const Batch& batch, const TensorRef& out);

}  // namespace vesper::cuda
