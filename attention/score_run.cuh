// A block of the cluster that serves a list scores its run of the sequence's pages into shared memory, and says which
// of them are likely to be chosen. What it is for stands in attention/attend_chosen_cuda.cu.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/finalists.cuh"
#include "attention/page_scores.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {

// Of shared memory: the rings, over which lie messages while pages are chosen; what a cluster sends to a block when
// parts are merged; a block's scores; the pages that it attends to; finalists, as far as there is room where two blocks
// share a multiprocessor.
struct ChosenLayout {
  bool is_long;  // the kernel for it: finalists only there
  int scores_at, kept_at, finalists_at, most_finalists, bytes;
  // Of clusters for groups of `group` heads, blocks that score up to `block_pages` and attend to up to `kept`.
  ChosenLayout(int head_dim, int group, int cluster, int block_pages, int kept)
      : is_long(FinalistPlan::can_be_used(block_pages, cluster) || cluster > kMaxCluster),
        scores_at(kDecodeWarps * ring_bytes(head_dim) + received_bytes(head_dim, group, cluster)),
        kept_at(scores_at + 4 * block_pages),
        finalists_at((kept_at + 4 * kept + 15) / 16 * 16),
        most_finalists(FinalistPlan::can_be_used(block_pages, cluster)
                           ? std::clamp((room() - finalists_at) / finalist_bytes(cluster), 0, kMostFinalists / cluster)
                           : 0),
        bytes(finalists_at + finalist_bytes(cluster) * most_finalists) {}

  // What a block may ask for. Where each needs a multiprocessor for itself, clusters may not find room for all at once.
  static int room() {
    constexpr int kPrivateBytes = 5 * 1024;  // what a block has besides
    return static_cast<int>(multiprocessor_shared_bytes()) / 2 - kPrivateBytes;
  }

 private:
  static int ring_bytes(int head_dim) { return head_dim == 128 ? kRingBytes<128> : kRingBytes<64>; }
  static int finalist_bytes(int cluster) { return cluster * static_cast<int>(sizeof(uint2)); }
};

template <typename T>
struct ChosenArgs {
  DecodeArgs<T> decode;
  PageBounds<T> bounds;
  PageBudget budget;
  Selection pages;
  KeptCounters counters;
  GroupScore group_score = GroupScore::kMax;
  int min_entries = 0;
  int scores_at = 0;  // of shared memory, as kept_at and finalists_at
  int kept_at = 0;
  int finalists_at = 0;
  int most_finalists = 0;  // of a block
};

inline constexpr int kLikelyPages = 2;  // of a warp, that are fetched before it is known whether they are chosen

// This lane's candidates: the largest order, the largest complement of one, and the page of the largest score.
struct Scored {
  unsigned best = 0, worst = 0;
  int best_page = -1;
};

// Scores pages [begin, end) of the sequence into shared memory. A warp begins at a tile that lies as far into its own
// as it does among the block's warps, so that first tiles are of all the run. When it has asked for its last, the next
// kernel may begin: memory would be idle while pages are chosen.
template <typename T, int kHeadDim, int kProducts, bool kInt8, typename SomeMessages, typename SomeFinalists>
__device__ Scored score_run(const ChosenArgs<T>& args, unsigned rings, int begin, int end, float* scores,
                            const PageChoice& choice, SomeMessages& messages, SomeFinalists& finalists) {
  using Tile = BoundTile<T, kHeadDim, kInt8>;
  constexpr int kRing = Tile::kSlots;
  constexpr int kStride = kDecodeWarps * kTilePages;
  const unsigned ring = rings + this_warp() * kRingBytes<kHeadDim>;
  const int first = begin + this_warp() * kTilePages;
  const int tiles = first < end ? (end - first + kStride - 1) / kStride : 0;
  const auto behind = [&](int tile) { return tile + kStride < end ? tile + kStride : first; };
  // Rows behind the run's end repeat its last.
  const auto page_of = [&](int n, int tile) {
    return n < tiles ? args.decode.page_table(blockIdx.z, min(tile + this_lane() % kTilePages, end - 1)) : 0;
  };
  const BoundCopies<T, kHeadDim, kInt8> copies(args.bounds, ring);
  int tile = first + tiles * this_warp() / kDecodeWarps * kStride;
  int next = tile;
  int page[kRing];
#pragma unroll
  for (int i = 0; i < kRing; ++i) {
    page[i] = page_of(i, next);
    next = behind(next);
  }
  int next_page = page_of(kRing, next);
#pragma unroll
  for (int i = 0; i < kRing; ++i) {
    if (i < tiles) copies.copy(i, page[i]);
    commit_copies();
  }
  wait_for_cluster();  // the others have begun
  wait_for_previous();
  const auto query = load_bound_queries<T, kHeadDim, kProducts, kInt8>(args.decode);

  constexpr int kSampleCome = 2;  // tiles after which other warps' samples are here
  if (tiles == 0 && finalists.is_used()) finalists.tell_sample(messages, 0);
  int slot = 0;
  Scored scored;
#pragma unroll 1
  for (int n = 0; n < tiles; ++n) {
    wait_copies<kRing - 1>();
    __syncwarp();
    float d[kBoundParts][kProducts][4] = {};
    score_tile<T, kHeadDim, kProducts, kInt8>(ring + slot * Tile::kBytes, query, d);
    __syncwarp();  // all have read the slot
    if (n + kRing < tiles) copies.copy(slot, next_page);
    if (n + kRing + 1 == tiles) let_next_start();
    commit_copies();
    next = behind(next);
    next_page = page_of(n + kRing + 1, next);
    const float score = group_score_of<kProducts>(d, args.group_score, args.decode.group);
    const int row = tile + this_lane() / 4 + this_lane() % 2 * 8;
    unsigned order = 0;
    if (this_lane() % 4 < 2 && row < end) {
      scores[row - begin] = score;
      if (row >= choice.sink_end && row < choice.window_begin) {
        order = order_of(score);
        if (order > scored.best) scored.best_page = row;
        scored.best = max(scored.best, order);
        scored.worst = max(scored.worst, ~order);
      }
    }
    if (n == 0 && finalists.is_used()) finalists.tell_sample(messages, order);
    if (n == kSampleCome && finalists.is_used()) finalists.await_bar(messages);
    tile = behind(tile);
    slot = slot == kRing - 1 ? 0 : slot + 1;
  }
  if (tiles <= kSampleCome && finalists.is_used()) finalists.await_bar(messages);
  let_next_start();  // also where there was nothing to ask for
  wait_copies<0>();
  return scored;
}

// Of the warp's pages those that score best, of the best in their lanes, are fetched while pages are chosen. Nothing
// depends on whether they are; one that is not chosen costs its bytes.
template <typename T, int kHeadDim>
class LikelyPages {
 public:
  __device__ LikelyPages(const DecodeArgs<T>& args, const Scored& scored) {
    unsigned left = scored.best;
    for (int i = 0; i < kLikelyPages; ++i) {
      const unsigned largest = __reduce_max_sync(kAllLanes, left);
      if (largest == 0) break;
      const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, left == largest))) - 1;
      if (this_lane() == lane) left = 0;
    }
    if (left == 0 && scored.best != 0) page_ = args.page_table(blockIdx.z, scored.best_page);
  }
  // Asks for keys and values of this lane's.
  __device__ void fetch(const DecodeArgs<T>& args) const {
    if (page_ < 0) return;
    const std::int64_t tile = ((std::int64_t{page_} * gridDim.x + blockIdx.x) << args.page_shift) * kHeadDim;
    const unsigned bytes = (2U * kHeadDim) << args.page_shift;
    prefetch_bulk(args.k + tile, bytes);
    prefetch_bulk(args.v + tile, bytes);
  }

 private:
  int page_ = -1;
};

}  // namespace vesper::cuda
