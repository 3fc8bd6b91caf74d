// Attention to a selection on the CPU; see attention/attend_selected.h. A piece of work is one sequence, KV head and
// split of its list; the inner loops are dense decode attention's (attend_decode_lanes.cpp), over the rows of a list
// instead of whole pages: a list of everything, split alike, gives dense attention's bits.
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention/attend_decode.h"
#include "attention/attend_lanes.h"
#include "attention/attend_selected.h"
#include "attention/kv_tiles.h"
#include "engine/core/lanes.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {
namespace {

// Where the keys of some entries lie; reused from one piece of work to the next.
class ListedKeys {
 public:
  // The visible keys of entries [begin, end) of the list of sequence s and KV head g. `offsets` must outlive them.
  void take(const AttentionShape& shape, const LayerKv& kv, const Batch& batch, const Selection& list, int s, int g,
            int begin, int end, const std::vector<std::int32_t>& offsets) {
    const auto k = kv.k.as<const float, 4>();
    const auto v = kv.v.as<const float, 4>();
    const int chunks = (shape.head_dim + 7) / 8;
    const int entry_tokens = list.unit == SelectionUnit::kPages ? shape.page_tokens : 1;
    k_.clear();
    v_.clear();
    chunk_.clear();
    static_keys_ = 0;
    for (int i = begin; i < end; ++i) {
      const int first = list.index(s, g, i) * entry_tokens;
      const int last = std::min(first + entry_tokens, batch.kv_len(s));
      for (int t = first; t < last; ++t) {
        const std::int32_t page = batch.page_table(s, t / shape.page_tokens);
        k_.push_back(&k(page, g, 0, 0));
        v_.push_back(&v(page, g, 0, 0));
        chunk_.push_back(offsets.data() + std::int64_t{t % shape.page_tokens} * chunks);
      }
      if (i < list.tail_begin(s, g)) static_keys_ = keys();
    }
  }
  [[nodiscard]] KeyList view() const { return {k_.data(), v_.data(), chunk_.data()}; }
  [[nodiscard]] int keys() const { return static_cast<int>(k_.size()); }
  [[nodiscard]] int static_keys() const { return static_keys_; }  // they come before the tail's

 private:
  std::vector<const float*> k_;
  std::vector<const float*> v_;
  std::vector<const std::int32_t*> chunk_;
  int static_keys_ = 0;
};

}  // namespace

void attend_selected(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                     const Selection& list, int min_entries, DenseLimit dense, const SplitPartials& partials,
                     TensorView<float, 2> out, TensorView<float, 2> lse) {
  const LengthRange lengths{.above = dense.tokens};
  const int group = shape.group();
  const std::int64_t splits = partials.lse.shape(2);
  assert(min_entries > 0);
  const std::vector<std::int32_t> offsets = chunk_offsets(shape);

  parallel_for(std::int64_t{batch.seqs} * shape.kv_heads * splits, 1, [&](std::int64_t begin, std::int64_t end) {
    const bool wide = has_avx2();
    ListedKeys keys;
    LaneScratch scratch((wide ? avx2::decode_scratch : baseline::decode_scratch)(group, shape.head_dim));
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t split = i % splits;
      const auto g = static_cast<int>(i / splits % shape.kv_heads);
      const auto s = static_cast<int>(i / splits / shape.kv_heads);
      if (!lengths.contains(batch.kv_len(s))) continue;
      const int split_entries = split_length(list.count(s, g), static_cast<int>(splits), min_entries, 1);
      const std::int64_t entry_begin = split * split_entries;
      const std::int64_t entry_end = std::min<std::int64_t>(list.count(s, g), entry_begin + split_entries);
      if (entry_begin >= entry_end) {
        for (int h = g * group; h < (g + 1) * group; ++h) partials.lse(s, h, split) = -INFINITY;
        continue;
      }
      keys.take(shape, kv, batch, list, s, g, static_cast<int>(entry_begin), static_cast<int>(entry_end), offsets);
      const bool has_tail = keys.static_keys() < keys.keys();
      const DecodeSplit piece{.kv = {.chunk = offsets.data(),
                                     .page_tokens = shape.page_tokens,
                                     .head_dim = shape.head_dim,
                                     .chunks = (shape.head_dim + 7) / 8},
                              .list = keys.view(),
                              .q = &q(s, std::int64_t{g} * group * shape.head_dim),
                              .group = group,
                              .key_begin = 0,
                              .key_end = keys.keys(),
                              .tail_begin = keys.static_keys(),
                              .tail_log_weight = has_tail ? list.tail_log_weight(s, g) : 0.0F,
                              .scale = shape.scale,
                              .out = &partials.out(s, g * group, split, 0),
                              .out_stride = splits * shape.head_dim,
                              .lse = &partials.lse(s, g * group, split),
                              .lse_stride = splits,
                              .scratch = scratch.data()};
      wide ? avx2::attend(piece) : baseline::attend(piece);
    }
  });

  merge_splits(shape, batch, lengths, partials, out, lse);
}

void count_selected(const AttentionShape& shape, const Batch& batch, const Selection& list, DenseLimit dense,
                    const KeptCounters& counters) {
  const LengthRange lengths{.above = dense.tokens};
  for (int s = 0; s < batch.seqs; ++s) {
    const std::int64_t kv_len = batch.kv_len(s);
    if (!lengths.contains(batch.kv_len(s))) continue;
    for (int g = 0; g < shape.kv_heads; ++g) {
      const std::int64_t count = list.count(s, g);
      const std::int64_t page_tokens = shape.page_tokens;
      // The newest page is on every list of pages, and the only one that may not be full.
      const std::int64_t missing = (page_tokens - kv_len % page_tokens) % page_tokens;
      counters.kept_tokens(g) += list.unit == SelectionUnit::kPages ? count * page_tokens - missing : count;
      counters.visible_tokens(g) += kv_len;
      counters.sampled_tokens(g) += count - list.tail_begin(s, g);
      counters.lists(g) += 1;
      if (counters.list_guard_hits.data() != nullptr) counters.guard_hits(g) += counters.list_guard_hits(s, g);
    }
  }
}

}  // namespace vesper::cpu
