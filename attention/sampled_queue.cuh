// The rounds of sampled lists that wait for blocks, and who takes their parts. A round that is queued goes in front of
// those that are there: a stack whose top is exchanged at once, so that no list waits for another to queue. Nobody's
// result depends on the order.
#pragma once

#include "attention/sampled_parts.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {

// Behind the lists' tickets, for all blocks.
enum QueueNumber { kTaken, kTop, kEnded, kLeft };
static_assert(kLeft < kMoreTickets);

// A round of a list's draws: [from, to) are attended to, [0, look) only looked at again.
struct Round {
  std::int32_t number;
  std::int32_t from, to;
  std::int32_t look;
  std::int32_t begin;   // of the draws that may be beyond the tolerance: 0, or the pilot's end
  std::int32_t hits;    // of rounds before
  std::int32_t old;     // draws before `from` that are beyond the tolerance now
  std::int32_t beyond;  // likewise of the round's own, counted as it is worked on
};

// How it lies in device memory where it has more than one part, one for each round of each list.
struct QueuedRound {
  static constexpr std::int32_t kUnknown = -1;
  Round round;
  std::int32_t fixed;  // tokens of the list's static part
  std::int32_t parts;
  std::int32_t taken;  // of the parts
  std::int32_t next;   // round below, counted from 1; 0 for the last
  std::int32_t unused[4];
};
static_assert(sizeof(QueuedRound) == kRoundNumbers * sizeof(std::int32_t) && kRoundNumbers % 4 == 0);

struct RoundCuts {
  std::int32_t draws;  // of a part
  int parts, looks;

  __device__ RoundCuts(const SampledCuts& cuts, const Round& round) {
    const std::int32_t longest = max(round.to - round.from, round.look);
    const std::int32_t even = (longest + cuts.parts - 1) / cuts.parts;
    draws = max(cuts.draws, (even + kPiece - 1) / kPiece * kPiece);
    parts = (round.to - round.from + draws - 1) / draws;
    looks = (round.look + draws - 1) / draws;
  }
  __device__ int all() const { return parts + looks; }
};

// A part that a block begins.
struct TakenPart {
  int list, part;
  std::int32_t fixed;
  Round round;
};

template <typename T>
class SampledQueue {
 public:
  // `shared`: what all threads of the block are told.
  __device__ SampledQueue(const SampledArgs<T>& args, int2& shared) : args_(args), shared_(shared) {}

  // The next part of round 0, counted through all lists, of which there are `openings`; a block's first is its own
  // number.
  __device__ int next_opening(int openings) {
    if (static_cast<int>(gridDim.x) >= openings) return openings;
    if (threadIdx.x == 0) shared_.x = static_cast<int>(gridDim.x) + atomicAdd(number(kTaken), 1);
    __syncthreads();
    const int next = shared_.x;
    __syncthreads();
    return next;
  }
  // A part that is queued, as soon as there is one; false where all lists end without.
  __device__ bool take(TakenPart& taken) {
    let_next_start();  // where all blocks have come here, little is left
    if (threadIdx.x == 0) shared_ = find();
    __syncthreads();
    const int2 found = shared_;
    if (found.x == 0) return false;
    const auto* from = reinterpret_cast<const int4*>(&queued(found.x));
    const int4 first = __ldcg(from);
    const int4 second = __ldcg(from + 1);
    const int4 third = __ldcg(from + 2);
    taken = {.list = (found.x - 1) / kSampleRounds,
             .part = found.y,
             .fixed = third.x,
             .round = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, 0}};
    return true;
  }
  // Queues all of a round's parts but the first, which this block takes.
  __device__ void queue_others(int list, std::int32_t fixed, const Round& round) {
    const int parts = RoundCuts(args_.scratch.cuts, round).all();
    if (parts < 2) return;
    __syncthreads();  // totals and estimate are written
    if (threadIdx.x != 0) return;
    const int at = place(list, round.number);
    QueuedRound& to = queued(at);
    auto* const words = reinterpret_cast<int4*>(&to);
    __stcg(words, int4{round.number, round.from, round.to, round.look});
    __stcg(words + 1, int4{round.begin, round.hits, round.old, 0});
    __stcg(words + 2, int4{fixed, parts, 1, QueuedRound::kUnknown});
    __threadfence();
    const std::int32_t below = atomicExch(number(kTop), at);
    *static_cast<volatile std::int32_t*>(&to.next) = below;
  }
  // Adds a warp's draws to those of its list's queued round.
  __device__ void count_beyond(int list, const Round& round, std::int32_t draws) const {
    if (draws > 0 && this_lane() == 0) atomicAdd(&queued(place(list, round.number)).round.beyond, draws);
  }
  // Those of a queued round whose parts are done.
  __device__ std::int32_t beyond_of(int list, const Round& round) const {
    return __ldcg(&queued(place(list, round.number)).round.beyond);
  }
  __device__ void end_list() const {
    if (threadIdx.x == 0) atomicAdd(number(kEnded), 1);
  }
  // Behind a block's last take(); the last block makes the numbers ready for the next launch.
  __device__ void leave() const {
    if (threadIdx.x != 0 || atomicAdd(number(kLeft), 1) != static_cast<int>(gridDim.x) - 1) return;
    for (int i = kTaken; i <= kLeft; ++i) *number(static_cast<QueueNumber>(i)) = 0;
  }

 private:
  __device__ std::int32_t* number(QueueNumber number) const { return &args_.scratch.tickets(args_.lists + number); }
  // Of a round, counted from 1.
  __device__ static int place(int list, std::int32_t round) { return list * kSampleRounds + round; }
  __device__ QueuedRound& queued(int place) const {
    return *reinterpret_cast<QueuedRound*>(&args_.scratch.rounds(place - 1, 0));
  }

  // By one thread: a round's place and the part of it that is now this block's; 0 where all lists have ended.
  __device__ int2 find() const {
    const volatile std::int32_t* top = number(kTop);
    const volatile std::int32_t* ended = number(kEnded);
    while (true) {
      const bool is_over = *ended == args_.lists;
      const std::int32_t at = *top;
      if (is_over) return {0, 0};
      if (at == 0) continue;
      __threadfence();
      QueuedRound& round = queued(at);
      const std::int32_t part = atomicAdd(&round.taken, 1);
      if (part < __ldcg(&round.parts)) return {at, part};
      // All are taken: the one below becomes the top, unless somebody else has changed it.
      const volatile std::int32_t* next = &round.next;
      std::int32_t below = *next;
      while (below == QueuedRound::kUnknown) below = *next;
      atomicCAS(number(kTop), at, below);
    }
  }

  const SampledArgs<T>& args_;
  int2& shared_;
};

}  // namespace vesper::cuda
