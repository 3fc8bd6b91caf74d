// The one formula: out = sum_i e^{s_i} v_i / sum_i e^{s_i}, s_i = scale * q . k_i, over all visible keys of a
// sequence. Flash style on both devices: a running maximum and sum, no score matrix in memory.
// Source: Dao et al., "FlashAttention", arXiv 2205.14135; split over keys: "Flash-Decoding", 2023.
#pragma once

#include <cstdint>

#include "engine/core/cost.h"
#include "engine/core/exec.h"
#include "engine/core/tensor.h"
#include "kvcache/batch.h"
#include "kvcache/layout.h"

namespace vesper {

// Query head h reads KV head h / (heads / kv_heads). `scale` is 1 / sqrt(head_dim) for Llama.
struct AttentionShape {
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int page_tokens = 16;
  float scale = 0.0F;
  [[nodiscard]] int group() const { return heads / kv_heads; }
};

// How decode attention is cut over keys: every sequence into `splits` runs of split_length() tokens, whole pages, of
// which a short sequence leaves the last ones empty. The plan depends on the batch size and a bound of the lengths
// only, a run's length on the sequence's own: so a captured step serves every length up to the bound and stays
// balanced, and a list of all pages, cut alike, gives the bits that dense gives.
struct SplitPlan {
  int splits = 1;
  int min_tokens = 0;  // of a split; a multiple of page_tokens
};

// Entries (tokens of a sequence, entries of a list) that each split of `count` takes: a multiple of `step`, at least
// `least`.
VESPER_HD constexpr int split_length(int count, int splits, int least, int step) {
  const int even = (count + splits * step - 1) / (splits * step) * step;
  return even > least ? even : least;
}

// Partial results of split decode attention, on the step's device.
struct SplitPartials {
  TensorView<float, 4> out;  // [seqs, heads, splits, head_dim] normalised within its split
  TensorView<float, 3> lse;  // [seqs, heads, splits] natural log of the split's sum of e^s; -inf where it is empty
  // Where attention over lists is to share its splits out among them (attention/attend_selected.h); CUDA only.
  TensorView<std::int32_t, 2> tickets = {};  // [seqs, kv_heads] counters, all zero before and after
  TensorView<std::int32_t, 2> parts = {};    // [seqs * kv_heads * splits, 4] which part of which list each is
};

// Splits that keep a device busy whatever the lengths are, were one sequence much longer than the others.
//   units: how many blocks the device runs at once. CUDA: a multiple of its multiprocessors; CPU: as many as there are
//   keys, so that lengths alone decide.
int wanted_splits(int seqs, int kv_heads, int units);

// The plan for a decode step of sequences of up to max_kv_len tokens: as many splits as keep the device busy, more
// where they are long, none shorter than a few pages, never more than `max_splits`. Pure arithmetic.
SplitPlan plan_splits(const AttentionShape& shape, int seqs, int max_kv_len, int units, int max_splits);
// What plan_splits() does not exceed for sequences of up to max_kv_len tokens, whatever their bound: for scratch.
int most_splits(const AttentionShape& shape, int seqs, int max_kv_len, int units);

// Causal attention of many query tokens: token t of sequence s, at positions(t), sees keys 0 ... positions(t).
//   q, out [tokens, heads * head_dim], dtype of the cache; accumulation in fp32
// CUDA: head_dim 64 or 128, group 1 to 16, page_tokens 16, 32 or 64; anything else is an input error that lists these.
void attend_prefill(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const TensorRef& out);

// Attention of one query token a sequence over all its kv_len keys, split over keys and merged; K and V are read once
// for the query heads of a group.
//   q, out [seqs, heads * head_dim], dtype of the cache
//   lse    [seqs, heads] natural log of sum e^s, written where its data is not null
//   longest  sequences of more tokens are left alone: others attend for them to a selection
// Same limits as attend_prefill.
void attend_decode(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                   const Batch& batch, const SplitPlan& plan, const SplitPartials& partials, const TensorRef& out,
                   TensorView<float, 2> lse, std::int32_t longest = INT32_MAX);

// Decode: K and V of all sequences' tokens, q and out.
Cost attend_decode_cost(const AttentionShape& shape, DType dtype, std::int64_t seqs, std::int64_t total_kv_len);
// Prefill of `query_tokens` at the end of a context of `kv_len`.
Cost attend_prefill_cost(const AttentionShape& shape, DType dtype, std::int64_t query_tokens, std::int64_t kv_len);

namespace cpu {
void attend_prefill(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                    TensorView<float, 2> out);
void attend_decode(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                   const SplitPlan& plan, const SplitPartials& partials, TensorView<float, 2> out,
                   TensorView<float, 2> lse, std::int32_t longest);
}  // namespace cpu
namespace cuda {
// Throws an input error that lists what the kernels take, where `shape` is not among it.
void check_attention_shape(const AttentionShape& shape);
void attend_prefill(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const TensorRef& out);
void attend_decode(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                   const Batch& batch, const SplitPlan& plan, const SplitPartials& partials, const TensorRef& out,
                   TensorView<float, 2> lse, std::int32_t longest);
}  // namespace cuda

}  // namespace vesper
