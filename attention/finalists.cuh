// A cluster of blocks finds the list of a sequence's best pages by one exchange: each block tells the others the scores
// that may be on the list, its finalists, as soon as its own are made, and then finds the whole list for itself.
//
// Who is a finalist is guessed: each warp tells a score of its first tile of pages that some share of them reach, and a
// quantile of these is the bar. It is set so that about three times as many pages reach it as the list has room for,
// where there is room for so many. The warps' first tiles lie apart, since neighbouring pages score alike.
// A guess may be wrong: too few reach the bar, or more of a block's than there is room for. Every block sees that from
// the same counts, as it sees where equal scores at the end of the list leave a choice; then the search by messages
// (attention/cluster_choice.cuh) follows, whose list is the same.
//
// Each block counts all finalists in even bins from the best down to the least, then compares those of the bin in which
// the list ends. Listed pages become marks in a row of bits, so that those before a page are a sum over words.
// What counts here are instructions from the last score to the first key, which each run once, and latencies in turn: a
// thread holds its finalists in registers, all loaded at once, and loops are short rather than unrolled.
#pragma once

#include <bit>
#include <cstdint>

#include "attention/cluster_choice.cuh"
#include "attention/page_choice.h"

namespace vesper::cuda {

inline constexpr int kThreadBits = std::countr_zero(kDecodeThreads);
inline constexpr int kMarkWords = 4 * static_cast<int>(kDecodeThreads);                  // four to a thread
inline constexpr int kOwnFinalists = 6;                                                  // most that a thread looks at
inline constexpr int kMostFinalists = kOwnFinalists * static_cast<int>(kDecodeThreads);  // of a cluster

// Over the rings, when all warps of the block are done with them.
struct MarkedPages {
  alignas(16) unsigned word[kMarkWords];
  alignas(16) int before[kMarkWords];  // marks in all words before
  uint2 member[kMaxMembers];           // of the last bin: order, page
};
// In a warp's own ring, behind that: its finalists, order and page, before it tells them.
inline constexpr unsigned kStagedAt = 8 * 1024;
static_assert(sizeof(MarkedPages) <= kStagedAt);

// How finalists are found.
struct FinalistPlan {
  // Blocks with fewer pages search as soon (docs/kernels.md): there is less to gain than samples and code take.
  static constexpr int kLongRun = 512;
  static constexpr int kLeastRun = 256;  // of wide clusters, with
  static constexpr int kShortList = 24;  // so many candidates for a place on the list
  bool used = false;
  int nth = 1;   // of the candidates of its first tile a warp tells the nth best score
  int rank = 1;  // of what the lanes of a warp hear, the bar is that of this rank

  // Whether there may be finalists where each of `blocks` scores up to `run` pages.
  static bool can_be_used(int run, int blocks) { return run >= (blocks > kMaxCluster ? kLeastRun : kLongRun); }

  // Of pages that each block scores `run` of, and `most` finalists of a block.
  __device__ FinalistPlan(const PageChoice& choice, int run, int most, int blocks, int tile_pages) {
    constexpr float kMargin = 3.0F;
    constexpr float kLeastMargin = 1.5F;
    constexpr float kFill = 0.6F;  // of the room there is, on average
    const int between = choice.window_begin - choice.sink_end;
    if (choice.chosen <= 0 || choice.chosen >= between || choice.pages > 32 * kMarkWords) return;
    if (run < (blocks > kMaxCluster && between >= kShortList * choice.chosen ? kLeastRun : kLongRun)) return;
    const auto chosen = static_cast<float>(choice.chosen);
    const float margin = fminf(kMargin, __fdividef(kFill * static_cast<float>(most * blocks), chosen));
    used = margin >= kLeastMargin;
    const float share = fminf(1.0F, __fdividef(margin * chosen, static_cast<float>(between)));
    nth = max(1, static_cast<int>(static_cast<float>(tile_pages) * share + 0.5F));
    const int heard = min(blocks * kDecodeWarps, static_cast<int>(kWarpThreads));
    rank = heard / 2;
    if (nth > 1) return;
    // Of so many pages' best scores, 1 - (1 - share)^pages are over the quantile `share`.
    const int pages = tile_pages * blocks * kDecodeWarps / heard;
    float none = 1.0F - share;
    for (int power = 1; power < pages; power *= 2) none *= none;
    rank = max(1, static_cast<int>(static_cast<float>(heard) * (1.0F - none)));
  }
};

// No larger for a better score; what is not finite makes few bins of it, which costs a search only.
struct FinalistBins {
  float best, per_score;
  __device__ FinalistBins(float largest, float least) : best(largest) {
    per_score = __fdividef(static_cast<float>(kBins - 1), largest - least);
  }
  __device__ int operator()(float score) const {
    return min(static_cast<int>(__fmul_rn(__fsub_rn(best, score), per_score)), kBins - 1);
  }
};

class Finalists {
 public:
  // `told`: [blocks, most], order and page.
  __device__ Finalists(const FinalistPlan& plan, uint2* told, int most, int blocks, int rank)
      : plan_(plan), told_(told), most_(most), blocks_(blocks), rank_(rank) {}

  // By one thread, before the cluster's blocks know that all have begun.
  __device__ void begin(Meeting& meeting) const {
    meeting.finalists = 0;
    make_barrier(shared_address(&meeting.counts_told), 1);
    make_barrier(shared_address(&meeting.finalists_told), 1);
    publish_barriers();
    arrive_expecting(shared_address(&meeting.counts_told), static_cast<unsigned>(sections()) * sizeof(uint4));
  }

  [[nodiscard]] __device__ bool is_used() const { return plan_.used; }

  // `order`: of this lane's candidate in the warp's first tile, or 0.
  __device__ void tell_sample(Messages<kListCluster>& messages, unsigned order) const {
    unsigned nth = 0;
#pragma unroll 1
    for (int i = 0; i < plan_.nth; ++i) {
      nth = __reduce_max_sync(kAllLanes, order);
      if (order == nth) order = 0;
    }
    messages.tell_range(rank_ * kDecodeWarps + this_warp(), {nth, 0});
  }
  __device__ void await_bar(Messages<kListCluster>& messages) {
    // Of the nth best each lane hears one warp's, of the best that of two where there are more warps than lanes.
    const unsigned sample = plan_.nth > 1 ? messages.one_range().x : messages.ranges().x;
    int rank = 0;  // of this lane's sample, from the best on
#pragma unroll 8
    for (int lane = 0; lane < static_cast<int>(kWarpThreads); ++lane) {
      const unsigned other = __shfl_sync(kAllLanes, sample, lane);
      rank += other > sample || (other == sample && lane < this_lane()) ? 1 : 0;
    }
    bar_ = __reduce_max_sync(kAllLanes, rank == plan_.rank - 1 ? sample : 0U);
  }

  // Tells all blocks of those among this warp's pages. The block's scores are made, and its rings free.
  __device__ void tell(Meeting& meeting, const WarpPages& own, uint2* staged) const {
    constexpr int kTogether = 4;
    unsigned best = 0;
    unsigned worst = 0;  // the complement of the order
    int count = 0;
#pragma unroll 1
    for (int first = own.first_candidate; first < own.end_candidate; first += kTogether * kWarpPages) {
      unsigned order[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int page = first + i * kWarpPages + this_lane();
        order[i] = order_of(own.scores[min(page, own.end_candidate - 1) - own.block_begin]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int page = first + i * kWarpPages + this_lane();
        const bool reaches = page < own.end_candidate && order[i] >= bar_;
        const unsigned all = __ballot_sync(kAllLanes, reaches);
        const int place = count + __popc(before_this_lane(all));
        count += __popc(all);
        if (!reaches) continue;
        best = max(best, order[i]);
        worst = max(worst, ~order[i]);
        if (place < most_) staged[place] = {order[i], static_cast<unsigned>(page)};
      }
    }
    int begin = 0;
    if (this_lane() == 0) begin = atomicAdd(&meeting.finalists, count);
    // Lanes share out the blocks, and those of one block the finalists.
    const auto to = static_cast<unsigned>(this_lane() & (blocks_ - 1));
    const unsigned header = in_block(shared_address(&meeting.header[rank_ * kDecodeWarps + this_warp()]), to);
    const unsigned counts_told = in_block(shared_address(&meeting.counts_told), to);
    const unsigned room = in_block(shared_address(told_ + rank_ * most_), to);
    const unsigned finalists_told = in_block(shared_address(&meeting.finalists_told), to);
    const unsigned largest = __reduce_max_sync(kAllLanes, best);
    const unsigned complement = __reduce_max_sync(kAllLanes, worst);
    if (this_lane() < blocks_) send(header, uint4{static_cast<unsigned>(count), largest, complement, 0}, counts_told);
    begin = __shfl_sync(kAllLanes, begin, 0);
    __syncwarp();  // what is staged can be read
    const int fit = min(count, most_ - begin);
    const int shift = bits_of_blocks();
#pragma unroll 1
    for (int i = this_lane() >> shift; i < fit; i += static_cast<int>(kWarpThreads) >> shift) {
      send(room + static_cast<unsigned>(begin + i) * sizeof(uint2), staged[i], finalists_told);
    }
  }

  // Finds the best choice.chosen pages of the cluster's, and calls listed(place among these, page, entry(page)) for
  // each, once; false, and nothing called, where that takes a search. The bins must be clear, and are left clear.
  template <typename Entry, typename Listed>
  __device__ bool list(Meeting& meeting, MarkedPages& marked, const PageChoice& choice, const Entry& entry,
                       const Listed& listed) const {
    reinterpret_cast<uint4*>(marked.word)[threadIdx.x] = {};
    if (threadIdx.x == 0) meeting.members = 0;
    wait_phase(shared_address(&meeting.counts_told), 0);
    // A lane reads what the warps of one block have told; lanes behind the blocks repeat them.
    const uint4* headers = meeting.header + (this_lane() & (blocks_ - 1)) * kDecodeWarps;
    unsigned count = 0;  // of that block
    unsigned largest = 0;
    unsigned complement = 0;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const uint4 header = headers[warp];
      count += header.x;
      largest = max(largest, header.y);
      complement = max(complement, header.z);
    }
    const auto most = static_cast<unsigned>(most_);
    const unsigned total = __reduce_add_sync(kAllLanes, this_lane() < blocks_ ? min(count, most) : 0U);
    if (threadIdx.x == 0) arrive_expecting(shared_address(&meeting.finalists_told), total * sizeof(uint2));
    const unsigned fullest = __reduce_max_sync(kAllLanes, count);
    largest = __reduce_max_sync(kAllLanes, largest);
    complement = __reduce_max_sync(kAllLanes, complement);
    const FinalistBins bin_of(score_of_order(largest), score_of_order(~complement));
    // A block's finalists are read by as many neighbouring threads as there are for each block.
    const int shift = kThreadBits - bits_of_blocks();
    const int block = static_cast<int>(threadIdx.x) >> shift;
    const auto first = static_cast<int>(threadIdx.x) & ((1 << shift) - 1);
    const auto here = static_cast<int>(__shfl_sync(kAllLanes, count, block));
    wait_phase(shared_address(&meeting.finalists_told), 0);
    if (fullest > most || total < static_cast<unsigned>(choice.chosen)) return false;

    uint2 own[kOwnFinalists];
    int own_entry[kOwnFinalists];
    int bin[kOwnFinalists];  // kBins: there is no such finalist
    const uint2* finalists = told_ + block * most_;
#pragma unroll
    for (int i = 0; i < kOwnFinalists; ++i) own[i] = finalists[max(0, min(first + (i << shift), here - 1))];
#pragma unroll
    for (int i = 0; i < kOwnFinalists; ++i) {
      const bool is_one = first + (i << shift) < here;
      own_entry[i] = is_one ? entry(static_cast<int>(own[i].y)) : 0;
      bin[i] = is_one ? bin_of(score_of_order(own[i].x)) : kBins;
    }
#pragma unroll
    for (int i = 0; i < kOwnFinalists; ++i) {
      if (bin[i] < kBins) count_in_bin(meeting, bin[i]);
    }
    __syncthreads();
    const uint2 four = reinterpret_cast<const uint2*>(meeting.bins)[threadIdx.x];
    reinterpret_cast<uint2*>(meeting.bins)[threadIdx.x] = {};
    pick_bin(meeting, four, choice.chosen);
    const int last_bin = meeting.bin;
    const int needed = meeting.needed;
    const auto mark = [&](unsigned page) { atomicOr(&marked.word[page / 32], 1U << page % 32); };
#pragma unroll
    for (int i = 0; i < kOwnFinalists; ++i) {
      if (bin[i] < last_bin) mark(own[i].y);
      if (bin[i] != last_bin) continue;
      const int place = atomicAdd(&meeting.members, 1);
      if (place < kMaxMembers) marked.member[place] = own[i];
    }
    __syncthreads();
    const int members = meeting.members;
    bool undecided = members > kMaxMembers;
    if (!undecided && static_cast<int>(threadIdx.x) < members) {
      const uint2 mine = marked.member[threadIdx.x];
      int above = 0;
      int equal = 0;
#pragma unroll 1
      for (int other = 0; other < members; ++other) {
        above += marked.member[other].x > mine.x ? 1 : 0;
        equal += marked.member[other].x == mine.x ? 1 : 0;
      }
      if (above + equal <= needed) mark(mine.y);
      undecided = above < needed && needed < above + equal;
    }
    if (__syncthreads_or(undecided ? 1 : 0) != 0) return false;

    const uint4 words = reinterpret_cast<const uint4*>(marked.word)[threadIdx.x];
    const int3 in_first = {__popc(words.x), __popc(words.y), __popc(words.z)};
    const int before = sum_before_thread(meeting, in_first.x + in_first.y + in_first.z + __popc(words.w));
    const int second = before + in_first.x;
    const int third = second + in_first.y;
    reinterpret_cast<int4*>(marked.before)[threadIdx.x] = {before, second, third, third + in_first.z};
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwnFinalists; ++i) {
      if (bin[i] > last_bin) continue;
      const unsigned page = own[i].y;
      const unsigned word = marked.word[page / 32];
      if ((word >> page % 32) % 2 == 0) continue;
      listed(marked.before[page / 32] + __popc(word & ((1U << page % 32) - 1U)), static_cast<int>(page), own_entry[i]);
    }
    return true;
  }

 private:
  [[nodiscard]] __device__ int sections() const {
    return blocks_ * kDecodeWarps;
  }
  // Clusters of a list have a power of two of blocks.
  [[nodiscard]] __device__ int bits_of_blocks() const {
    return 31 - __clz(blocks_);
  }

  FinalistPlan plan_;
  uint2* told_;
  int most_;
  int blocks_, rank_;
  unsigned bar_ = 0;
};

// In kernels for runs that are too short for them.
struct NoFinalists {
  static __device__ bool is_used() { return false; }
  static __device__ void begin(Meeting& /*meeting*/) {}
  template <typename Anything>
  static __device__ void tell_sample(Anything& /*messages*/, unsigned /*order*/) {}
  template <typename Anything>
  static __device__ void await_bar(Anything& /*messages*/) {}
};

}  // namespace vesper::cuda
