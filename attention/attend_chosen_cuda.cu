// Quest's layer in one launch: page bounds to scores, scores to lists, lists to attention. Or the first two of these.
//
//   scores[p] = reduce over the group's heads h of  max(q_h, 0) . high_p + min(q_h, 0) . low_p
//   list      = the forced pages and the best others, ascending;  out = attention over the list
//
// Shapes: q, out [seqs, heads, head_dim]; bounds [pages, kv_heads, 2, head_dim], exact or in 8 bits; K and V, lists,
//   partials as in attention/attend_selected_cuda.cu.
// Mapping: grid (kv_heads, blocks of a cluster, seqs), a cluster a list. Its blocks of four warps deal out the
//   sequence's pages in runs, score them, and keep the scores in shared memory. A warp takes tiles of 16 pages of its
//   block's run; their bounds come through its ring. What fits the rings is on its way before the kernel in front is
//   done: only the newest page's bounds are younger, and nobody looks at its score.
//   The choice: blocks tell each other the scores that may be on the list, and each finds the list for itself
//   (attention/finalists.cuh). Then all attend to their part of it as in attention/attend_decode.cuh. Meanwhile the
//   memory would be idle: each warp has the pages that score best in it brought into the second-level cache before it
//   is known that they are chosen.
//   In short runs, and where that finds no list (equal scores, or scores that first tiles did not let expect), the
//   cluster searches by messages (attention/cluster_choice.cuh), and a warp sends what it chooses to the block that
//   will attend to it.
// Scores have the bits of attention/score_pages_cuda.cu, lists those of attention/select_list.cuh, and outputs those of
//   attend_selected split into as many parts.
// Byte bound: bounds once, K and V of the listed pages once.
// Source: Tang et al., "Quest", arXiv 2406.10774, Algorithm 1; one launch by clusters is ours.
#include <algorithm>
#include <cassert>
#include <type_traits>

#include "attention/attend_chosen.h"
#include "attention/attend_decode.cuh"
#include "attention/cluster_choice.cuh"
#include "attention/finalists.cuh"
#include "attention/score_run.cuh"
#include "engine/core/bulk_copy.cuh"
#include "engine/core/dispatch.h"

namespace vesper::cuda {
namespace {

// This lane's entries of the page table for the first two rounds of list_pages, read before it is known whether they
// are needed.
struct EarlyPages {
  int now, next;
};
template <typename T>
__device__ int own_page(const ChosenArgs<T>& args, const WarpPages& own, int p) {
  return p < own.end ? args.decode.page_table(blockIdx.z, p) : 0;
}

// Lists this warp's pages of the choice, and where kAttends sends each to the block that attends to it.
template <bool kAttends, typename T, int kBlocks>
__device__ void list_pages(const ChosenArgs<T>& args, const WarpPages& own, const PageChoice& choice,
                           const ListEnd<kBlocks>& end, bool searched, int split_entries, EarlyPages early,
                           unsigned kept, unsigned kept_told) {
  const int g = static_cast<int>(blockIdx.x);
  const auto s = blockIdx.z;
  const bool all = choice.chosen >= choice.window_begin - choice.sink_end;
  int place;  // on the list, of this warp's next page
  int equal_before = 0;
  if (searched) {
    const auto sum_before = [&](const int(&of_section)[kLaneSections<kBlocks>]) {
      unsigned sum = 0;
#pragma unroll
      for (int i = 0; i < kLaneSections<kBlocks>; ++i) {
        if (i * kWarpPages + this_lane() < own.section) sum += static_cast<unsigned>(of_section[i]);
      }
      return static_cast<int>(__reduce_add_sync(kAllLanes, sum));
    };
    equal_before = sum_before(end.equal);
    place = sum_before(end.above) + min(own.first, choice.sink_end) + max(0, own.first - choice.window_begin);
  } else {
    place = all ? own.first : min(own.first, choice.sink_end) + max(0, own.first - choice.window_begin);
  }
  const auto ties = static_cast<int>(end.threshold.rest);
  std::int32_t* index = &args.pages.index(s, g, 0);
  for (int first = own.first; first < own.end; first += kWarpPages) {
    const int p = first + this_lane();
    const int page = early.now;
    if constexpr (kAttends) early = {early.next, own_page(args, own, p + 2 * kWarpPages)};
    const bool candidate = p >= own.first_candidate && p < own.end_candidate;
    const unsigned order = candidate && searched ? order_of(own.scores[p - own.block_begin]) : 0U;
    const bool is_taken = p < own.end && (candidate ? (searched ? order > end.threshold.order : all) : true);
    const bool is_equal = searched && candidate && order == end.threshold.order;
    const unsigned taken = __ballot_sync(kAllLanes, is_taken);
    const unsigned equal = __ballot_sync(kAllLanes, is_equal);
    const int ties_here = equal_before + __popc(before_this_lane(equal));
    if (is_taken || (is_equal && ties_here < ties)) {
      const int at = place + __popc(before_this_lane(taken)) + min(ties_here, ties);
      index[at] = p;
      if constexpr (kAttends) {
        const unsigned block = static_cast<unsigned>(at) / static_cast<unsigned>(split_entries);
        send(in_block(kept + 4 * (static_cast<unsigned>(at) - block * static_cast<unsigned>(split_entries)), block),
             static_cast<unsigned>(page), in_block(kept_told, block));
      }
    }
    place += __popc(taken);
    equal_before += __popc(equal);
  }
}

// As count_selected: of a list's pages only the newest may not be full. Other sequences add to the same totals.
__device__ void count_list(const KeptCounters& counters, int g, int count, int kv_len, int page_tokens) {
  if (counters.lists.data() == nullptr) return;
  const auto add = [](std::int64_t& total, int number) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&total), static_cast<unsigned long long>(number));
  };
  add(counters.kept_tokens(g), count * page_tokens - (page_tokens - 1 - (kv_len - 1) % page_tokens));
  add(counters.visible_tokens(g), kv_len);
  add(counters.lists(g), 1);
}

// Attends to entries [first_entry, last_entry) of the list, whose pages are `kept`; the list's last is the newest page.
// A warp has kAhead pieces on their way while it takes one.
template <typename T, int kHeadDim, int kTiles>
__device__ Running<kHeadDim, kTiles> attend_kept(const DecodeArgs<T>& args, unsigned char* shared,
                                                 const std::int32_t* kept, int first_entry, int last_entry, int count,
                                                 int kv_len) {
  constexpr int kRing = kSlots<kHeadDim>;
  constexpr int kAhead = kRing - 1;
  const int end = (last_entry - first_entry) << args.page_shift;
  const int line_mask = (1 << args.page_shift) - 1;
  const int newest = (count - 1 - first_entry) << args.page_shift;  // the newest page's first key
  const int newest_lines = kv_len - ((kv_len - 1) & ~line_mask);
  const int first = this_warp() * kPiece;
  const unsigned ring = shared_address(shared) + this_warp() * kRingBytes<kHeadDim>;
  int next_key = first;
  int next_slot = 0;
  // Gives the number of keys in the piece; none where the newest page ends before.
  const auto copy_next = [&] {
    int keys = 0;
    if (next_key < end) {
      keys = min(kPiece, next_key < newest ? kPiece : newest + newest_lines - next_key);
      const std::int64_t row =
          ((std::int64_t{kept[next_key >> args.page_shift]} * gridDim.x + blockIdx.x) << args.page_shift) +
          (next_key & line_mask);
      if (keys > 0) {
        copy_piece<T, kHeadDim>(ring + next_slot * kSlotBytes<kHeadDim>, args.k, args.v, row * kHeadDim, keys);
      }
    }
    commit_copies();
    next_key += kDecodeWarps * kPiece;
    next_slot = next_slot == kRing - 1 ? 0 : next_slot + 1;
    return keys;
  };
  int queued[kAhead];  // keys of the pieces on their way
#pragma unroll
  for (int i = 0; i < kAhead; ++i) queued[i] = copy_next();
  const auto q = load_queries<T, kHeadDim, kTiles>(args, part_of_grid(args));
  auto running = nothing_yet<kHeadDim, kTiles>();
  int slot = 0;
#pragma unroll 1
  for (int key = first; key < end; key += kDecodeWarps * kPiece) {
    wait_copies<kAhead - 1>();
    __syncwarp();  // the piece is there for all lanes, and all are done with the one whose slot is filled next
    const int keys = queued[0];
#pragma unroll
    for (int i = 0; i < kAhead - 1; ++i) queued[i] = queued[i + 1];
    queued[kAhead - 1] = copy_next();
    if (keys > 0) {
      const unsigned piece = ring + slot * kSlotBytes<kHeadDim>;
      auto scores = score_piece<T, kHeadDim, kTiles>(q, piece);
      if (keys < kPiece) hide_keys_from(keys, scores);
      take_piece<T, kHeadDim, kTiles>(running, scores, piece, args.scale_log2);
    }
    slot = slot == kRing - 1 ? 0 : slot + 1;
  }
  wait_copies<0>();
  __syncwarp();
  return running;
}

// Finds the list by messages and lists it; returns when this block has been told all pages that it attends to, if it
// does. `fetched`: likely pages are on their way.
template <bool kAttends, typename T, int kHeadDim, int kBlocks>
__device__ void search_list(const ChosenArgs<T>& args, Messages<kBlocks>& messages, const WarpPages& own,
                            const PageChoice& choice, const Scored& scored, bool fetched, int split_entries,
                            std::int32_t* kept) {
  EarlyPages early = {};
  if constexpr (kAttends) {
    early = {own_page(args, own, own.first + this_lane()), own_page(args, own, own.first + this_lane() + kWarpPages)};
  }
  const bool searches = choice.chosen > 0 && choice.chosen < choice.window_begin - choice.sink_end;
  ListEnd<kBlocks> list_end;
  if (searches) {
    list_end = find_list_end(messages, own, choice.chosen, scored.best, scored.worst, [&] {
      if (kAttends && !fetched) LikelyPages<T, kHeadDim>(args.decode, scored).fetch(args.decode);
    });
  }
  const unsigned kept_told = shared_address(&messages.here().kept_told);
  list_pages<kAttends>(args, own, choice, list_end, searches, split_entries, early, shared_address(kept), kept_told);
  if constexpr (kAttends) wait_phase(kept_told, 0);
}
// The same as code of its own, for where it is seldom needed.
template <typename T, int kHeadDim, int kBlocks>
__noinline__ __device__ void search_list_apart(const ChosenArgs<T>& args, Messages<kBlocks> messages, WarpPages own,
                                               PageChoice choice, Scored scored, bool fetched, int split_entries,
                                               std::int32_t* kept) {
  search_list<true, T, kHeadDim>(args, messages, own, choice, scored, fetched, split_entries, kept);
}

// Lists the pages from finalists, of which this block attends to entries [first_entry, last_entry); false where that
// takes a search.
template <typename T, int kHeadDim>
__device__ bool list_finalists(const ChosenArgs<T>& args, const Finalists& finalists, Meeting& meeting,
                               unsigned char* shared, const WarpPages& own, const PageChoice& choice,
                               const Scored& scored, int pages, int count, int first_entry, int last_entry,
                               std::int32_t* kept) {
  const DecodeArgs<T>& decode = args.decode;
  const LikelyPages<T, kHeadDim> likely(decode, scored);
  __syncthreads();  // the scores of all warps are there
  finalists.tell(meeting, own, reinterpret_cast<uint2*>(shared + this_warp() * kRingBytes<kHeadDim> + kStagedAt));
  likely.fetch(decode);
  const auto keep = [&](int at, int page, int entry) {
    if (at < first_entry || at >= last_entry) return;
    args.pages.index(blockIdx.z, static_cast<int>(blockIdx.x), at) = page;
    kept[at - first_entry] = entry;
  };
  const auto entry = [&](int page) { return decode.page_table(blockIdx.z, page); };
  if (!finalists.list(meeting, *reinterpret_cast<MarkedPages*>(shared), choice, entry,
                      [&](int place, int page, int own_entry) { keep(choice.sink_end + place, page, own_entry); })) {
    return false;
  }
  const int thread = static_cast<int>(threadIdx.x);
  for (int p = thread; p < choice.sink_end; p += static_cast<int>(kDecodeThreads)) keep(p, p, entry(p));
  for (int p = choice.window_begin + thread; p < pages; p += static_cast<int>(kDecodeThreads)) {
    keep(count - (pages - p), p, entry(p));
  }
  return true;
}

// What a launch does. Each is a kernel of its own, since a step fetches its code anew in every layer (docs/kernels.md,
// "Code").
enum class Form {
  kShort,   // runs too short for finalists
  kLong,    // blocks may find lists from finalists; also clusters of more than kMaxCluster blocks
  kChoose,  // as kShort, without attention
};

template <typename T, int kHeadDim, int kTiles, bool kInt8, Form kForm>
__global__ void __launch_bounds__(kDecodeThreads, 2) attend_chosen_pages(const __grid_constant__ ChosenArgs<T> args) {
  extern __shared__ __align__(256) unsigned char shared[];
  __shared__ Meeting meeting;
  __shared__ std::uint64_t told;  // parts
  constexpr bool kLong = kForm == Form::kLong;
  constexpr bool kAttends = kForm != Form::kChoose;
  const DecodeArgs<T>& decode = args.decode;
  const int g = static_cast<int>(blockIdx.x);
  const int rank = static_cast<int>(blockIdx.y);
  const auto s = blockIdx.z;
  const int kv_len = decode.kv_len(s);
  if (!decode.lengths.contains(kv_len)) return wait_for_previous();
  const int blocks = cluster_blocks();
  const int pages = (kv_len + (1 << decode.page_shift) - 1) >> decode.page_shift;
  const int run = split_length(pages, blocks, kTilePages, kTilePages);
  // What comes next has weights to fetch: at once where the rings hold all bounds, else behind the last of them.
  constexpr int kRingPages = BoundTile<T, kHeadDim, kInt8>::kSlots * kDecodeWarps * kTilePages;
  if (run <= kRingPages) let_next_start();
  const int begin = min(rank * run, pages);
  const int end = min(begin + run, pages);
  auto* scores = reinterpret_cast<float*>(shared + args.scores_at);
  const PageChoice choice = page_choice(args.budget, kv_len, 1 << decode.page_shift);
  const int between = choice.window_begin - choice.sink_end;
  const int count = pages - between + min(choice.chosen, between);  // of the list; known by lengths alone
  const int split_entries = split_length(count, blocks, args.min_entries, 1);
  const int first_entry = min(rank * split_entries, count);
  const int last_entry = min(first_entry + split_entries, count);
  Messages<kLong ? kListCluster : kMaxCluster> messages(meeting, *reinterpret_cast<LateMeeting*>(shared), blocks);
  auto finalists = [&] {
    if constexpr (kLong) {
      const FinalistPlan plan(choice, run, args.most_finalists, blocks, kTilePages);
      return Finalists(plan, reinterpret_cast<uint2*>(shared + args.finalists_at), args.most_finalists, blocks, rank);
    } else {
      return NoFinalists();
    }
  }();
  reinterpret_cast<uint2*>(meeting.bins)[threadIdx.x] = {};
  if (threadIdx.x == 0) {
    messages.begin(last_entry - first_entry);
    finalists.begin(meeting);
  }
  if constexpr (kAttends) expect_parts(decode, told);
  arrive_in_cluster();  // before any copy is on its way: it waits for all that this thread has in flight
  const Scored scored = score_run<T, kHeadDim, kTiles, kInt8>(args, shared_address(shared), begin, end, scores, choice,
                                                              messages, finalists);

  const int warp_run = split_length(run, kDecodeWarps, kWarpPages, kWarpPages);
  WarpPages own{.scores = scores, .block_begin = begin, .blocks = blocks, .section = rank * kDecodeWarps + this_warp()};
  own.first = min(begin + this_warp() * warp_run, end);
  own.end = min(own.first + warp_run, end);
  own.first_candidate = min(max(own.first, choice.sink_end), own.end);
  own.end_candidate = max(min(own.end, choice.window_begin), own.first_candidate);
  auto* kept = reinterpret_cast<std::int32_t*>(shared + args.kept_at);
  if constexpr (kLong) {
    const bool tries = finalists.is_used();
    if (!tries || !list_finalists<T, kHeadDim>(args, finalists, meeting, shared, own, choice, scored, pages, count,
                                               first_entry, last_entry, kept)) {
      search_list_apart<T, kHeadDim>(args, messages, own, choice, scored, tries, split_entries, kept);
    }
  } else {
    search_list<kAttends, T, kHeadDim>(args, messages, own, choice, scored, false, split_entries, kept);
  }
  if (rank == 0 && threadIdx.x == 0) {
    args.pages.count(s, g) = count;
    args.pages.tail_begin(s, g) = count;
    count_list(args.counters, g, count, kv_len, 1 << decode.page_shift);
  }
  if constexpr (!kAttends) return;
  __syncthreads();  // all warps are done with what lies over the rings
  const auto running = attend_kept<T, kHeadDim, kTiles>(decode, shared, kept, first_entry, last_entry, count, kv_len);
  finish_split<T, kHeadDim, kTiles>(decode, part_of_grid(decode), running, reinterpret_cast<float*>(shared), told);
}

int block_pages_of(int pages, int cluster) {
  return split_length(pages, cluster, kTilePages, kTilePages);
}

template <typename T, int kHeadDim, bool kInt8, Form kForm>
void launch_chosen(const Exec& exec, const AttentionShape& shape, const ChosenArgs<T>& args, int bytes, int seqs) {
  const auto cluster = static_cast<unsigned>(args.decode.splits);
  launch(kForm == Form::kChoose ? "choose_pages" : "attend_chosen_pages",
         shape.group() <= kTileHeads ? attend_chosen_pages<T, kHeadDim, 1, kInt8, kForm>
                                     : attend_chosen_pages<T, kHeadDim, 2, kInt8, kForm>,
         {.grid = dim3(static_cast<unsigned>(shape.kv_heads), cluster, static_cast<unsigned>(seqs)),
          .block = dim3(kDecodeThreads),
          .shared_bytes = static_cast<std::size_t>(bytes),
          .overlap = true,
          .cluster = dim3(1, cluster)},
         exec.stream, args);
}

// Clusters of kListCluster blocks that the device runs side by side: a multiprocessor may be needed for each block of
// one, and a device may not have as many together.
int wide_clusters() {
  static const int clusters = resident_clusters(attend_chosen_pages<bf16, 128, 2, true, Form::kLong>,
                                                {.grid = dim3(1, kListCluster),
                                                 .block = dim3(kDecodeThreads),
                                                 .shared_bytes = static_cast<std::size_t>(ChosenLayout::room()),
                                                 .cluster = dim3(1, kListCluster)});
  return clusters;
}

template <Form kForm, typename T>
void launch_form(const Exec& exec, const AttentionShape& shape, PageScore page_score, const ChosenArgs<T>& args,
                 int bytes, int seqs) {
  const auto launch_one = [&](auto int8) {
    constexpr bool kInt8 = decltype(int8)::value;
    shape.head_dim == 128 ? launch_chosen<T, 128, kInt8, kForm>(exec, shape, args, bytes, seqs)
                          : launch_chosen<T, 64, kInt8, kForm>(exec, shape, args, bytes, seqs);
  };
  page_score == PageScore::kMinMaxInt8 ? launch_one(std::true_type()) : launch_one(std::false_type());
}

// The largest cluster of at most `most` blocks, a power of two, of which each of `lists` gets one side by side and that
// is not `too_wide`; two blocks may share a multiprocessor where that leaves two. 1 where there are more lists, or
// where a block's pages do not find room.
//   pages  most of a sequence;  entries  most of a list that are attended to
template <typename TooWide>
int cluster_of_list(const AttentionShape& shape, std::int64_t lists, int pages, int entries, int most,
                    const TooWide& too_wide) {
  if (!has_clusters()) return 1;
  int cluster = most;
  while (cluster > 2 && (cluster * lists > multiprocessor_count() || too_wide(cluster))) cluster /= 2;
  if (cluster * lists > 2 * multiprocessor_count()) return 1;
  const ChosenLayout layout(shape.head_dim, shape.group(), cluster, block_pages_of(pages, cluster),
                            split_length(entries, cluster, 1, 1));
  return layout.bytes <= ChosenLayout::room() ? cluster : 1;
}

// What a choice needs. `layout`: of clusters of `cluster` blocks.
template <typename T>
ChosenArgs<T> choice_args(const DecodeArgs<T>& decode, const LayerKv& kv, PageScore page_score, GroupScore group_score,
                          const PageBudget& budget, const Selection& pages, const ChosenLayout& layout) {
  return {.decode = decode,
          .bounds = page_bounds<T>(kv, page_score),
          .budget = budget,
          .pages = pages,
          .counters = {},
          .group_score = group_score,
          .min_entries = 1,
          .scores_at = layout.scores_at,
          .kept_at = layout.kept_at,
          .finalists_at = layout.finalists_at,
          .most_finalists = layout.most_finalists};
}

}  // namespace

int chosen_cluster(const AttentionShape& shape, int seqs, int pages, int entries) {
  const std::int64_t lists = std::int64_t{shape.kv_heads} * seqs;
  // Blocks of few pages would have more to tell than to score.
  return cluster_of_list(shape, lists, pages, entries, kListCluster, [&](int cluster) {
    return cluster > kMaxCluster &&
           (!FinalistPlan::can_be_used(block_pages_of(pages, cluster), cluster) || wide_clusters() < lists);
  });
}

int choosing_cluster(const AttentionShape& shape, int seqs, int pages) {
  return cluster_of_list(shape, std::int64_t{shape.kv_heads} * seqs, pages, 0, kMaxCluster,
                         [](int /*cluster*/) { return false; });
}

void choose_in_clusters(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                        const Batch& batch, PageScore page_score, GroupScore group_score, const PageBudget& budget,
                        DenseLimit dense, int cluster, const Selection& pages) {
  check_attention_shape(shape);
  assert(cluster > 1 && cluster <= kMaxCluster);
  assert(page_score != PageScore::kMeanStd);
  if (batch.seqs == 0) return;
  const int most_pages = page_count(batch.max_kv_len, shape.page_tokens);
  const ChosenLayout layout(shape.head_dim, shape.group(), cluster, block_pages_of(most_pages, cluster), 0);
  const TensorRef nowhere = tensor_ref(nullptr, kv.k.dtype, q.shape[0], q.shape[1]);
  dispatch_16bit(kv.k.dtype, "choosing pages on CUDA", [&](auto element) {
    using T = decltype(element);
    const auto decode =
        decode_args<T>(shape, q, kv, batch, LengthRange{.above = dense.tokens}, cluster, {}, nowhere, {});
    launch_form<Form::kChoose>(exec, shape, page_score,
                               choice_args<T>(decode, kv, page_score, group_score, budget, pages, layout), layout.bytes,
                               batch.seqs);
  });
}

void attend_chosen(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                   const Batch& batch, PageScore page_score, GroupScore group_score, const PageBudget& budget,
                   DenseLimit dense, int cluster, int min_entries, const Selection& pages, const TensorRef& out,
                   TensorView<float, 2> lse, const KeptCounters& counters) {
  check_attention_shape(shape);
  assert(cluster > 1 && cluster <= kListCluster && min_entries > 0);
  assert(page_score != PageScore::kMeanStd);
  if (batch.seqs == 0) return;
  const int entries = static_cast<int>(pages.index.shape(2));
  const int most_pages = page_count(batch.max_kv_len, shape.page_tokens);
  const ChosenLayout layout(shape.head_dim, shape.group(), cluster, block_pages_of(most_pages, cluster),
                            split_length(entries, cluster, min_entries, 1));
  dispatch_16bit(kv.k.dtype, "attending to chosen pages on CUDA", [&](auto element) {
    using T = decltype(element);
    const auto decode = decode_args<T>(shape, q, kv, batch, LengthRange{.above = dense.tokens}, cluster, {}, out, lse);
    ChosenArgs<T> args = choice_args<T>(decode, kv, page_score, group_score, budget, pages, layout);
    args.counters = counters;
    args.min_entries = min_entries;
    layout.is_long ? launch_form<Form::kLong>(exec, shape, page_score, args, layout.bytes, batch.seqs)
                   : launch_form<Form::kShort>(exec, shape, page_score, args, layout.bytes, batch.seqs);
  });
}

}  // namespace vesper::cuda
