#include "attention/attend.h"

#include <algorithm>

namespace vesper {
namespace {

// A split shorter than this many tokens costs more to merge than it saves.
constexpr int kMinSplitTokens = 128;
constexpr std::int64_t kLongSplitTokens = 8192;

constexpr int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

}  // namespace

int wanted_splits(int seqs, int kv_heads, int units) {
  // A quarter of the blocks that run at once draws all that the memory gives (docs/kernels.md), so fewer in a last
  // round last as long as one quarter. Where one sequence is much longer than the others, half as many are left in the
  // end.
  constexpr int kSpare = 16;  // a part of the device that is worth no more splits
  const int enough = divide_up(units, 4);
  const int rows = std::max(1, seqs * kv_heads);
  int splits = std::max(1, divide_up(enough - enough / kSpare, rows));
  if (seqs > 1) splits = std::max(splits, divide_up(enough / 2 - enough / kSpare, kv_heads));
  const auto wasteful = [&] {
    const std::int64_t blocks = std::int64_t{rows} * splits;
    const std::int64_t last = blocks % units;
    return last > 0 && last < enough && kSpare * (enough - last) > blocks;
  };
  while (wasteful()) ++splits;
  return splits;
}

SplitPlan plan_splits(const AttentionShape& shape, int seqs, int max_kv_len, int units, int max_splits) {
  int wanted = wanted_splits(seqs, shape.kv_heads, units);
  // Twice the blocks draw two per cent more, for two microseconds at the start and the end.
  const std::int64_t twice = std::int64_t{2} * seqs * shape.kv_heads * wanted;
  if (max_kv_len > kLongSplitTokens * wanted && twice <= units / 2) wanted *= 2;
  wanted = std::clamp(wanted, 1, std::max(1, max_splits));
  const int pages = std::max(1, divide_up(max_kv_len, shape.page_tokens));
  const int min_pages = divide_up(kMinSplitTokens, shape.page_tokens);
  const int split_pages = std::max(min_pages, divide_up(pages, wanted));
  return SplitPlan{.splits = divide_up(pages, split_pages), .min_tokens = min_pages * shape.page_tokens};
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
