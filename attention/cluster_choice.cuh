// A cluster of blocks finds where the list of a sequence's best pages ends, each warp having the scores of a run of its
// pages in shared memory.
//
// The warps tell each other the range of their scores, then how many lie in each of 512 even bins of it, then the few
// scores of the bin in which the list ends, which every warp compares for itself. With the last message comes how many
// scores of the sender lie above that bin, so that every warp also knows how many listed pages lie before its own.
// Where a warp has more members of that bin than its message holds (ties, or a range that far outliers stretch), the
// range of orders that the bin spans is told and cut into bins in turn, until it is one score.
// All sums are of integers: the same scores give the same end as attention/block_threshold.cuh finds, in any order.
// A message is a store that counts at a barrier of the receiving block (engine/core/cluster.cuh): on an H100 a barrier
// of the whole cluster takes 700 to 800 cycles, as it orders all other memory too.
#pragma once

#include <bit>

#include "attention/attend_decode.cuh"
#include "attention/select_list.cuh"
#include "engine/core/bulk_copy.cuh"
#include "engine/core/cluster.cuh"

namespace vesper::cuda {

inline constexpr int kWarpPages = static_cast<int>(kWarpThreads);
inline constexpr int kBins = 4 * static_cast<int>(kDecodeThreads);  // counts of four to a thread
inline constexpr int kBinBits = std::countr_zero(static_cast<unsigned>(kBins));
inline constexpr int kListCluster = 16;                        // most blocks to a list
inline constexpr int kSections = kListCluster * kDecodeWarps;  // a warp of a cluster each; in the order of their pages
inline constexpr int kMaxMembers = 128;
// Sections are dealt out to the lanes of each warp: section i kWarpThreads + lane. So many of a lane there are at most
// in clusters of `blocks` blocks.
template <int kBlocks>
inline constexpr int kLaneSections = (kBlocks * kDecodeWarps - 1) / static_cast<int>(kWarpThreads) + 1;

// What a warp tells about the scores of its pages: how many are members of a set and how many are above it, and the
// first members' orders.
struct Members {
  static constexpr int kListed = 6;
  unsigned members, above;
  unsigned order[kListed];
};
static_assert(sizeof(Members) == 2 * sizeof(uint4));
// What a lane's sections tell, in clusters of at most kBlocks blocks; likewise below.
template <int kBlocks>
struct LaneMembers {
  Members of[kLaneSections<kBlocks>];
};

// What the blocks of a cluster tell each other about a list, in each of them.
struct Meeting {
  alignas(16) unsigned bins[kBins / 2];  // this block's; two counts of 16 bits each
  alignas(16) uint4 header[kSections];   // attention/finalists.cuh
  uint2 range[kSections];                // largest order, largest complement of one; or a sample
  std::uint64_t range_told, bins_told, members_told, kept_told;  // barriers
  std::uint64_t counts_told, finalists_told;
  int of_warp[kDecodeWarps];  // of this block alone, as the following
  int bin;
  int needed;  // of that bin's
  int members, finalists;
};
// Over the rings: what comes only after all warps of the cluster have told that their scores are made.
struct LateMeeting {
  alignas(16) unsigned bins[kListCluster][kBins / 2];
  alignas(16) Members members[kSections];
  unsigned room[kDecodeWarps][kMaxMembers];
};

// The pages that this warp answers for, [first, end), and those of them that are candidates.
struct WarpPages {
  const float* scores;  // of the block's pages
  int block_begin;
  int first, end;
  int first_candidate, end_candidate;
  int blocks;   // of the cluster
  int section;  // this warp's number

  // visit(whether this lane has a candidate, its score), all lanes together.
  template <typename Visit>
  __device__ void for_each(const Visit& visit) const {
#pragma unroll 2
    for (int p = first_candidate + this_lane(); p - this_lane() < end_candidate; p += kWarpPages) {
      visit(p < end_candidate, scores[min(p, end_candidate - 1) - block_begin]);
    }
  }
};

// The messages of a search, and which of each kind comes next. Every kind is told by all warps in turn with the others,
// so that none is told anew before all have read it.
template <int kBlocks>
class Messages {
 public:
  __device__ Messages(Meeting& meeting, LateMeeting& late, int blocks)
      : meeting_(meeting), late_(late), blocks_(blocks) {}

  // By one thread, before the cluster's blocks know that all have begun. `kept`: pages that this block will be sent.
  __device__ void begin(int kept) const {
    for (std::uint64_t* barrier :
         {&meeting_.range_told, &meeting_.bins_told, &meeting_.members_told, &meeting_.kept_told}) {
      make_barrier(shared_address(barrier), 1);
    }
    publish_barriers();
    arrive_expecting(shared_address(&meeting_.range_told), range_bytes());
    arrive_expecting(shared_address(&meeting_.bins_told), bins_bytes());
    arrive_expecting(shared_address(&meeting_.members_told), members_bytes());
    arrive_expecting(shared_address(&meeting_.kept_told), static_cast<unsigned>(4 * kept));
  }

  // The cluster's largest `order` and `complement`. `meanwhile` is called while the others' are awaited.
  template <typename Meanwhile>
  __device__ uint2 range(int section, unsigned order, unsigned complement, const Meanwhile& meanwhile) {
    tell_range(section, {__reduce_max_sync(kAllLanes, order), __reduce_max_sync(kAllLanes, complement)});
    meanwhile();
    const uint2 told = ranges();
    return {__reduce_max_sync(kAllLanes, told.x), __reduce_max_sync(kAllLanes, told.y)};
  }

  // Its halves: tells `mine`, the same in all lanes, and gives the largest of what this lane's sections told, or what
  // one section did where there is one for the lane, the lanes' sections being spread over all.
  __device__ void tell_range(int section, uint2 mine) {
    if (this_lane() >= blocks_) return;
    const auto block = static_cast<unsigned>(this_lane());
    send(in_block(shared_address(&meeting_.range[section]), block), mine,
         in_block(shared_address(&meeting_.range_told), block));
  }
  __device__ uint2 ranges() {
    receive(meeting_.range_told, range_phase_, range_bytes());
    uint2 told = {};
    for (int section = this_lane(); section < sections(); section += static_cast<int>(kWarpThreads)) {
      told = {max(told.x, meeting_.range[section].x), max(told.y, meeting_.range[section].y)};
    }
    return told;
  }
  __device__ uint2 one_range() {
    receive(meeting_.range_told, range_phase_, range_bytes());
    const int section = this_lane() * max(1, sections() / static_cast<int>(kWarpThreads));
    return section < sections() ? meeting_.range[section] : uint2{};
  }

  // Sends the block's bins, four to a thread, and adds up all blocks': two counts of 16 bits a word.
  __device__ uint2 bins(int rank) {
    const uint2 mine = reinterpret_cast<const uint2*>(meeting_.bins)[threadIdx.x];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block >= blocks_) break;
      send(in_block(shared_address(&late_.bins[rank][2 * threadIdx.x]), static_cast<unsigned>(block)), mine,
           in_block(shared_address(&meeting_.bins_told), static_cast<unsigned>(block)));
    }
    receive(meeting_.bins_told, bins_phase_, bins_bytes());
    uint2 sum = {};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block >= blocks_) break;
      const uint2 told = reinterpret_cast<const uint2*>(late_.bins[block])[threadIdx.x];
      sum.x += told.x;
      sum.y += told.y;
    }
    return sum;
  }

  // Tells `mine`, the same in all lanes, and gives what this lane's sections told.
  __device__ LaneMembers<kBlocks> members(int section, const Members& mine) {
    if (this_lane() < blocks_) {
      const auto block = static_cast<unsigned>(this_lane());
      const unsigned to = in_block(shared_address(&late_.members[section]), block);
      const unsigned barrier = in_block(shared_address(&meeting_.members_told), block);
      send(to, uint4{mine.members, mine.above, mine.order[0], mine.order[1]}, barrier);
      send(to + static_cast<unsigned>(sizeof(uint4)), uint4{mine.order[2], mine.order[3], mine.order[4], mine.order[5]},
           barrier);
    }
    receive(meeting_.members_told, members_phase_, members_bytes());
    LaneMembers<kBlocks> told = {};
#pragma unroll
    for (int i = 0; i < kLaneSections<kBlocks>; ++i) {
      const int of = i * static_cast<int>(kWarpThreads) + this_lane();
      if (of < sections()) told.of[i] = late_.members[of];
    }
    return told;
  }

  __device__ Meeting& here() const {
    return meeting_;
  }
  __device__ unsigned* room() const {
    return late_.room[this_warp()];
  }

 private:
  [[nodiscard]] __device__ int sections() const {
    return blocks_ * kDecodeWarps;
  }
  [[nodiscard]] __device__ unsigned range_bytes() const {
    return static_cast<unsigned>(sections()) * sizeof(uint2);
  }
  [[nodiscard]] __device__ unsigned bins_bytes() const {
    return static_cast<unsigned>(blocks_) * sizeof(meeting_.bins);
  }
  [[nodiscard]] __device__ unsigned members_bytes() const {
    return static_cast<unsigned>(sections()) * sizeof(Members);
  }
  // Waits for the messages of this phase, and lets the next one begin.
  __device__ static void receive(std::uint64_t& told, unsigned& phase, unsigned bytes) {
    const unsigned barrier = shared_address(&told);
    wait_phase(barrier, phase);
    phase ^= 1U;
    if (threadIdx.x == 0) arrive_expecting(barrier, bytes);
    __syncwarp();
  }

  Meeting& meeting_;
  LateMeeting& late_;
  int blocks_;
  unsigned range_phase_ = 0, bins_phase_ = 0, members_phase_ = 0;
};

__device__ inline void count_in_bin(Meeting& meeting, int bin) {
  atomicAdd(&meeting.bins[bin / 2], bin % 2 == 0 ? 1U : 1U << 16);
}

// The sum of `mine` over all threads before this one. A barrier of the block lies in it.
__device__ inline int sum_before_thread(Meeting& meeting, int mine) {
  const int through = sum_through_lane(mine);
  if (this_lane() == static_cast<int>(kWarpThreads) - 1) meeting.of_warp[this_warp()] = through;
  __syncthreads();
  int sum = through - mine;
#pragma unroll
  for (int warp = 0; warp < kDecodeWarps; ++warp) sum += warp < this_warp() ? meeting.of_warp[warp] : 0;
  return sum;
}

// Leaves in the meeting the bin in which the count from bin 0 on reaches `needed`, and what is needed of it; behind a
// barrier. `four`: the counts of this thread's four bins, of 16 bits each.
__device__ inline void pick_bin(Meeting& meeting, uint2 four, int needed) {
  const int of_bin[4] = {static_cast<int>(four.x % 65536), static_cast<int>(four.x / 65536),
                         static_cast<int>(four.y % 65536), static_cast<int>(four.y / 65536)};
  const int mine = of_bin[0] + of_bin[1] + of_bin[2] + of_bin[3];
  int sum = sum_before_thread(meeting, mine);
  if (sum < needed && needed <= sum + mine) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (sum < needed && needed <= sum + of_bin[i]) {
        meeting.bin = 4 * static_cast<int>(threadIdx.x) + i;
        meeting.needed = needed - sum;
      }
      sum += of_bin[i];
    }
  }
  __syncthreads();
}

// As pick_bin, of the cluster's scores. bin_of(score) is negative for a score that does not count. The bins must be
// clear, a barrier of the block behind that; they are left clear behind another.
template <int kBlocks, typename BinOf>
__device__ void choose_bin(Messages<kBlocks>& messages, const WarpPages& own, int needed, const BinOf& bin_of) {
  Meeting& meeting = messages.here();
  own.for_each([&](bool has, float score) {
    const int bin = has ? bin_of(score) : -1;
    if (bin >= 0) count_in_bin(meeting, bin);
  });
  __syncthreads();
  const uint2 four = messages.bins(own.section / kDecodeWarps);
  reinterpret_cast<uint2*>(meeting.bins)[threadIdx.x] = {};
  pick_bin(meeting, four, needed);
}

// Where a list ends, and how far it has come in each section: those of this lane.
template <int kBlocks>
struct ListEnd {
  Threshold<unsigned> threshold;
  int above[kLaneSections<kBlocks>] = {};  // pages of the section
  int equal[kLaneSections<kBlocks>] = {};
};

// What this warp has to tell about its scores.
template <typename Member, typename Above>
__device__ Members members_of(const WarpPages& own, const Member& member, const Above& above, unsigned* room) {
  Members mine = {};
  own.for_each([&](bool has, float score) {
    const bool is_member = has && member(score);
    const unsigned all = __ballot_sync(kAllLanes, is_member);
    const unsigned place = mine.members + static_cast<unsigned>(__popc(before_this_lane(all)));
    if (is_member && place < Members::kListed) room[place] = order_of(score);
    mine.members += static_cast<unsigned>(__popc(all));
    mine.above += static_cast<unsigned>(__popc(__ballot_sync(kAllLanes, has && above(score))));
  });
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Members::kListed; ++i) mine.order[i] = room[i];  // behind the last whatever lies there
  __syncwarp();
  return mine;
}

// The order of the `needed`-th of all sections' members, each warp for itself; false where some are not listed.
template <int kBlocks>
__device__ bool compare_members(const LaneMembers<kBlocks>& told, int needed, unsigned* room, ListEnd<kBlocks>& end) {
  int members = 0;
  bool listed = true;
#pragma unroll
  for (int section = 0; section < kLaneSections<kBlocks>; ++section) {
    const Members& of = told.of[section];
    listed = listed && of.members <= Members::kListed;
    const int through = members + sum_through_lane(static_cast<int>(of.members));
#pragma unroll
    for (unsigned i = 0; i < Members::kListed; ++i) {
      const unsigned place = static_cast<unsigned>(through) - of.members + i;
      if (i < of.members && place < kMaxMembers) room[place] = of.order[i];
    }
    members = __shfl_sync(kAllLanes, through, static_cast<int>(kWarpThreads) - 1);
  }
  if (!__all_sync(kAllLanes, listed) || members > kMaxMembers) return false;
  __syncwarp();
  Threshold<unsigned> mine;
  for (int i = this_lane(); i < members; i += static_cast<int>(kWarpThreads)) {
    const unsigned order = room[i];
    int above = 0;
    int equal = 0;
#pragma unroll 4
    for (int other = 0; other < members; ++other) {
      above += room[other] > order ? 1 : 0;
      equal += room[other] == order ? 1 : 0;
    }
    if (above < needed && needed <= above + equal) mine = {order, static_cast<unsigned>(needed - above)};
  }
  end.threshold = {__reduce_max_sync(kAllLanes, mine.order), __reduce_max_sync(kAllLanes, mine.rest)};
#pragma unroll
  for (int section = 0; section < kLaneSections<kBlocks>; ++section) {
    const Members& of = told.of[section];
    end.above[section] = static_cast<int>(of.above);
    end.equal[section] = 0;
#pragma unroll
    for (unsigned i = 0; i < Members::kListed; ++i) {
      if (i >= of.members) break;
      end.above[section] += of.order[i] > end.threshold.order ? 1 : 0;
      end.equal[section] += of.order[i] == end.threshold.order ? 1 : 0;
    }
  }
  return true;
}

// Where the list ends within `bin` of `bins`, of whose members some are not listed: the range of orders that it spans
// is cut into bins in turn. Seldom needed, and therefore code of its own: what always runs lies close together.
template <int kBlocks>
__noinline__ __device__ ListEnd<kBlocks> search_in_bin(Messages<kBlocks> messages, WarpPages own, EvenBins bins,
                                                       int bin) {
  const auto range_where = [&](const auto& is_in) {
    unsigned largest = 0;
    unsigned complement = 0;
    own.for_each([&](bool has, float score) {
      if (!has || !is_in(score)) return;
      largest = max(largest, order_of(score));
      complement = max(complement, ~order_of(score));
    });
    return messages.range(own.section, largest, complement, [] {});
  };
  uint2 range = range_where([&](float score) { return bins(score) == bin; });
  while (~range.y < range.x) {
    // (largest - least) >> shift is under kBins.
    const unsigned largest = range.x;
    const unsigned least = ~range.y;
    const int shift = max(0, 32 - __clz(static_cast<int>(largest - least)) - kBinBits);
    const auto bin_of = [&](float score) {
      const unsigned order = order_of(score);
      return order >= least && order <= largest ? static_cast<int>((largest - order) >> shift) : -1;
    };
    choose_bin(messages, own, messages.here().needed, bin_of);
    const int at = messages.here().bin;
    range = range_where([&](float score) { return bin_of(score) == at; });
  }
  const unsigned order = range.x;
  const LaneMembers<kBlocks> told =
      messages.members(own.section, members_of(
                                        own, [&](float score) { return order_of(score) == order; },
                                        [&](float score) { return order_of(score) > order; }, messages.room()));
  ListEnd<kBlocks> end;
  end.threshold = {order, static_cast<unsigned>(messages.here().needed)};
#pragma unroll
  for (int section = 0; section < kLaneSections<kBlocks>; ++section) {
    end.above[section] = static_cast<int>(told.of[section].above);
    end.equal[section] = static_cast<int>(told.of[section].members);
  }
  return end;
}

// Where the list of the `chosen` best candidates ends, more of which there are. `best`, `worst`: largest order and
// complement of the candidates that this thread has seen. `meanwhile`: what else there is to do, called once.
template <int kBlocks, typename Meanwhile>
__device__ ListEnd<kBlocks> find_list_end(Messages<kBlocks>& messages, const WarpPages& own, int chosen, unsigned best,
                                          unsigned worst, const Meanwhile& meanwhile) {
  const uint2 range = messages.range(own.section, best, worst, meanwhile);
  __syncthreads();  // the scores of all warps are there
  const EvenBins bins(score_of_order(range.x), score_of_order(~range.y), kBins);
  choose_bin(messages, own, chosen, bins);
  const int bin = messages.here().bin;
  const auto in_bin = [&](float score) { return bins(score) == bin; };
  const auto above_bin = [&](float score) { return bins(score) < bin; };
  const LaneMembers<kBlocks> told = messages.members(own.section, members_of(own, in_bin, above_bin, messages.room()));
  ListEnd<kBlocks> end;
  if (!compare_members(told, messages.here().needed, messages.room(), end)) {
    end = search_in_bin(messages, own, bins, bin);
  }
  return end;
}

}  // namespace vesper::cuda
