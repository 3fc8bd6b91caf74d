// Attention of one query token a sequence over the keys of a selection, split over the lists.
//
//   out[s, h] = sum_i e^{s_i} v_i / sum_i e^{s_i},  i over the list of (s, h / group),
//   s_i = scale * q[s, h] . k_i, and + tail_log_weight[s, h / group] where i is an entry of the tail
//
// Shapes: q, out [seqs, heads, head_dim]; K and V [pages, kv_heads, page_tokens, head_dim] in tile order
//   (kvcache/layout.h); lists [seqs, kv_heads, capacity] as in attention/selection.h; partials as in dense decode.
// Mapping: grid (kv_heads, splits, seqs), the splits covering the capacity; within a block as in
//   attention/attend_decode.cuh. A split behind a list's end leaves at once with lse = -inf. Of a list of pages a piece
//   is 16 lines of one page, copied as they lie; of a list of tokens it is 16 rows gathered from anywhere. Pieces,
//   warps and order are those of dense decode attention: a list of everything, split alike, gives its bits.
// Where there are tickets as many blocks, in one row, share the lists out by their counts, which takes a launch of one
//   block before, and merge them in the same launch (attention/shared_lists.cuh).
// Byte bound: K and V of the listed tokens once, attend_decode_cost() of their number, and 4 bytes an entry.
#include "attention/attend_decode.cuh"
#include "attention/attend_decode.h"
#include "attention/attend_selected.h"
#include "attention/gather_piece.cuh"
#include "attention/shared_lists.cuh"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {
namespace {

template <typename T>
struct SelectedArgs {
  DecodeArgs<T> decode;
  TensorView<const std::int32_t, 3> index;
  TensorView<const std::int32_t, 2> count;
  TensorView<const std::int32_t, 2> tail_begin;
  TensorView<const float, 2> tail_log_weight;
  int min_entries = 0;
  SharedLists shared;          // where the lists are shared out
  float inverse_scale = 0.0F;  // turns log-weights into scores before their scale
};

// Adds the tail's weight to the keys from `begin` on, which may be negative.
template <int kTiles>
__device__ void weigh_keys_from(int begin, float weight, Scores<kTiles>& scores) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (key_of_score(i) >= begin) scores.d[tile][i] += weight;
    }
  }
}

// Keys are counted along the list: those of entry e of a list of pages are e * page_tokens ..., whether all are visible
// or not.
template <typename T, int kHeadDim, int kTiles, SelectionUnit kUnit, bool kShared>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attend_selected_split_list(const __grid_constant__ SelectedArgs<T> selected) {
  extern __shared__ __align__(256) unsigned char shared[];  // one ring a warp
  __shared__ std::uint64_t told;
  constexpr bool kOfPages = kUnit == SelectionUnit::kPages;
  const DecodeArgs<T>& args = selected.decode;
  wait_for_previous();
  BlockPart part = part_of_grid(args);
  if constexpr (kShared) {
    part = planned_part(selected.shared, args.group);
    if (part.splits == 0) return;
  }
  const int s = part.s;
  const int kv_head = part.kv_head;
  const auto kv_heads = static_cast<unsigned>(selected.count.shape(1));
  const int kv_len = args.kv_len(s);
  if (!args.lengths.contains(kv_len)) return;
  const bool alone = cluster_blocks() == 1;
  if (!alone) {
    expect_parts(args, told);
    arrive_in_cluster();
  }
  const int entries = selected.count(s, kv_head);
  int first_entry;
  int last_entry;
  if constexpr (kShared) {
    const auto border = [&](int split) { return static_cast<int>(std::int64_t{entries} * split / part.splits); };
    first_entry = border(part.split);
    last_entry = border(part.split + 1);
  } else {
    const int split_entries = split_length(entries, args.splits, selected.min_entries, 1);
    first_entry = part.split * split_entries;
    last_entry = min(first_entry + split_entries, entries);
    if (first_entry >= last_entry && args.splits > 1 && alone) return leave_empty(args);
  }
  const int entry_shift = kOfPages ? args.page_shift : 0;
  const int line_mask = (1 << args.page_shift) - 1;
  const int end = last_entry << entry_shift;
  const int first = (first_entry << entry_shift) + this_warp() * kPiece;
  const int tail = selected.tail_begin(s, kv_head);
  const float tail_weight = tail < entries ? selected.tail_log_weight(s, kv_head) * selected.inverse_scale : 0.0F;
  const int tail_begin = tail << entry_shift;

  // A piece's page is read one piece ahead of its copy, and its entries two. Of a list of tokens lanes i and i + 16
  // look after row i of a piece, past the end after the last; of a list of pages all lanes after row 0.
  const int own_row = kOfPages ? 0 : this_lane() % kPiece;
  const unsigned ring = shared_address(shared) + this_warp() * kRingBytes<kHeadDim>;
  const auto entry_of = [&](int key) {
    return key < end ? selected.index(s, kv_head, min(key + own_row, end - 1) >> entry_shift) : 0;
  };
  const auto token_of = [&](int entry, int key) {
    return kOfPages ? (entry << args.page_shift) + (key & line_mask) : entry;
  };
  const auto page_of = [&](int token) { return args.page_table(s, token >> args.page_shift); };
  int next_key = first;
  int next_token = token_of(entry_of(first), first);
  int next_page = next_key < end ? page_of(next_token) : 0;
  int entry_after = entry_of(first + kDecodeWarps * kPiece);
  int next_slot = 0;
  // Gives the number of keys in the piece; none where a page of more than one piece ends before.
  const auto copy_next = [&] {
    const int keys = next_key < end ? min(kPiece, (kOfPages ? kv_len - next_token : end - next_key)) : 0;
    if (keys > 0) {
      const std::int64_t row =
          ((std::int64_t{next_page} * kv_heads + kv_head) << args.page_shift) + (next_token & line_mask);
      const unsigned slot = ring + next_slot * kSlotBytes<kHeadDim>;
      if constexpr (kOfPages) {
        copy_piece<T, kHeadDim>(slot, args.k, args.v, row * kHeadDim, keys);
      } else {
        gather_piece<T, kHeadDim>(slot, args.k, args.v, row, keys);
      }
    }
    commit_copies();
    next_key += kDecodeWarps * kPiece;
    next_token = token_of(entry_after, next_key);
    next_page = next_key < end ? page_of(next_token) : 0;
    entry_after = entry_of(next_key + kDecodeWarps * kPiece);
    next_slot = next_slot == kSlots<kHeadDim> - 1 ? 0 : next_slot + 1;
    return keys;
  };
  int queued[kSlots<kHeadDim> - 1];  // keys of the pieces on their way
#pragma unroll
  for (int i = 0; i < kSlots<kHeadDim> - 1; ++i) queued[i] = copy_next();

  const auto q = load_queries<T, kHeadDim, kTiles>(args, part);
  if (!alone) wait_for_cluster();  // all have begun
  auto running = nothing_yet<kHeadDim, kTiles>();
  int slot = 0;
  for (int key = first; key < end; key += kDecodeWarps * kPiece) {
    wait_copies<kSlots<kHeadDim> - 2>();
    __syncwarp();  // the piece is there for all lanes, and all are done with the one whose slot is filled next
    const int keys = queued[0];
#pragma unroll
    for (int i = 0; i < kSlots<kHeadDim> - 2; ++i) queued[i] = queued[i + 1];
    queued[kSlots<kHeadDim> - 2] = copy_next();
    if (next_key >= end) let_next_start();
    if (keys > 0) {
      const unsigned piece = ring + slot * kSlotBytes<kHeadDim>;
      auto scores = score_piece<T, kHeadDim, kTiles>(q, piece);
      if (tail_begin - key < kPiece) weigh_keys_from(tail_begin - key, tail_weight, scores);
      if (keys < kPiece) hide_keys_from(keys, scores);
      take_piece<T, kHeadDim, kTiles>(running, scores, piece, args.scale_log2);
    }
    slot = slot == kSlots<kHeadDim> - 1 ? 0 : slot + 1;
  }
  let_next_start();  // also where there was nothing to ask for
  wait_copies<0>();
  __syncwarp();
  finish_split<T, kHeadDim, kTiles>(args, part, running, reinterpret_cast<float*>(shared), told);
  if constexpr (kShared) {
    if (part.splits > 1) merge_if_last<T, kHeadDim>(args, selected.shared, part, shared);
  }
}

template <typename T, int kHeadDim, SelectionUnit kUnit, bool kShared>
void launch_selected(const Exec& exec, const AttentionShape& shape, const SelectedArgs<T>& args, const Dims& dims) {
  launch(kShared ? "attend_selected_shared_lists" : "attend_selected_split_list",
         shape.group() <= kTileHeads ? attend_selected_split_list<T, kHeadDim, 1, kUnit, kShared>
                                     : attend_selected_split_list<T, kHeadDim, 2, kUnit, kShared>,
         dims, exec.stream, args);
}

template <typename T, int kHeadDim, SelectionUnit kUnit>
void launch_selected(const Exec& exec, const AttentionShape& shape, const SelectedArgs<T>& args, int seqs) {
  if (args.shared.spare == 0) {
    return launch_selected<T, kHeadDim, kUnit, false>(exec, shape, args,
                                                      decode_dims<kHeadDim>(shape, args.decode.splits, seqs));
  }
  launch("plan_parts", plan_parts, {.grid = dim3(1), .block = dim3(kPlanThreads), .overlap = true}, exec.stream,
         args.shared);
  launch_selected<T, kHeadDim, kUnit, true>(
      exec, shape, args,
      {.grid = dim3(static_cast<unsigned>(args.shared.blocks)),
       .block = dim3(kDecodeThreads),
       .shared_bytes = static_cast<std::size_t>(kDecodeWarps * kRingBytes<kHeadDim>),
       .overlap = true});
}

struct CountArgs {
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 2> count;
  TensorView<const std::int32_t, 2> tail_begin;
  KeptCounters counters;
  LengthRange lengths;
  int seqs = 0;
  int page_tokens = 0;  // of an entry's page; 0 where entries are tokens
};

__device__ std::int64_t warp_sum(std::int64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Grid (kv_heads), one warp a block, its lanes over the sequences: no two blocks add to one total.
__global__ void __launch_bounds__(kWarpThreads) count_lists(const __grid_constant__ CountArgs args) {
  let_next_start();
  wait_for_previous();
  const auto g = blockIdx.x;
  std::int64_t kept = 0;
  std::int64_t visible = 0;
  std::int64_t sampled = 0;
  std::int64_t lists = 0;
  std::int64_t hits = 0;
  const bool guarded = args.counters.list_guard_hits.data() != nullptr;
  for (int s = this_lane(); s < args.seqs; s += static_cast<int>(kWarpThreads)) {
    const int kv_len = args.kv_len(s);
    if (!args.lengths.contains(kv_len)) continue;
    const std::int64_t count = args.count(s, g);
    if (args.page_tokens > 0) {
      // The newest page is on every list of pages, and the only one that may not be full.
      kept += count * args.page_tokens - (args.page_tokens - kv_len % args.page_tokens) % args.page_tokens;
    } else {
      kept += count;
    }
    visible += kv_len;
    sampled += count - args.tail_begin(s, g);
    lists += 1;
    if (guarded) hits += args.counters.list_guard_hits(s, g);
  }
  kept = warp_sum(kept);
  visible = warp_sum(visible);
  sampled = warp_sum(sampled);
  lists = warp_sum(lists);
  hits = warp_sum(hits);
  if (this_lane() != 0) return;
  args.counters.kept_tokens(g) += kept;
  args.counters.visible_tokens(g) += visible;
  args.counters.sampled_tokens(g) += sampled;
  args.counters.lists(g) += lists;
  if (guarded) args.counters.guard_hits(g) += hits;
}

}  // namespace

void attend_selected(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                     const Batch& batch, const Selection& list, int min_entries, DenseLimit dense,
                     const SplitPartials& partials, const TensorRef& out, TensorView<float, 2> lse) {
  check_attention_shape(shape);
  const auto splits = static_cast<int>(partials.lse.shape(2));
  assert(min_entries > 0);
  if (batch.seqs == 0) return;
  const LengthRange lengths{.above = dense.tokens};
  const bool pages = list.unit == SelectionUnit::kPages;
  const std::int64_t lists = list.count.size();
  const bool shared = partials.tickets.data() != nullptr && splits > 1;
  // Entries of all lists are counted in 32 bits.
  assert(!shared || (lists <= kMostSharedLists && lists * list.index.shape(2) <= INT64_C(0xFFFFFFFF)));
  assert(!shared || partials.parts.shape(0) >= lists * splits);
  const std::int64_t wanted = std::max<std::int64_t>(lists, multiprocessor_count());
  dispatch_16bit(kv.k.dtype, "attending to a selection on CUDA", [&](auto element) {
    using T = decltype(element);
    const SelectedArgs<T> args{
        .decode = decode_args<T>(shape, q, kv, batch, lengths, splits, partials, out, lse),
        .index = list.index,
        .count = list.count,
        .tail_begin = list.tail_begin,
        .tail_log_weight = list.tail_log_weight,
        .min_entries = min_entries,
        .shared = {.count = list.count,
                   .kv_len = batch.kv_len,
                   .tickets = partials.tickets,
                   .parts = reinterpret_cast<int4*>(partials.parts.data()),
                   .lengths = lengths,
                   .blocks = static_cast<int>(lists * splits),
                   .spare = shared ? static_cast<int>(std::min(wanted, lists * (splits - 1))) : 0,
                   .min_entries = min_entries},
        .inverse_scale = 1.0F / shape.scale};
    constexpr auto kPages = SelectionUnit::kPages;
    constexpr auto kTokens = SelectionUnit::kTokens;
    if (shape.head_dim == 128) {
      pages ? launch_selected<T, 128, kPages>(exec, shape, args, batch.seqs)
            : launch_selected<T, 128, kTokens>(exec, shape, args, batch.seqs);
    } else {
      pages ? launch_selected<T, 64, kPages>(exec, shape, args, batch.seqs)
            : launch_selected<T, 64, kTokens>(exec, shape, args, batch.seqs);
    }
  });
  if (!shared && splits > cluster_of(shape, splits, batch.seqs))
    merge_splits(exec, shape, batch, lengths, partials, out, lse);
}

void count_selected(const Exec& exec, const AttentionShape& shape, const Batch& batch, const Selection& list,
                    DenseLimit dense, const KeptCounters& counters) {
  if (batch.seqs == 0) return;
  const CountArgs args{.kv_len = batch.kv_len,
                       .count = list.count,
                       .tail_begin = list.tail_begin,
                       .counters = counters,
                       .lengths = {.above = dense.tokens},
                       .seqs = batch.seqs,
                       .page_tokens = list.unit == SelectionUnit::kPages ? shape.page_tokens : 0};
  launch("count_lists", count_lists,
         {.grid = dim3(static_cast<unsigned>(shape.kv_heads)), .block = dim3(kWarpThreads), .overlap = true},
         exec.stream, args);
}

}  // namespace vesper::cuda
