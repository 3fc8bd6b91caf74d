// One list of sampled attention as a block of four warps sees it: its draws, and attention to pieces of 16 of its
// tokens.
//
// |v - o|^2 = |v|^2 - 2 v . o + |o|^2: v . o is a tensor-core product like the scores, with o as the sum of two 16-bit
//   numbers (2^-17 of it is lost in bf16). A draw's share is its largest w max(1, |v - o| / |o|) / epsilon over the
//   group's heads; it is beyond the tolerance where (n_rest / drawn) share > 1, whatever `drawn` becomes.
//   |v - o| <= |v| + |o| mostly shows that it is not, without the product.
// The pilot's moments need o, which is known when its keys have been read: of w^2 |v - o|^2 the sums of w^2, w^2 v and
//   w^2 |v|^2 are taken with the keys, and the pilot is looked at again only where its largest weight and value do not
//   show that no draw of it is beyond the tolerance.
// Sums over pieces are fp32, a few a lane; over lanes and warps in a fixed order.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/gather_piece.cuh"
#include "attention/sampled_parts.cuh"

namespace vesper::cuda {

// Within 2^-21 relative.
__device__ inline float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Draws [first, end).
struct Draws {
  std::int32_t first, end;
  __device__ int count() const { return max(0, end - first); }
  __device__ int pieces() const { return (count() + kPiece - 1) / kPiece; }
  __device__ Draws piece(int i) const { return {first + i * kPiece, min(end, first + (i + 1) * kPiece)}; }
  // That of row lane % 16 of a piece, the last one for rows behind it.
  __device__ std::int32_t of_lane() const { return min(first + this_lane() % kPiece, end - 1); }
};

template <typename T, int kHeadDim, int kHalves>
class SampledList {
 public:
  // `fixed`: tokens of the static part. `meanwhile` runs while the list is on its way, in front of a barrier.
  template <typename Meanwhile>
  __device__ __forceinline__ SampledList(const SampledArgs<T>& args, SampledShared<T, kHeadDim>& shared,
                                         unsigned char* rings, int list, std::int32_t fixed, const Meanwhile& meanwhile)
      : args_(args),
        shared_(shared),
        parts_(args, shared, rings, list),
        g_(list % args.kv_heads),
        s_(list / args.kv_heads),
        inverse_epsilon_(1.0F / args.rule.epsilon),
        shares_(&args.scratch.shares(list, 0)),
        ring_(shared_address(rings) + this_warp() * kRowRingBytes<kHeadDim>),
        kv_len_(args.decode.kv_len(s_)),
        index_(&args.list.index(s_, g_, 0)),
        static_(fixed),
        rest_(kv_len_ - static_),
        mark_stride_((static_ + kMarks - 1) / kMarks),
        order_(rest_, {.seed = args.rule.seed,
                       .request = static_cast<std::uint32_t>(args.request(s_)),
                       .step = static_cast<std::uint32_t>(kv_len_ - 1),
                       .layer = static_cast<std::uint32_t>(args.rule.layer),
                       .kv_head = static_cast<std::uint32_t>(g_)}) {
    load_queries();
    set_marks(meanwhile);
  }

  [[nodiscard]] __device__ int sequence() const { return s_; }
  [[nodiscard]] __device__ int kv_head() const { return g_; }
  [[nodiscard]] __device__ std::int32_t visible() const { return kv_len_; }
  [[nodiscard]] __device__ std::int32_t fixed() const { return static_; }
  [[nodiscard]] __device__ std::int32_t rest() const { return rest_; }
  [[nodiscard]] __device__ std::int32_t pilot() const {
    return min(max(2, tokens_of(args_.rule.pilot, kv_len_)), rest_);
  }
  [[nodiscard]] __device__ const SampledParts<T, kHeadDim, kHalves>& parts() const { return parts_; }
  // What a draw stands for where so many are drawn.
  [[nodiscard]] __device__ float each_of(std::int32_t drawn) const {
    return drawn == 0 ? 1.0F : static_cast<float>(rest_) / static_cast<float>(drawn);
  }

  // Part `rank` of the team's: pieces of the static part and then of the pilot, dealt out to the team's warps in turn.
  __device__ __forceinline__ void attend_static_and_pilot(int rank) {
    const int team = args_.scratch.cuts.team;
    const Draws pilot_draws{0, pilot()};
    const int static_pieces = (static_ + kPiece - 1) / kPiece;
    auto fixed = nothing_yet_in_rows<kHeadDim, kHalves>();
    auto tail = nothing_yet_in_rows<kHeadDim, kHalves>();
    SquaredRows<kHeadDim, kHalves> squared;
    float largest = 0.0F;
    const auto keys_of = [&](int piece) {
      return piece < static_pieces ? min(kPiece, static_ - piece * kPiece)
                                   : pilot_draws.piece(piece - static_pieces).count();
    };
    const auto token_of = [&](int piece) {
      if (piece < static_pieces) return static_token(min(piece * kPiece + this_lane() % kPiece, static_ - 1));
      return join(pilot_draws.piece(piece - static_pieces));
    };
    for_each_piece(rank * kDecodeWarps + this_warp(), team * kDecodeWarps, static_pieces + pilot_draws.pieces(),
                   keys_of, token_of, [&](int piece, int keys, unsigned slot) {
                     float scores[2][4] = {};
                     score_into_rows<T, kHeadDim>(scores, q_, slot);
                     if (keys < kPiece) hide_row_keys_from(keys, scores);
                     if (piece < static_pieces) {
                       take_into_rows<T, kHeadDim, kHalves>(fixed, scores, slot, args_.decode.scale_log2);
                     } else {
                       float norms[4];
                       square_values(norms, slot);
                       largest = fmaxf(largest, fmaxf(fmaxf(norms[0], norms[1]), fmaxf(norms[2], norms[3])));
                       take_squares_into_rows<T, kHeadDim, kHalves>(tail, squared, scores, norms, slot,
                                                                    args_.decode.scale_log2);
                     }
                   });
    parts_.park(fixed, kStatic);
    parts_.park(tail, kTail);
    largest = row_max(largest);
    if (this_lane() == 0) shared_.norms[this_warp()] = largest;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const float sums[2] = {row_sum(squared.sum[half]), row_sum(squared.spread[half])};
      if (this_lane() % 4 != 0) continue;
      shared_.squares[this_warp()][0][this_lane() / 4 + 8 * half] = sums[0];
      shared_.squares[this_warp()][1][this_lane() / 4 + 8 * half] = sums[1];
    }
    if constexpr (kHalves == 1) parts_.park_rows(tail.out, 1, kTail);
    __syncthreads();
    parts_.publish(kStatic, 0, rank, false);
    parts_.publish(kTail, 0, team + rank, false);
    parts_.publish_pilot_sums(rank, team + rank);
    if constexpr (kHalves == 1) {
      parts_.publish(kTail, 8, 2 * team + rank, true);
    } else {
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) parts_.park_rows(squared.out, half, kTail);
      __syncthreads();
      parts_.publish(kTail, 0, 2 * team + rank, true);
    }
  }

  // Draws join the list and, where `part` is one, become that part of it. Where `guarded`, their shares are kept, and
  // those of this lane that are beyond the tolerance at `each` counted.
  __device__ __forceinline__ std::int32_t attend_draws(const Draws& draws, int part, bool guarded, float each) {
    auto tail = nothing_yet_in_rows<kHeadDim, kHalves>();
    std::int32_t beyond = 0;
    for_each_piece(
        this_warp(), kDecodeWarps, draws.pieces(), [&](int piece) { return draws.piece(piece).count(); },
        [&](int piece) { return join(draws.piece(piece)); },
        [&](int piece, int keys, unsigned slot) {
          float scores[2][4] = {};
          score_into_rows<T, kHeadDim>(scores, q_, slot);
          if (keys < kPiece) hide_row_keys_from(keys, scores);
          if (guarded) beyond += guard(scores, slot, draws.piece(piece), each);
          if (part >= 0) {
            take_into_rows<T, kHeadDim, kHalves>(tail, scores, slot, args_.decode.scale_log2);
          }
        });
    if (part >= 0) parts_.park(tail, kTail);
    __syncthreads();
    if (part >= 0) parts_.publish(kTail, 0, part, false);
    return beyond;
  }

  // How many of the draws, whose shares are kept, are beyond the tolerance at `each`: of a warp's share of them.
  [[nodiscard]] __device__ std::int32_t beyond_of(const Draws& draws, float each) const {
    std::int32_t beyond = 0;
    for (std::int32_t i = draws.first + static_cast<std::int32_t>(threadIdx.x); i < draws.end;
         i += static_cast<std::int32_t>(kDecodeThreads)) {
      beyond += each * __ldcg(shares_ + i) > 1.0F ? 1 : 0;
    }
    return static_cast<std::int32_t>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(beyond)));
  }

 private:
  // --- draws ---

  // `meanwhile` runs while entries are on their way.
  template <typename Meanwhile>
  __device__ __forceinline__ void set_marks(const Meanwhile& meanwhile) {
    constexpr int kOwn = kMarks / static_cast<int>(kDecodeThreads);
    static_assert(kOwn * kDecodeThreads == kMarks);
    std::int32_t entries[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = (static_cast<int>(threadIdx.x) + i * static_cast<int>(kDecodeThreads)) * mark_stride_;
      entries[i] = at < static_ ? index_[at] - at : 0;
    }
    meanwhile();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) shared_.marks[threadIdx.x + i * kDecodeThreads] = entries[i];
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

  // --- pieces ---

  // use(piece, keys, slot) for pieces begin, begin + step, ... below end. token_of(piece): of row lane % 16, or of the
  // last where there are fewer; called for two pieces at once, by half a warp each. A step of the loop finds the tokens
  // of one piece, the pages of the one before, copies the one before that, and uses the one that was copied two steps
  // ago: each is done in one place, since code that many warps run once costs more to fetch than to run.
  template <typename KeysOf, typename TokenOf, typename Use>
  __device__ __forceinline__ void for_each_piece(int begin, int step, int end, const KeysOf& keys_of,
                                                 const TokenOf& token_of, const Use& use) {
    constexpr int kCopyAhead = kRowSlots - 1;
    const DecodeArgs<T>& args = args_.decode;
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
            ((std::int64_t{page} * args_.kv_heads + g_) << args.page_shift) + (token & ((1 << args.page_shift) - 1));
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
                                   const T (&from)[kHeads][SampledShared<T, kHeadDim>::kStride]) {
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

  const SampledArgs<T>& args_;
  SampledShared<T, kHeadDim>& shared_;
  const SampledParts<T, kHeadDim, kHalves> parts_;
  const int g_;
  const int s_;
  const float inverse_epsilon_;
  float* const shares_;
  const unsigned ring_;
  const std::int32_t kv_len_;
  std::int32_t* const index_;
  const std::int32_t static_;
  const std::int32_t rest_;
  const int mark_stride_;
  const DrawOrder order_;
  unsigned q_[kHeadDim / 16][4] = {};
};

}  // namespace vesper::cuda
