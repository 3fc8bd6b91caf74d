#include "attention/attend.h"

#include <algorithm>

namespace vesper {
namespace {

// Tokens of a split. Below the first it costs more to merge than it saves. Beyond the second a few blocks are not
// enough: in a step they are slower than alone, and a batch may hold one sequence much longer than the others
// (docs/kernels.md).
constexpr int kMinSplitTokens = 128;
constexpr int kFewBlocksTokens = 512;

constexpr int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

// Blocks that draw all that the memory gives: a quarter of those that run at once.
int enough_blocks(int units) {
  return divide_up(units, 4);
}

// Whether `rows * splits` blocks end in a round of so few that a sixteenth of the whole is lost.
bool ends_thin(int rows, int splits, int units) {
  constexpr int kPart = 16;
  const std::int64_t blocks = std::int64_t{rows} * splits;
  const std::int64_t last = blocks % units;
  return last > 0 && last < enough_blocks(units) && kPart * (enough_blocks(units) - last) > blocks;
}

// The fewest splits of each of `rows` (sequence, KV head)s that keep the device busy.
int least_splits(int rows, int units) {
  const int enough = enough_blocks(units);
  int splits = divide_up(enough - enough / 16, std::max(1, rows));
  while (ends_thin(rows, splits, units)) ++splits;
  return splits;
}

// Of one long sequence among short ones: half as many blocks as draw all that the memory gives.
int splits_of_one(int kv_heads, int units) {
  return divide_up(enough_blocks(units) / 2 - enough_blocks(units) / 16, kv_heads);
}

// Never fewer for a longer max_kv_len.
int splits_for_length(int seqs, int kv_heads, int max_kv_len, int units) {
  const int rows = std::max(1, seqs * kv_heads);
  const int least = least_splits(rows, units);
  if (max_kv_len / least <= kFewBlocksTokens) return least;
  const int of_one = std::min(splits_of_one(kv_heads, units), max_kv_len / (4 * kFewBlocksTokens));
  return std::max({least, units / rows, of_one});
}

int min_pages(const AttentionShape& shape) {
  return divide_up(kMinSplitTokens, shape.page_tokens);
}

}  // namespace

int wanted_splits(int seqs, int kv_heads, int units) {
  const int least = least_splits(seqs * kv_heads, units);
  return seqs > 1 ? std::max(least, splits_of_one(kv_heads, units)) : least;
}

int most_splits(const AttentionShape& shape, int seqs, int max_kv_len, int units) {
  const int pages = std::max(1, page_count(max_kv_len, shape.page_tokens));
  return std::min(splits_for_length(seqs, shape.kv_heads, max_kv_len, units), divide_up(pages, min_pages(shape)));
}

SplitPlan plan_splits(const AttentionShape& shape, int seqs, int max_kv_len, int units, int max_splits) {
  const int pages = std::max(1, page_count(max_kv_len, shape.page_tokens));
  const int wanted = std::clamp(splits_for_length(seqs, shape.kv_heads, max_kv_len, units), 1, std::max(1, max_splits));
  const int split_pages = std::max(min_pages(shape), divide_up(pages, wanted));
  return SplitPlan{.splits = divide_up(pages, split_pages), .min_tokens = min_pages(shape) * shape.page_tokens};
}

void attend_prefill(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::attend_prefill(exec, shape, q, kv, batch, out);
  }
  cpu::attend_prefill(shape, q.as<const float, 2>(), kv, batch, out.as<float, 2>());
}

void attend_decode(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                   const Batch& batch, const SplitPlan& plan, const SplitPartials& partials, const TensorRef& out,
                   TensorView<float, 2> lse, std::int32_t longest) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::attend_decode(exec, shape, q, kv, batch, plan, partials, out, lse, longest);
  }
  cpu::attend_decode(shape, q.as<const float, 2>(), kv, batch, plan, partials, out.as<float, 2>(), lse, longest);
}

Cost attend_decode_cost(const AttentionShape& shape, DType dtype, std::int64_t seqs, std::int64_t total_kv_len) {
  const std::int64_t kv_elements = 2 * total_kv_len * shape.kv_heads * shape.head_dim;
  const std::int64_t q_elements = 2 * seqs * shape.heads * shape.head_dim;
  return {.bytes = (kv_elements + q_elements) * dtype_bytes(dtype),
          .flops = 4 * total_kv_len * shape.heads * shape.head_dim};
}

Cost attend_prefill_cost(const AttentionShape& shape, DType dtype, std::int64_t query_tokens, std::int64_t kv_len) {
  const std::int64_t kv_elements = 2 * kv_len * shape.kv_heads * shape.head_dim;
  const std::int64_t q_elements = 2 * query_tokens * shape.heads * shape.head_dim;
  const std::int64_t before = kv_len - query_tokens;  // keys that every query sees
  const std::int64_t pairs = query_tokens * before + query_tokens * (query_tokens + 1) / 2;
  return {.bytes = (kv_elements + q_elements) * dtype_bytes(dtype), .flops = 4 * pairs * shape.heads * shape.head_dim};
}

}  // namespace vesper
