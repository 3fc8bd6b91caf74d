// The parts of sampled lists' rounds that wait for a block, and who takes them. Parts of round 0 are numbered through
// all lists and are there from the beginning; others follow as they are queued. A block takes the next number, and
// waits for its entry where that is not written yet. An entry has a bit of its own that says so: lists that queue at
// the same time do not wait for each other.
#pragma once

#include "attention/sampled_parts.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {

// Behind the lists' tickets, for all blocks.
enum QueueNumber { kTaken, kReserved, kEnded, kLeft };
static_assert(kLeft < kQueueNumbers);

// A round of a list's draws: [from, to) are attended to, [0, look) only looked at again.
inline constexpr std::int32_t kLastRound = 3;
struct Round {
  std::int32_t number;
  std::int32_t from, to;
  std::int32_t look;
  std::int32_t begin;   // of the draws that may be beyond the tolerance: 0, or the pilot's end
  std::int32_t hits;    // of rounds before
  std::int32_t old;     // draws before `from` that are beyond the tolerance now
  std::int32_t beyond;  // likewise of the round's own, counted as it is worked on
};
static_assert(sizeof(Round) == kRoundNumbers * sizeof(std::int32_t));

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

// What a block needs to begin a part.
struct QueuedPart {
  std::int32_t list, part;
  std::int32_t number, from, to, look;  // of its round
  std::int32_t fixed;                   // tokens of the list's static part
  [[nodiscard]] __device__ Round round() const {
    return {.number = number, .from = from, .to = to, .look = look, .begin = 0, .hits = 0, .old = 0, .beyond = 0};
  }
};

template <typename T>
class SampledQueue {
 public:
  // `item`: of shared memory.
  __device__ SampledQueue(const SampledArgs<T>& args, std::int32_t& item) : args_(args), item_(item) {}

  // The next number. Also a block's first is not its own: numbers go to blocks that run, so that whoever waits for an
  // entry waits for a block that has begun, however few run at once.
  __device__ int next() {
    if (threadIdx.x == 0) item_ = atomicAdd(number(kTaken), 1);
    __syncthreads();
    const int next = item_;
    __syncthreads();
    return next;
  }
  // The queue's entry `at`, as soon as there is one; false where all lists end without it.
  __device__ bool take(int at, QueuedPart& queued) {
    let_next_start();  // where all blocks have come here, little is left
    if (threadIdx.x == 0) {
      const volatile unsigned* word = bits(at / kWordBits);
      const volatile std::int32_t* ended = number(kEnded);
      bool is_there = false;
      bool is_over = false;
      while (!is_there && !is_over) {
        is_over = *ended == args_.lists;  // before the other: what ends last queues first
        is_there = (*word >> at % kWordBits & 1U) != 0;
      }
      __threadfence();
      item_ = is_there ? 1 : 0;
    }
    __syncthreads();
    if (item_ == 0) return false;
    const auto* from = reinterpret_cast<const int4*>(&args_.scratch.queue(at, 0));
    const int4 first = __ldcg(from);
    const int4 second = __ldcg(from + 1);
    queued = {first.x, first.y, first.z, first.w, second.x, second.y, second.z};
    return true;
  }
  // Queues all of a round's parts but the first, which this block takes.
  __device__ void queue_others(int list, std::int32_t fixed, const Round& round) {
    const int parts = RoundCuts(args_.scratch.cuts, round).all();
    if (parts < 2) return;
    if (threadIdx.x == 0) {
      auto* const to = reinterpret_cast<int4*>(&args_.scratch.rounds(list, 0));
      __stcg(to, int4{round.number, round.from, round.to, round.look});
      __stcg(to + 1, int4{round.begin, round.hits, round.old, 0});
      item_ = atomicAdd(number(kReserved), parts - 1);
    }
    __syncthreads();
    const std::int32_t begin = item_;
    for (int part = 1 + static_cast<int>(threadIdx.x); part < parts; part += static_cast<int>(kDecodeThreads)) {
      auto* const to = reinterpret_cast<int4*>(&args_.scratch.queue(begin + part - 1, 0));
      __stcg(to, int4{list, part, round.number, round.from});
      __stcg(to + 1, int4{round.to, round.look, fixed, 0});
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    const std::int32_t end = begin + parts - 1;
    for (std::int32_t at = begin; at < end;) {
      const int first = at % kWordBits;
      const int count = min(kWordBits - first, end - at);
      atomicOr(bits(at / kWordBits), (~0U >> (kWordBits - count)) << first);
      at += count;
    }
  }
  // Adds a warp's draws to those of its list's queued round.
  __device__ void count_beyond(int list, std::int32_t draws) const {
    if (draws > 0 && this_lane() == 0) atomicAdd(&args_.scratch.rounds(list, kRoundNumbers - 1), draws);
  }
  // A queued round whose parts are done.
  __device__ Round read_round(int list) const {
    const auto* from = reinterpret_cast<const int4*>(&args_.scratch.rounds(list, 0));
    const int4 first = __ldcg(from);
    const int4 second = __ldcg(from + 1);
    return {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
  }
  __device__ void end_list() const {
    if (threadIdx.x == 0) atomicAdd(number(kEnded), 1);
  }
  // Behind a block's last take(); the last block makes the numbers ready for the next launch.
  __device__ void leave() const {
    if (threadIdx.x != 0 || atomicAdd(number(kLeft), 1) != static_cast<int>(gridDim.x) - 1) return;
    const std::int32_t queued = __ldcg(number(kReserved));
    for (int word = 0; word * kWordBits < queued; ++word) *bits(word) = 0;
    for (int i = kTaken; i <= kLeft; ++i) *number(static_cast<QueueNumber>(i)) = 0;
  }

 private:
  static constexpr int kWordBits = 32;
  // Whether entries are there, a bit each, behind the numbers.
  __device__ unsigned* bits(int word) const {
    return reinterpret_cast<unsigned*>(&args_.scratch.tickets(args_.lists + kQueueNumbers + word));
  }
  __device__ std::int32_t* number(QueueNumber number) const { return &args_.scratch.tickets(args_.lists + number); }

  const SampledArgs<T>& args_;
  std::int32_t& item_;
};

}  // namespace vesper::cuda
