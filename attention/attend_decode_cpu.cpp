// Decode attention on the CPU, split over keys and merged; see attention/attend.h. A piece of work is one sequence, KV
// head and split; the inner loops are in attend_decode_lanes.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention/attend.h"
#include "attention/attend_decode.h"
#include "attention/attend_lanes.h"
#include "attention/kv_tiles.h"
#include "engine/core/lanes.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {
namespace {

// One sequence and head.
void merge_splits(const SplitPartials& partials, int s, int h, float* out, float* lse) {
  const auto splits = static_cast<int>(partials.out.shape(2));
  const auto head_dim = static_cast<int>(partials.out.shape(3));
  float largest = -INFINITY;
  for (int split = 0; split < splits; ++split) largest = std::max(largest, partials.lse(s, h, split));
  float total = 0.0F;
  for (int d = 0; d < head_dim; ++d) out[d] = 0.0F;
  for (int split = 0; split < splits; ++split) {
    const float weight = baseline::exponential(baseline::splat(partials.lse(s, h, split) - largest))[0];
    if (weight == 0.0F) continue;
    total += weight;
    for (int d = 0; d < head_dim; ++d) out[d] += weight * partials.out(s, h, split, d);
  }
  for (int d = 0; d < head_dim; ++d) out[d] /= total;
  if (lse != nullptr) *lse = largest + std::log(total);
}

}  // namespace

void merge_splits(const AttentionShape& shape, const Batch& batch, LengthRange lengths, const SplitPartials& partials,
                  TensorView<float, 2> out, TensorView<float, 2> lse) {
  for (int s = 0; s < batch.seqs; ++s) {
    if (!lengths.contains(batch.kv_len(s))) continue;
    for (int h = 0; h < shape.heads; ++h) {
      merge_splits(partials, s, h, &out(s, h * shape.head_dim), lse.data() == nullptr ? nullptr : &lse(s, h));
    }
  }
}

void attend_decode(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                   const SplitPlan& plan, const SplitPartials& partials, TensorView<float, 2> out,
                   TensorView<float, 2> lse, std::int32_t longest) {
  const LengthRange lengths{.longest = longest};
  const int group = shape.group();
  const int head_dim = shape.head_dim;
  const std::vector<std::int32_t> offsets = chunk_offsets(shape);
  const std::int64_t work = std::int64_t{batch.seqs} * shape.kv_heads * plan.splits;

  parallel_for(work, 1, [&](std::int64_t begin, std::int64_t end) {
    const bool wide = has_avx2();
    TileList pages;
    LaneScratch scratch((wide ? avx2::decode_scratch : baseline::decode_scratch)(group, head_dim));
    for (std::int64_t i = begin; i < end; ++i) {
      const auto split = static_cast<int>(i % plan.splits);
      const auto g = static_cast<int>(i / plan.splits % shape.kv_heads);
      const auto s = static_cast<int>(i / plan.splits / shape.kv_heads);
      if (!lengths.contains(batch.kv_len(s))) continue;
      const int split_tokens = split_length(batch.kv_len(s), plan.splits, plan.min_tokens, shape.page_tokens);
      const int key_begin = split * split_tokens;
      const int key_end = std::min(batch.kv_len(s), key_begin + split_tokens);
      if (key_begin >= key_end) {
        for (int h = g * group; h < (g + 1) * group; ++h) partials.lse(s, h, split) = -INFINITY;
        continue;
      }
      const DecodeSplit piece{.kv = pages.list(shape, kv, batch, s, g, key_end, offsets),
                              .q = &q(s, std::int64_t{g} * group * head_dim),
                              .group = group,
                              .key_begin = key_begin,
                              .key_end = key_end,
                              .scale = shape.scale,
                              .out = &partials.out(s, g * group, split, 0),
                              .out_stride = std::int64_t{plan.splits} * head_dim,
                              .lse = &partials.lse(s, g * group, split),
                              .lse_stride = plan.splits,
                              .scratch = scratch.data()};
      wide ? avx2::attend(piece) : baseline::attend(piece);
    }
  });

  merge_splits(shape, batch, lengths, partials, out, lse);
}

}  // namespace vesper::cpu
