// Attention over sampled lists on CUDA, in one launch: the tail is drawn, sized and attended to by a team of blocks a
// list. Semantics and formulas in attention/sample_tail.h.
//
// Shapes: q, out [seqs, heads, head_dim]; K and V [pages, kv_heads, page_tokens, head_dim] in tile order
//   (kvcache/layout.h); lists [seqs, kv_heads, capacity] as in attention/selection.h.
// Mapping: grid (team, kv_heads, seqs). A team is up to 32 blocks of four warps, which meet four to seven times: a
//   cluster where the clusters of all lists run at once; else (32 clusters of 8 do not, on an H100) and before compute
//   capability 9.0 blocks that meet at a counter, all of which run at once:
//     1  static part and pilot: pieces of 16 keys dealt out to the team's warps, one sum for each of the two parts,
//        of which the tail's stays in registers to the end, since all draws weigh the same
//     2  each block merges its share of the channels: o, log D, sum of w (v - o) over the pilot
//     3  the pilot again, from L2: sums of w, w^2, w^2 |v - o|^2
//     4  every block computes the same size from all blocks' sums, in order; draws, attends to what it draws, and looks
//        for terms beyond the tolerance
//     5  where there are any, the sample doubles; 6 where there still are, it becomes the rest
//     7  each block merges its share of the channels: out, lse
//   Nothing but a list's own numbers decides its way, so a team's blocks go the same one.
// |v - o|^2 = |v|^2 - 2 v . o + |o|^2: v . o is a tensor-core product like the scores, with o as the sum of two 16-bit
//   numbers (2^-17 of it is lost in bf16). A draw's share is its largest w max(1, |v - o| / |o|) / epsilon over the
//   group's heads; it is beyond the tolerance where (n_rest / drawn) share > 1, whatever `drawn` becomes. Past the
//   pilot |v - o| <= |v| + |o| mostly shows that it is not, without the product.
// Sums over pieces are fp32, a few a lane; over lanes, warps and blocks in a fixed order, moments in fp64.
// Bytes: K and V of the listed tokens once, those of the pilot a second time from L2; parts of 2 (head_dim + 2) floats
//   a block and head.
// Over 450 lines: the phases share the tail's sums and the queries in registers, so they are one class.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "attention/attend_rows.cuh"
#include "attention/attend_sampled.h"
#include "attention/gather_piece.cuh"
#include "engine/core/cluster.cuh"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "engine/core/stream.h"

namespace vesper::cuda {
namespace {

constexpr int kMaxTeam = 32;  // a lane for every block
constexpr int kLargestCluster = 16;
constexpr int kMarks = 1152;  // static tokens at even distances that are kept in shared memory, for searches
constexpr int kStatic = 0;    // parts of a list
constexpr int kTail = 1;

template <typename T>
struct SampledArgs {
  DecodeArgs<T> decode;
  TensorView<const std::int32_t, 1> request;
  SampleRule rule;
  Selection list;
  SampleReport report;
  SampledScratch scratch;
  KeptCounters counters;
  bool clusters = false;
};

template <typename T, int kHeadDim>
struct Shared {
  static constexpr int kStride = kHeadDim + 8;  // spreads the rows of a fragment over the banks
  std::int32_t marks[kMarks];                   // residual tokens before every stride-th static one
  alignas(16) T high[kHeads][kStride];          // o = high + low
  alignas(16) T low[kHeads][kStride];
  float maxima[kDecodeWarps][2][kHeads];
  float sums[kDecodeWarps][2][kHeads];
  float lse[kHeads];            // log2 of D; inf for rows that are no heads
  float out_squared[kHeads];    // |o|^2
  float out_inverse[kHeads];    // 1 / |o|
  float pilot_squared[kHeads];  // |sum of w (v - o)|^2
  float moments[kDecodeWarps][kHeads][3];
  std::int32_t drawn[kHeads];  // that a head asks for
  int2 beyond[kDecodeWarps];
};

// Within 2^-21 relative.
__device__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <typename T, int kHeadDim, int kHalves>
class Member {
 public:
  __device__ Member(const SampledArgs<T>& args, Shared<T, kHeadDim>& shared, unsigned char* rings, std::int32_t kv_len,
                    std::int32_t request)
      : args_(args),
        shared_(shared),
        rings_(rings),
        inverse_epsilon_(1.0F / args.rule.epsilon),
        shares_(&args.scratch.shares(list_, 0)),
        own_parts_(&args.scratch.parts(block_, 0, 0, 0)),
        own_sums_(reinterpret_cast<float2*>(&args.scratch.part_sums(block_, 0, 0, 0))),
        ring_(shared_address(rings) + this_warp() * kRowRingBytes<kHeadDim>),
        kv_len_(kv_len),
        index_(&args.list.index(s_, g_, 0)),
        static_(args.list.tail_begin(s_, g_)),
        rest_(kv_len_ - static_),
        static_pieces_(pieces_of(static_)),
        mark_stride_((static_ + kMarks - 1) / kMarks),
        order_(rest_, {.seed = args.rule.seed,
                       .request = static_cast<std::uint32_t>(request),
                       .step = static_cast<std::uint32_t>(kv_len_ - 1),
                       .layer = static_cast<std::uint32_t>(args.rule.layer),
                       .kv_head = static_cast<std::uint32_t>(g_)}) {}

  __device__ __forceinline__ void run() {
    const std::int32_t pilot = min(max(2, tokens_of(args_.rule.pilot, kv_len_)), rest_);
    load_queries();
    set_marks();
    attend_static_and_pilot(pilot);
    meet();
    std::int32_t drawn = pilot;
    std::int32_t hits = 0;
    if (pilot < rest_) {
      load_estimate(merge_estimate(pilot));
      sum_moments(pilot);
      meet();
      drawn = grow(pilot, sized(pilot), &hits);
    }
    let_next_start();
    const std::int32_t before = leave();
    merge_out(drawn);
    left(before);
    if (rank_ == 0 && threadIdx.x == kDecodeThreads - 1) report(drawn, hits);
  }

 private:
  // By one thread of the team. Counts are integers, so the order in which lists add to them does not show.
  __device__ void report(std::int32_t drawn, std::int32_t hits) const {
    args_.report.guard_hits(s_, g_) = hits;
    args_.list.count(s_, g_) = static_ + drawn;
    args_.list.tail_log_weight(s_, g_) =
        drawn == 0 ? 0.0F : log1pf(static_cast<float>(rest_ - drawn) / static_cast<float>(drawn));
    const KeptCounters& counters = args_.counters;
    if (counters.lists.data() == nullptr) return;
    const auto add = [&](const TensorView<std::int64_t, 1>& counter, std::int32_t number) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&counter(g_)), static_cast<unsigned long long>(number));
    };
    add(counters.kept_tokens, static_ + drawn);
    add(counters.visible_tokens, kv_len_);
    add(counters.sampled_tokens, drawn);
    add(counters.lists, 1);
    if (counters.guard_hits.data() != nullptr) add(counters.guard_hits, hits);
  }

  // --- the team ---

  __device__ void meet() {
    if (args_.clusters) {
      arrive_in_cluster();
      return wait_for_cluster();
    }
    __syncthreads();
    if (gridDim.x == 1) return;
    met_ += static_cast<std::int32_t>(gridDim.x);
    if (threadIdx.x == 0) {
      std::int32_t* const count = &args_.scratch.tickets(s_, g_);
      __threadfence();
      atomicAdd(count, 1);
      // Not with acquiring loads: each empties the first-level cache, which the multiprocessor's other block uses too.
      while (*static_cast<volatile std::int32_t*>(count) < met_) {
      }
      __threadfence();
    }
    __syncthreads();
  }
  // Behind the last meeting, which all have seen who leave: how many have, the meetings' included; and the last makes
  // the counter ready for the next launch. Apart, so that nobody waits for the number.
  __device__ std::int32_t leave() const {
    const bool counted = !args_.clusters && gridDim.x > 1 && threadIdx.x == 0;
    return counted ? atomicAdd(&args_.scratch.tickets(s_, g_), 1) : -1;
  }
  __device__ void left(std::int32_t before) const {
    if (before == met_ + static_cast<std::int32_t>(gridDim.x) - 1) args_.scratch.tickets(s_, g_) = 0;
  }

  // --- draws ---

  __device__ void set_marks() {
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < kMarks; i += static_cast<int>(kDecodeThreads)) {
      if (i * mark_stride_ >= static_) continue;
      shared_.marks[i] = index_[i * mark_stride_] - i * mark_stride_;
    }
    __syncthreads();
  }
  __device__ std::int32_t static_token(std::int32_t i) const {
    return mark_stride_ == 1 ? shared_.marks[i] + i : index_[i];
  }
  // residual_token(), by a search of the marks and then between two of them.
  __device__ std::int32_t token_of_draw(std::int32_t i) const {
    const std::int32_t r = order_(i);
    int low = 0;
    int high = (static_ + mark_stride_ - 1) / mark_stride_;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (shared_.marks[middle] <= r) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low == 0) return r;
    high = min(low * mark_stride_, static_);
    low = (low - 1) * mark_stride_ + 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (index_[middle] - middle <= r) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return r + low;
  }
  // What a draw stands for where so many are drawn.
  __device__ float each_of(std::int32_t drawn) const {
    return drawn == 0 ? 1.0F : static_cast<float>(rest_) / static_cast<float>(drawn);
  }

  // --- pieces ---

  // Pieces of the static part are dealt out to the team's warps in turn, and then those of the tail, a piece being
  // draws [16 p, 16 p + 16): a draw belongs to the same warp whenever it is looked at.
  __device__ int team_warps() const {
    return static_cast<int>(gridDim.x) * kDecodeWarps;
  }
  __device__ int own_piece(int first) const {
    const int own = rank_ * kDecodeWarps + this_warp() - first % team_warps();
    return first + (own < 0 ? own + team_warps() : own);
  }
  __device__ static int pieces_of(std::int32_t entries) {
    return (entries + kPiece - 1) / kPiece;
  }

  // Draws [first, end), of one piece.
  struct Draws {
    std::int32_t first, end;
    __device__ int count() const { return end - first; }
    // That of row lane % 16, the last one for rows behind it.
    __device__ std::int32_t of_lane() const { return min(first + this_lane() % kPiece, end - 1); }
  };
  // Of a piece that counts on after the static part's, those in [from, to).
  __device__ Draws draws_of(int piece, std::int32_t from, std::int32_t to) const {
    const std::int32_t begin = (piece - static_pieces_) * kPiece;
    return {max(from, begin), min(to, begin + kPiece)};
  }

  // use(piece, keys, slot) for this warp's pieces of [first, end). token_of(piece): of row lane % 16, or of the last
  // where there are fewer; called for two pieces at once, by half a warp each. A step of the loop finds the tokens of
  // one piece, the pages of the one before, copies the one before that, and uses the one that was copied two steps ago:
  // each is done in one place, since code that many warps run once costs more to fetch than to run.
  template <typename KeysOf, typename TokenOf, typename Use>
  __device__ __forceinline__ void for_each_piece(int first, int end, const KeysOf& keys_of, const TokenOf& token_of,
                                                 const Use& use) {
    constexpr int kCopyAhead = kRowSlots - 1;
    const DecodeArgs<T>& args = args_.decode;
    const int step = team_warps();
    const int begin = own_piece(first);
    int tokens = 0;       // of two pieces, one in each half of the warp
    bool second = false;  // the piece that the second half has is next
    int token_found = 0;  // of the piece whose page is found next
    int token = 0;        // of the piece that is copied next
    int page = 0;
    int slot = 0;
#pragma unroll 1
    for (int piece = begin - (kCopyAhead + 2) * step; piece < end; piece += step) {
      if (piece >= begin) {
        wait_copies<kCopyAhead - 1>();
        __syncwarp();  // the piece is there for all lanes, and all are done with the one whose slot is filled next
      }
      const int copied = piece + kCopyAhead * step;
      if (copied >= begin && copied < end) {
        const std::int64_t row =
            ((std::int64_t{page} * gridDim.y + g_) << args.page_shift) + (token & ((1 << args.page_shift) - 1));
        const int to = slot == 0 ? kRowSlots - 1 : slot - 1;  // two ahead of three
        static_assert(kCopyAhead == 2 && kRowSlots == 3);
        gather_piece<T, kHeadDim>(ring_ + to * kSlotBytes<kHeadDim>, args.k, args.v, row, keys_of(copied));
      }
      commit_copies();
      token = token_found;
      const int paged = copied + step;
      if (paged >= begin && paged < end) page = args.page_table(s_, token >> args.page_shift);
      const int found = paged + step;
      if (!second && found < end) tokens = token_of(min(this_lane() < kPiece ? found : found + step, end - 1));
      token_found = __shfl_sync(kAllLanes, tokens, this_lane() % kPiece + (second ? kPiece : 0));
      second = !second;
      if (piece >= begin) use(piece, keys_of(piece), ring_ + slot * kSlotBytes<kHeadDim>);
      slot = slot == kRowSlots - 1 ? 0 : slot + 1;
    }
    wait_copies<0>();
    __syncwarp();
  }

  // Draws join the list; the token of this lane's row.
  __device__ std::int32_t join(const Draws& draws) const {
    const std::int32_t token = token_of_draw(draws.of_lane());
    if (this_lane() % kPiece < draws.count()) index_[static_ + draws.first + this_lane() % kPiece] = token;
    return token;
  }

  __device__ __forceinline__ void attend_static_and_pilot(std::int32_t pilot) {
    auto fixed = nothing_yet_in_rows<kHeadDim, kHalves>();
    const auto keys_of = [&](int piece) {
      return piece < static_pieces_ ? min(kPiece, static_ - piece * kPiece) : draws_of(piece, 0, pilot).count();
    };
    const auto token_of = [&](int piece) {
      if (piece < static_pieces_) return static_token(min(piece * kPiece + this_lane() % kPiece, static_ - 1));
      return join(draws_of(piece, 0, pilot));
    };
    for_each_piece(0, static_pieces_ + pieces_of(pilot), keys_of, token_of, [&](int piece, int keys, unsigned slot) {
      float scores[2][4] = {};
      score_into_rows<T, kHeadDim>(scores, q_, slot);
      if (keys < kPiece) hide_row_keys_from(keys, scores);
      if (piece < static_pieces_) {
        take_into_rows<T, kHeadDim, kHalves>(fixed, scores, slot, args_.decode.scale_log2);
      } else {
        take_into_rows<T, kHeadDim, kHalves>(tail_, scores, slot, args_.decode.scale_log2);
      }
    });
    park(fixed, kStatic);
    park(tail_, kTail);
    publish(kStatic);
  }

  // Sums over this warp's pieces of the pilot, and the shares of its draws.
  __device__ __forceinline__ void sum_moments(std::int32_t pilot) {
    float once[kHalves] = {};
    float squares[kHalves] = {};
    float apart[kHalves] = {};
    const bool of_output = args_.rule.verify == Verify::kOutput;
    const auto keys_of = [&](int piece) { return draws_of(piece, 0, pilot).count(); };
    const auto token_of = [&](int piece) { return index_[static_ + draws_of(piece, 0, pilot).of_lane()]; };
    for_each_piece(static_pieces_, static_pieces_ + pieces_of(pilot), keys_of, token_of,
                   [&](int piece, int keys, unsigned slot) {
                     float scores[2][4] = {};
                     score_into_rows<T, kHeadDim>(scores, q_, slot);
                     if (keys < kPiece) hide_row_keys_from(keys, scores);
                     float distance[2][4] = {};
                     if (of_output) square_distances(distance, slot);
                     float share[4] = {};
#pragma unroll
                     for (int half = 0; half < kHalves; ++half) {
                       const int head = this_lane() / 4 + 8 * half;
#pragma unroll
                       for (int i = 0; i < 4; ++i) {
                         const float w = weight(scores[i / 2][2 * half + i % 2], head);
                         const float squared = distance[i / 2][2 * half + i % 2];
                         once[half] += w;
                         squares[half] = fmaf(w, w, squares[half]);
                         apart[half] = fmaf(w * w, squared, apart[half]);
                         share[i] = fmaxf(share[i], w * fmaxf(1.0F, sqrt_approx(squared) * shared_.out_inverse[head]));
                       }
                     }
                     (void)keep_shares(share, draws_of(piece, 0, pilot), 0.0F);
                   });
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int head = this_lane() / 4 + 8 * half;
      const float sums[3] = {row_sum(once[half]), row_sum(squares[half]), row_sum(apart[half])};
      if (this_lane() % 4 != 0) continue;
#pragma unroll
      for (int i = 0; i < 3; ++i) shared_.moments[this_warp()][head][i] = sums[i];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < 3 * args_.decode.group; i += static_cast<int>(kDecodeThreads)) {
      double sum = 0.0;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) sum += static_cast<double>(shared_.moments[w][i / 3][i % 3]);
      args_.scratch.moments(block_, i / 3, i % 3) = sum;
    }
  }

  // Draws [from, to) join the list and the tail's sums; where `guarded`, their shares are kept, and those of this lane
  // that are beyond the tolerance counted.
  __device__ __forceinline__ std::int32_t extend(std::int32_t from, std::int32_t to, bool guarded) {
    const auto keys_of = [&](int piece) { return draws_of(piece, from, to).count(); };
    const auto token_of = [&](int piece) { return join(draws_of(piece, from, to)); };
    std::int32_t beyond = 0;
    for_each_piece(static_pieces_ + from / kPiece, static_pieces_ + pieces_of(to), keys_of, token_of,
                   [&](int piece, int keys, unsigned slot) {
                     float scores[2][4] = {};
                     score_into_rows<T, kHeadDim>(scores, q_, slot);
                     if (keys < kPiece) hide_row_keys_from(keys, scores);
                     if (guarded) beyond += guard(scores, slot, draws_of(piece, from, to), each_of(to));
                     take_into_rows<T, kHeadDim, kHalves>(tail_, scores, slot, args_.decode.scale_log2);
                   });
    return beyond;
  }

  // Draws from the pilot up to `to`, and what the guard then asks for; leaves the tail's parts behind a meeting.
  __device__ __forceinline__ std::int32_t grow(std::int32_t pilot, std::int32_t to, std::int32_t* hits) {
    std::int32_t from = pilot;
    for (int look = 0;; ++look) {
      const bool guarded = to < rest_ && look < 2;
      const std::int32_t fresh = static_cast<std::int32_t>(__reduce_add_sync(kAllLanes, extend(from, to, guarded)));
      if (guarded) {
        // The first look is at all draws, the second at the new ones and again at the old.
        const std::int32_t old = beyond_in(from, to);
        publish_beyond(look, look == 0 ? fresh + old : fresh, look == 0 ? 0 : old);
      }
      park(tail_, kTail);
      publish(kTail);
      meet();
      if (!guarded) return to;
      const int2 beyond = all_beyond(look);
      *hits += beyond.x;
      if (beyond.x + beyond.y == 0 || args_.rule.on_outlier == OnOutlier::kReport) return to;
      from = to;
      to = look == 0 ? doubled(to, rest_) : rest_;
    }
  }

  // --- terms ---

  __device__ void load_queries() {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int row = this_lane() / 4 + 8 * half;
      if (row >= args_.decode.group) continue;
      const T* from = &args_.decode.q(s_, g_ * args_.decode.group + row, 2 * (this_lane() % 4));
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 16) {
        q_[d / 16][half] = *reinterpret_cast<const unsigned*>(from + d);
        q_[d / 16][half + 2] = *reinterpret_cast<const unsigned*>(from + d + 8);
      }
    }
  }

  __device__ float weight(float score, int head) const {
    return exp2_approx(fmaf(score, args_.decode.scale_log2, -shared_.lse[head]));
  }

  // |v|^2 of the piece's keys, as the keys of score fragments: i / 2 the fragment, i % 2 the column.
  __device__ void square_values(float (&squares)[4], unsigned slot) const {
    const unsigned row = this_lane() % kPiece;
    const unsigned address = slot + kTileBytes<kHeadDim> + row * 2 * kHeadDim + this_lane() / kPiece * kHeadDim;
    float sums[4] = {};
#pragma unroll
    for (unsigned c = 0; c < kHeadDim / 16; ++c) {
      uint4 packed;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
                   : "r"(address + (c ^ row % (kHeadDim / 16)) * kChunkBytes));
      const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 pair = widen_pair<T>(words[w]);
        sums[w] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sums[w]));
      }
    }
    float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    sum += __shfl_xor_sync(kAllLanes, sum, kPiece);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      squares[i] = __shfl_sync(kAllLanes, sum, i / 2 * 8 + this_lane() % 4 * 2 + i % 2);
    }
  }

  // |v - o|^2 of heads and keys, in place of scores.
  __device__ void square_distances(float (&distance)[2][4], unsigned slot) const {
    float squares[4];
    square_values(squares, slot);
    float product[2][4] = {};
    unsigned o[kHeadDim / 16][4];
    load_rows(o, shared_.high);
    score_into_rows<T, kHeadDim>(product, o, slot + kTileBytes<kHeadDim>);
    load_rows(o, shared_.low);
    score_into_rows<T, kHeadDim>(product, o, slot + kTileBytes<kHeadDim>);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int at = 2 * half + i % 2;
        const float squared = shared_.out_squared[this_lane() / 4 + 8 * half];
        distance[i / 2][at] = fmaxf(0.0F, fmaf(-2.0F, product[i / 2][at], squares[i] + squared));
      }
    }
  }
  __device__ static void load_rows(unsigned (&rows)[kHeadDim / 16][4],
                                   const T (&from)[kHeads][Shared<T, kHeadDim>::kStride]) {
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rows[d / 16][i] = i % 2 < kHalves
                              ? *reinterpret_cast<const unsigned*>(
                                    &from[this_lane() / 4 + 8 * (i % 2)][d + 2 * (this_lane() % 4) + i / 2 * 8])
                              : 0U;
      }
    }
  }

  // Keeps the shares of draws: exact where one may be beyond the tolerance, else a bound.
  __device__ __forceinline__ std::int32_t guard(const float (&scores)[2][4], unsigned slot, const Draws& draws,
                                                float each) {
    const bool of_output = args_.rule.verify == Verify::kOutput;
    float bound[4] = {};
    float squares[4] = {};
    if (of_output) square_values(squares, slot);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int head = this_lane() / 4 + 8 * half;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float w = weight(scores[i / 2][2 * half + i % 2], head);
        bound[i] = fmaxf(bound[i], w * fmaxf(1.0F, fmaf(sqrt_approx(squares[i]), shared_.out_inverse[head], 1.0F)));
      }
    }
    const float largest = fmaxf(fmaxf(bound[0], bound[1]), fmaxf(bound[2], bound[3]));
    if (of_output && __any_sync(kAllLanes, !(each * largest <= args_.rule.epsilon))) {
      float distance[2][4];
      square_distances(distance, slot);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bound[i] = 0.0F;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const int head = this_lane() / 4 + 8 * half;
          const float w = weight(scores[i / 2][2 * half + i % 2], head);
          const float squared = distance[i / 2][2 * half + i % 2];
          bound[i] = fmaxf(bound[i], w * fmaxf(1.0F, sqrt_approx(squared) * shared_.out_inverse[head]));
        }
      }
    }
    return keep_shares(bound, draws, each);
  }

  // Keeps the largest over heads of what lanes hold for their keys, over epsilon; how many of this lane's are more than
  // 1 / each.
  __device__ __forceinline__ std::int32_t keep_shares(float (&share)[4], const Draws& draws, float each) const {
    std::int32_t beyond = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int step = 4; step < static_cast<int>(kWarpThreads); step *= 2) {
        if (step / 4 >= args_.decode.group) break;  // shares of rows that are no heads are zero
        share[i] = fmaxf(share[i], __shfl_xor_sync(kAllLanes, share[i], step));
      }
      const int key = i / 2 * 8 + this_lane() % 4 * 2 + i % 2;
      if (this_lane() >= 4 || key >= draws.count()) continue;
      const float kept = share[i] * inverse_epsilon_;
      shares_[draws.first + key] = kept;
      beyond += each * kept > 1.0F ? 1 : 0;
    }
    return beyond;
  }

  // How many of this warp's draws [0, end) are beyond the tolerance at `drawn`; the same in all lanes.
  __device__ std::int32_t beyond_in(std::int32_t end, std::int32_t drawn) const {
    const float each = each_of(drawn);
    std::int32_t beyond = 0;
    __syncwarp();  // the lanes that kept the shares are others
#pragma unroll 1
    for (int piece = own_piece(static_pieces_); piece < static_pieces_ + pieces_of(end); piece += team_warps()) {
      const Draws draws = draws_of(piece, 0, end);
      const bool is = this_lane() < draws.count() && each * shares_[draws.first + this_lane()] > 1.0F;
      beyond += __popc(__ballot_sync(kAllLanes, is));
    }
    return beyond;
  }
  // This block's counts, from its warps'.
  __device__ void publish_beyond(int look, std::int32_t fresh, std::int32_t still) {
    if (this_lane() == 0) shared_.beyond[this_warp()] = {fresh, still};
    __syncthreads();
    if (threadIdx.x != 0) return;
    int2 sum = {0, 0};
    for (const int2& of_warp : shared_.beyond) sum = {sum.x + of_warp.x, sum.y + of_warp.y};
    args_.scratch.beyond(block_, look, 0) = sum.x;
    args_.scratch.beyond(block_, look, 1) = sum.y;
  }
  // The team's.
  __device__ int2 all_beyond(int look) const {
    int2 own = {0, 0};  // of the block that this lane has
    if (this_lane() < static_cast<int>(gridDim.x)) {
      own = __ldcg(reinterpret_cast<const int2*>(&args_.scratch.beyond(first_block_ + this_lane(), look, 0)));
    }
    return {__reduce_add_sync(kAllLanes, own.x), __reduce_add_sync(kAllLanes, own.y)};
  }

  // --- merging ---

  // Leaves a warp's sums in its ring, for publish() behind a barrier.
  __device__ __forceinline__ void park(const RunningRows<kHeadDim, kHalves>& running, int part) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int row = this_lane() / 4 + 8 * half;
      float* to = parked(this_warp(), part) + row * kRowMergeStride<kHeadDim> + 2 * (this_lane() % 4);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(to + 8 * n) = {running.out[n][2 * half], running.out[n][2 * half + 1]};
      }
      const float sum = row_sum(running.sum[half]);
      if (this_lane() % 4 == 0) {
        shared_.maxima[this_warp()][part][row] = running.max[half];
        shared_.sums[this_warp()][part][row] = sum;
      }
    }
  }
  __device__ float* parked(int warp, int part) const {
    static_assert(2 * kHeads * kRowMergeStride<kHeadDim> * 4 <= kRowRingBytes<kHeadDim>);
    return reinterpret_cast<float*>(rings_ + warp * kRowRingBytes<kHeadDim>) +
           part * kHeads * kRowMergeStride<kHeadDim>;
  }
  // This block's sums of the list's parts from `first_part` on, relative to their largest scores.
  __device__ __forceinline__ void publish(int first_part) {
    __syncthreads();
    const int group_elements = args_.decode.group * kHeadDim;
#pragma unroll 1
    for (int part = first_part; part < 2; ++part) {
      float* parts = own_parts_ + part * group_elements;
      float2* sums = own_sums_ + part * args_.decode.group;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < group_elements; i += static_cast<int>(kDecodeThreads)) {
        const int h = i / kHeadDim;
        const int d = i % kHeadDim;
        float max = -INFINITY;
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) max = fmaxf(max, shared_.maxima[w][part][h]);
        const float shift = max == -INFINITY ? 0.0F : max;  // -inf only where this block has no piece
        float sum = 0.0F;
        float out = 0.0F;
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) {
          const float factor = exp2_approx(shared_.maxima[w][part][h] - shift);
          sum = fmaf(factor, shared_.sums[w][part][h], sum);
          out = fmaf(factor, parked(w, part)[h * kRowMergeStride<kHeadDim> + d], out);
        }
        parts[i] = out;
        if (d == 0) sums[h] = {max, sum};
      }
    }
  }

  struct Merged {
    float out;    // o, of one channel
    float pilot;  // sum over the tail of w (v - o), likewise, every draw counted once
    float lse;    // log2 of D
  };
  // Sums over parts, relative to a largest score; a part's tail counts every draw once.
  struct PartSums {
    float max = -1e30F;  // below every score, and no infinity: parts of blocks without keys have -inf
    float fixed_sum = 0.0F, fixed = 0.0F, tail_sum = 0.0F, tail = 0.0F;

    __device__ void add(float larger, float of_static, float static_sum, float static_out, float of_tail,
                        float sum_of_tail, float tail_out) {
      larger = fmaxf(max, larger);
      const float shrink = exp2_approx(max - larger);
      const float static_factor = exp2_approx(of_static - larger);
      const float tail_factor = exp2_approx(of_tail - larger);
      max = larger;
      fixed_sum = fmaf(static_factor, static_sum, shrink * fixed_sum);
      fixed = fmaf(static_factor, static_out, shrink * fixed);
      tail_sum = fmaf(tail_factor, sum_of_tail, shrink * tail_sum);
      tail = fmaf(tail_factor, tail_out, shrink * tail);
    }
  };
  // Of element i of the group's channels, over every lanes-th of the team's parts from `lane` on.
  __device__ __forceinline__ PartSums sum_parts(int i, int lane, int lanes, float each_log2) const {
    const int group = args_.decode.group;
    const float* parts = &args_.scratch.parts(first_block_, 0, 0, i);
    const auto* sums = reinterpret_cast<const float2*>(&args_.scratch.part_sums(first_block_, 0, i / kHeadDim, 0));
    PartSums total;
#pragma unroll 8
    for (int b = lane; b < static_cast<int>(gridDim.x); b += lanes) {
      const float2 of_static = __ldcg(sums + 2 * b * group);
      const float2 of_tail = __ldcg(sums + (2 * b + 1) * group);
      const float out_of_static = __ldcg(parts + 2 * b * group * kHeadDim);
      const float out_of_tail = __ldcg(parts + (2 * b + 1) * group * kHeadDim);
      total.add(fmaxf(of_static.x, of_tail.x + each_log2), of_static.x, of_static.y, out_of_static, of_tail.x,
                of_tail.y, out_of_tail);
    }
    return total;
  }
  // write(element, merged) for elements [first, first + count) of the group's channels. Where they are fewer than the
  // block's threads, several threads share an element's parts.
  template <typename Write>
  __device__ __forceinline__ void merge_elements(int first, int count, std::int32_t drawn, const Write& write) const {
    const float each = each_of(drawn);
    const float each_log2 = log2f(each);
    const int width = min(count, static_cast<int>(kDecodeThreads));
    const int lanes = static_cast<int>(kDecodeThreads) / width;
    const int lane = static_cast<int>(threadIdx.x) / width;
    auto* const stage = reinterpret_cast<PartSums*>(rings_ + kDecodeWarps / 2 * kRowRingBytes<kHeadDim>);
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x) % width; at < count; at += width) {  // one turn where lanes > 1
      PartSums sums;
      if (lane < lanes) sums = sum_parts(first + at, lane, lanes, each_log2);
      if (lanes > 1) {
        stage[threadIdx.x] = sums;
        __syncthreads();
      }
      if (lane > 0) break;
#pragma unroll 1
      for (int other = 1; other < lanes; ++other) {
        const PartSums& more = stage[other * width + at];
        sums.add(more.max, more.max, more.fixed_sum, more.fixed, more.max, more.tail_sum, more.tail);
      }
      const float sum = fmaf(each, sums.tail_sum, sums.fixed_sum);
      const float out = fmaf(each, sums.tail, sums.fixed) / sum;
      write(first + at, Merged{out, (sums.tail - out * sums.tail_sum) / sum, sums.max + log2f(sum)});
    }
  }
  // Where the estimate lies: o, sum of w (v - o) over the pilot, log2 of D. Each block merges its share of the channels
  // for all, or all of them for itself where that is less work than another meeting.
  __device__ __forceinline__ const float* merge_estimate(std::int32_t pilot) {
    const int elements = args_.decode.group * kHeadDim;
    const bool alone = args_.decode.group * static_cast<int>(gridDim.x) <= 16;
    float* to = alone ? reinterpret_cast<float*>(rings_) : &args_.scratch.estimates(list_, 0);
    const int share = alone ? elements : elements / static_cast<int>(gridDim.x);
    merge_elements(alone ? 0 : rank_ * share, share, pilot, [&](int i, const Merged& merged) {
      to[i] = merged.out;
      to[elements + i] = merged.pilot;
      if (i % kHeadDim == 0) to[2 * elements + i / kHeadDim] = merged.lse;
    });
    if (alone) {
      __syncthreads();
    } else {
      meet();
    }
    return to;
  }
  __device__ __forceinline__ void merge_out(std::int32_t drawn) const {
    const int first_head = g_ * args_.decode.group;
    T* out = &args_.decode.out(s_, first_head, 0);
    const int share = args_.decode.group * kHeadDim / static_cast<int>(gridDim.x);
    merge_elements(rank_ * share, share, drawn, [&](int i, const Merged& merged) {
      out[i] = narrow<T>(merged.out);
      if (i % kHeadDim == 0 && args_.decode.lse.data() != nullptr) {
        args_.decode.lse(s_, first_head + i / kHeadDim) = merged.lse * kLn2;
      }
    });
  }

  // --- size ---

  __device__ __forceinline__ void load_estimate(const float* estimate) {
    const int elements = args_.decode.group * kHeadDim;
#pragma unroll 1
    for (int h = this_warp(); h < args_.decode.group; h += kDecodeWarps) {
      float out_squared = 0.0F;
      float pilot_squared = 0.0F;
#pragma unroll
      for (int i = 0; i < kHeadDim / static_cast<int>(kWarpThreads); ++i) {
        const int d = this_lane() + i * static_cast<int>(kWarpThreads);
        const float out = estimate[h * kHeadDim + d];
        const float pilot = estimate[elements + h * kHeadDim + d];
        out_squared = fmaf(out, out, out_squared);
        pilot_squared = fmaf(pilot, pilot, pilot_squared);
        shared_.high[h][d] = narrow<T>(out);
        shared_.low[h][d] = narrow<T>(out - widen(narrow<T>(out)));
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        out_squared += __shfl_xor_sync(kAllLanes, out_squared, step);
        pilot_squared += __shfl_xor_sync(kAllLanes, pilot_squared, step);
      }
      if (this_lane() != 0) continue;
      shared_.lse[h] = estimate[2 * elements + h];
      shared_.out_squared[h] = out_squared;
      shared_.out_inverse[h] = 1.0F / sqrtf(out_squared);
      shared_.pilot_squared[h] = pilot_squared;
    }
    // Rows that are no heads weigh nothing.
    const int rest = (kHeads - args_.decode.group) * kHeadDim;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rest; i += static_cast<int>(kDecodeThreads)) {
      const int h = args_.decode.group + i / kHeadDim;
      shared_.high[h][i % kHeadDim] = shared_.low[h][i % kHeadDim] = T{};
      shared_.lse[h] = INFINITY;
      shared_.out_squared[h] = shared_.out_inverse[h] = 1.0F;
    }
    __syncthreads();
  }

  // unbiased_variance() of n numbers by the square of their sum: differences in fp64, quotients in fp32, which are
  // several times as fast.
  __device__ static float variance(double squared_sum, double sum_of_squares, std::int32_t n) {
    const double deviations = fma(static_cast<double>(n), sum_of_squares, -squared_sum);
    return deviations < 0.0 ? 0.0F
                            : static_cast<float>(deviations) / (static_cast<float>(n) * static_cast<float>(n - 1));
  }

  // The largest sample that a head of the group asks for, from the moments of all blocks.
  __device__ __forceinline__ std::int32_t sized(std::int32_t pilot) {
    const SampleRule& rule = args_.rule;
#pragma unroll 1
    for (int h = this_warp(); h < args_.decode.group; h += kDecodeWarps) {
      // A lane has a block.
      double sums[3] = {};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (this_lane() < static_cast<int>(gridDim.x)) {
          sums[i] = __ldcg(&args_.scratch.moments(first_block_ + this_lane(), h, i));
        }
      }
#pragma unroll
      for (int step = kMaxTeam / 2; step > 0; step /= 2) {
#pragma unroll
        for (double& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, step);
      }
      const auto rest = static_cast<float>(rest_);
      float draws = draws_for(rule.z, rest, variance(sums[0] * sums[0], sums[1], pilot), rule.epsilon);
      if (rule.verify == Verify::kOutput) {
        const float of_output =
            draws_for(rule.z, rest, variance(static_cast<double>(shared_.pilot_squared[h]), sums[2], pilot),
                      rule.epsilon * sqrtf(shared_.out_squared[h]));
        draws = draws < of_output || isnan(of_output) ? of_output : draws;
      }
      if (this_lane() == 0) shared_.drawn[h] = sample_tokens(rule.safety, draws, pilot, rest_);
    }
    __syncthreads();
    std::int32_t drawn = pilot;
#pragma unroll 1
    for (int h = 0; h < args_.decode.group; ++h) drawn = max(drawn, shared_.drawn[h]);
    return drawn;
  }

  const SampledArgs<T>& args_;
  Shared<T, kHeadDim>& shared_;
  unsigned char* const rings_;
  const int rank_ = static_cast<int>(blockIdx.x);
  const int g_ = static_cast<int>(blockIdx.y);
  const int s_ = static_cast<int>(blockIdx.z);
  const int list_ = s_ * static_cast<int>(gridDim.y) + g_;
  const int first_block_ = list_ * static_cast<int>(gridDim.x);
  const int block_ = first_block_ + rank_;
  const float inverse_epsilon_;
  float* const shares_;
  float* const own_parts_;
  float2* const own_sums_;
  const unsigned ring_;
  const std::int32_t kv_len_;
  std::int32_t* const index_;
  const std::int32_t static_;
  const std::int32_t rest_;
  const int static_pieces_;
  const int mark_stride_;
  const DrawOrder order_;
  std::int32_t met_ = 0;  // blocks that have come to the meetings so far
  unsigned q_[kHeadDim / 16][4] = {};
  RunningRows<kHeadDim, kHalves> tail_ = nothing_yet_in_rows<kHeadDim, kHalves>();
};

template <typename T, int kHeadDim, int kHalves>
__global__ void __launch_bounds__(kDecodeThreads, 2) attend_sampled_lists(const __grid_constant__ SampledArgs<T> args) {
  extern __shared__ __align__(256) unsigned char rings[];  // one a warp
  __shared__ Shared<T, kHeadDim> shared;
  const std::int32_t kv_len = args.decode.kv_len(blockIdx.z);  // the host's, as all numbers of the batch are
  const std::int32_t request = args.request(blockIdx.z);
  wait_for_previous();
  if (!args.decode.lengths.contains(kv_len)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) args.report.guard_hits(blockIdx.z, blockIdx.y) = 0;
    return;
  }
  Member<T, kHeadDim, kHalves>(args, shared, rings, kv_len, request).run();
}

// Blocks that attend to one list: a power of two, so that it divides a head's channels, of which the device runs those
// of all lists side by side.
int team_of(std::int64_t lists, std::int64_t blocks, int most) {
  int team = most;
  while (team > 1 && lists * team > blocks) team /= 2;
  return team;
}

// Whether this device runs code that knows clusters.
template <typename... Params>
bool knows_clusters(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel's attributes");
  return attributes.binaryVersion >= 90;
}

// Clusters of `team` blocks that run at once: fewer than blocks would allow, since a cluster needs neighbours.
template <typename... Params>
int resident_clusters(void (*kernel)(Params...), int team, std::size_t shared_bytes) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(team), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(team));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "asking for the occupancy of clusters");
  return clusters;
}

template <typename T, int kHeadDim, int kHalves>
void launch_sampled(const Exec& exec, const AttentionShape& shape, SampledArgs<T> args, int seqs) {
  const auto kernel = attend_sampled_lists<T, kHeadDim, kHalves>;
  constexpr std::size_t kSharedBytes = std::size_t{kDecodeWarps} * kRowRingBytes<kHeadDim>;
  static const int resident = resident_blocks(kernel, static_cast<int>(kDecodeThreads), kSharedBytes) *
                              device_info(DeviceKind::kCuda).multiprocessors;
  // Of teams of every size, 2, 4, ...
  static const auto clusters = [&] {
    std::array<int, std::countr_zero(unsigned{kMaxTeam})> clusters{};  // none of more than kLargestCluster
    if (!knows_clusters(kernel)) return clusters;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "allowing large clusters");
    for (int i = 0; 2 << i <= kLargestCluster; ++i) {
      clusters[static_cast<std::size_t>(i)] = resident_clusters(kernel, 2 << i, kSharedBytes);
    }
    return clusters;
  }();
  const std::int64_t lists = std::int64_t{seqs} * shape.kv_heads;
  // Short lists have no work for more blocks than a cluster has.
  constexpr int kLongContext = 8192;
  const int most = args.list.index.shape(2) < kLongContext ? kLargestCluster : kMaxTeam;
  const int team = team_of(lists, std::min<std::int64_t>(resident, args.scratch.parts.shape(0)), most);
  args.clusters = team > 1 && clusters[std::countr_zero(static_cast<unsigned>(team)) - 1] >= lists;
  // Blocks that meet at counters must all run at once. Where kernels overlap they do: the one before ends without them,
  // and the next one begins when they have all begun. Elsewhere the launch asks for it.
  const bool cooperative = team > 1 && !args.clusters && !launches_can_overlap();
  launch("attend_sampled_lists", kernel,
         {.grid = dim3(static_cast<unsigned>(team), static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(seqs)),
          .block = dim3(kDecodeThreads),
          .shared_bytes = kSharedBytes,
          .overlap = !cooperative,
          .cluster = dim3(args.clusters ? static_cast<unsigned>(team) : 1U),
          .cooperative = cooperative},
         exec.stream, args);
}

}  // namespace

void attend_sampled(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                    const Batch& batch, const SampleRule& rule, DenseLimit dense, const Selection& list,
                    const SampleReport& report, const SampledScratch& scratch, const TensorRef& out,
                    TensorView<float, 2> lse, const KeptCounters& counters) {
  check_attention_shape(shape);
  if (batch.seqs == 0) return;
  dispatch_16bit(kv.k.dtype, "attending to a sample on CUDA", [&](auto element) {
    using T = decltype(element);
    const SampledArgs<T> args{.decode = decode_args<T>(shape, q, kv, batch, {.above = dense.tokens}, 1, {}, out, lse),
                              .request = batch.request,
                              .rule = rule,
                              .list = list,
                              .report = report,
                              .scratch = scratch,
                              .counters = counters};
    const bool few = shape.group() <= 8;
    if (shape.head_dim == 128) {
      few ? launch_sampled<T, 128, 1>(exec, shape, args, batch.seqs)
          : launch_sampled<T, 128, 2>(exec, shape, args, batch.seqs);
    } else {
      few ? launch_sampled<T, 64, 1>(exec, shape, args, batch.seqs)
          : launch_sampled<T, 64, 2>(exec, shape, args, batch.seqs);
    }
  });
}

}  // namespace vesper::cuda
