// Parts of a sampled list: what a block attended to in one go, from its warps' rings to device memory, and there joined
// with the list's others, in order.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/attend_rows.cuh"
#include "attention/attend_sampled.h"

namespace vesper::cuda {

inline constexpr int kMarks = 1152;  // static tokens at even distances that are kept in shared memory, for searches
// Parts of a list, each in its own region of the warps' rings while they are joined.
inline constexpr int kStatic = 0;
inline constexpr int kTail = 1;

template <typename T>
struct SampledArgs {
  DecodeArgs<T> decode;
  TensorView<const std::int32_t, 1> request;
  SampleRule rule;
  Selection list;
  SampleReport report;
  SampledScratch scratch;
  KeptCounters counters;
  int lists = 0;
  int kv_heads = 0;
};

template <typename T, int kHeadDim>
struct SampledShared {
  static constexpr int kStride = kHeadDim + 8;  // spreads the rows of a fragment over the banks
  std::int32_t marks[kMarks];                   // residual tokens before every stride-th static one
  alignas(16) T high[kHeads][kStride];          // o = high + low
  alignas(16) T low[kHeads][kStride];
  float maxima[kDecodeWarps][2][kHeads];
  float sums[kDecodeWarps][2][kHeads];
  float squares[kDecodeWarps][2][kHeads];  // over the pilot: of w^2, and of w^2 |v|^2
  float norms[kDecodeWarps];               // largest |v|^2 of the pilot
  // Of heads; those of rows that are no heads let these weigh nothing.
  float lse[kHeads];           // log2 of D
  float out_squared[kHeads];   // |o|^2
  float out_inverse[kHeads];   // 1 / |o|
  std::int32_t drawn[kHeads];  // that a head asks for
  float bound[kHeads];         // no draw of the pilot has a larger share, times epsilon
  std::int32_t found[kDecodeWarps];
  std::int32_t item;
};

__device__ inline float sum_lanes(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ inline float max_lanes(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Sums of w v over parts of this lane's own channels of a head, and of w, relative to a largest score. A lane knows
// what a part weighs, so that no part's channels wait for those before.
template <int kHeadDim>
struct HeadSums {
  static constexpr int kOwn = kHeadDim / static_cast<int>(kWarpThreads);
  float max = -1e30F;  // below every score, and no infinity: parts of blocks without keys have -inf
  float sum = 0.0F;
  float out[kOwn] = {};

  // Makes the sums relative to no less than `score`.
  __device__ void raise_to(float score) {
    const float larger = fmaxf(max, score);
    const float shrink = exp2_approx(max - larger);
    max = larger;
    sum *= shrink;
#pragma unroll
    for (float& channel : out) channel *= shrink;
  }
  __device__ void add(float factor, const float (&part)[kOwn]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) out[i] = fmaf(factor, part[i], out[i]);
  }
};
template <int kOwn>
__device__ void read_own(float (&to)[kOwn], const float* from) {
  static_assert(kOwn == 4 || kOwn == 2);
  if constexpr (kOwn == 4) {
    const float4 read = __ldcg(reinterpret_cast<const float4*>(from) + this_lane());
    to[0] = read.x;
    to[1] = read.y;
    to[2] = read.z;
    to[3] = read.w;
  } else {
    const float2 read = __ldcg(reinterpret_cast<const float2*>(from) + this_lane());
    to[0] = read.x;
    to[1] = read.y;
  }
}
template <int kOwn>
__device__ void write_own(float* to, const float (&from)[kOwn]) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i) to[this_lane() * kOwn + i] = from[i];
}
// Static part and a tail each of whose draws stands for `each`.
template <int kHeadDim>
struct JoinedHead {
  using Sums = HeadSums<kHeadDim>;
  float fixed_factor, tail_factor;  // to weights over D
  float out[Sums::kOwn];
  float lse;  // log2 of D

  __device__ JoinedHead(const Sums& fixed, const Sums& tail, float each) {
    const float each_log2 = log2f(each);
    const float larger = fmaxf(fixed.max, tail.max + each_log2);
    fixed_factor = exp2_approx(fixed.max - larger);
    tail_factor = exp2_approx(tail.max - larger);
    const float sum = fmaf(each * tail_factor, tail.sum, fixed_factor * fixed.sum);
    lse = larger + log2f(sum);
    fixed_factor /= sum;
    tail_factor /= sum;
#pragma unroll
    for (int i = 0; i < Sums::kOwn; ++i) out[i] = fmaf(each * tail_factor, tail.out[i], fixed_factor * fixed.out[i]);
  }
};

template <typename T, int kHeadDim, int kHalves>
class SampledParts {
 public:
  using Sums = HeadSums<kHeadDim>;

  __device__ SampledParts(const SampledArgs<T>& args, SampledShared<T, kHeadDim>& shared, unsigned char* rings,
                          int list)
      : args_(args), shared_(shared), rings_(rings), list_(list) {}

  // --- from rings to a part ---

  // Leaves a warp's sums in a region of its ring, for publish() behind a barrier.
  __device__ __forceinline__ void park(const RunningRows<kHeadDim, kHalves>& running, int region) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      park_rows(running.out, half, region);
      const float sum = row_sum(running.sum[half]);
      if (this_lane() % 4 != 0) continue;
      shared_.maxima[this_warp()][region][this_lane() / 4 + 8 * half] = running.max[half];
      shared_.sums[this_warp()][region][this_lane() / 4 + 8 * half] = sum;
    }
  }
  __device__ __forceinline__ void park_rows(const float (&out)[kHeadDim / 8][4], int half, int region) const {
    float* to =
        parked(this_warp(), region) + (this_lane() / 4 + 8 * half) * kRowMergeStride<kHeadDim> + 2 * (this_lane() % 4);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(to + 8 * n) = {out[n][2 * half], out[n][2 * half + 1]};
    }
  }
  // The list's part `part` from the warps' rows of a region, from `first_row` on, relative to the region's largest
  // scores; `squared`: to their squares, and without sums.
  __device__ __forceinline__ void publish(int region, int first_row, int part, bool squared) const {
    const int elements = args_.decode.group * kHeadDim;
    float* to = &args_.scratch.parts(list_, part, 0, 0);
    auto* const sums = reinterpret_cast<float4*>(&args_.scratch.part_sums(list_, part, 0, 0));
    static_assert(kPartSums == 4);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < elements; i += static_cast<int>(kDecodeThreads)) {
      const int h = i / kHeadDim;
      const float max = largest_of(region, h);
      float sum = 0.0F;
      float out = 0.0F;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        float factor = factor_of(w, region, h, max);
        if (squared) factor *= factor;
        sum = fmaf(factor, shared_.sums[w][region][h], sum);
        out = fmaf(factor, parked(w, region)[(first_row + h) * kRowMergeStride<kHeadDim> + i % kHeadDim], out);
      }
      to[i] = out;
      if (i % kHeadDim == 0 && !squared) sums[h] = {max, sum, 0.0F, 0.0F};
    }
  }
  // Beside the part's maximum and sum: the pilot's sums of w^2 and w^2 |v|^2, and with the static part's its largest
  // |v|^2. By the threads that wrote those.
  __device__ void publish_pilot_sums(int static_part, int pilot_part) const {
#pragma unroll 1
    for (int h = 0; h < args_.decode.group; ++h) {
      if (h * kHeadDim % static_cast<int>(kDecodeThreads) != static_cast<int>(threadIdx.x)) continue;
      const float max = largest_of(kTail, h);
      float squares = 0.0F;
      float spread = 0.0F;
      float norm = 0.0F;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float factor = factor_of(w, kTail, h, max);
        squares = fmaf(factor * factor, shared_.squares[w][0][h], squares);
        spread = fmaf(factor * factor, shared_.squares[w][1][h], spread);
        norm = fmaxf(norm, shared_.norms[w]);
      }
      args_.scratch.part_sums(list_, pilot_part, h, 2) = squares;
      args_.scratch.part_sums(list_, pilot_part, h, 3) = spread;
      args_.scratch.part_sums(list_, static_part, h, 2) = norm;
    }
  }

  // --- joining; a warp takes a head, a lane the same channels every time ---

  [[nodiscard]] __device__ Sums total_of(int which, int h) const {
    Sums total;
    const float2 sums = __ldcg(reinterpret_cast<const float2*>(&args_.scratch.total_sums(list_, which, h, 0)));
    total.max = sums.x;
    total.sum = sums.y;
    read_own(total.out, &args_.scratch.totals(list_, which, h, 0));
    return total;
  }
  __device__ void set_total(int which, int h, const Sums& total) const {
    write_own(&args_.scratch.totals(list_, which, h, 0), total.out);
    if (this_lane() != 0) return;
    args_.scratch.total_sums(list_, which, h, 0) = total.max;
    args_.scratch.total_sums(list_, which, h, 1) = total.sum;
  }
  // So many parts are on their way at once, whose time is that of one.
  static constexpr int kAtOnce = 8;
  static_assert(kMostParts % kAtOnce == 0);
  // Behind a barrier, since what parts weigh lies in the warp's ring.
  __device__ void add_parts(Sums& total, int parts, int h) const {
    constexpr int kLanes = static_cast<int>(kWarpThreads);
    auto* const factors = reinterpret_cast<float*>(rings_ + this_warp() * kRowRingBytes<kHeadDim>);
    float2 own[kMostParts / kLanes];
    float larger = -INFINITY;
#pragma unroll
    for (int i = 0; i < kMostParts / kLanes; ++i) {
      const int part = this_lane() + i * kLanes;
      own[i] = part < parts ? __ldcg(reinterpret_cast<const float2*>(&args_.scratch.part_sums(list_, part, h, 0)))
                            : float2{-INFINITY, 0.0F};
      larger = fmaxf(larger, own[i].x);
    }
    total.raise_to(max_lanes(larger));
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kMostParts / kLanes; ++i) {
      const float factor = exp2_approx(own[i].x - total.max);
      sum = fmaf(factor, own[i].y, sum);
      factors[this_lane() + i * kLanes] = factor;
    }
    total.sum += sum_lanes(sum);
    __syncwarp();
#pragma unroll 1
    for (int part = 0; part < parts; part += kAtOnce) {
      float out[kAtOnce][Sums::kOwn];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) read_own(out[i], &args_.scratch.parts(list_, min(part + i, parts - 1), h, 0));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) total.add(factors[part + i], out[i]);  // which is 0 behind the last
    }
    __syncwarp();
  }
  __device__ void add_to_tail(int parts) const {
#pragma unroll 1
    for (int h = this_warp(); h < args_.decode.group; h += kDecodeWarps) {
      Sums tail = total_of(kTail, h);
      __syncwarp();
      add_parts(tail, parts, h);
      set_total(kTail, h, tail);
    }
    __syncthreads();
  }

 private:
  __device__ float* parked(int warp, int region) const {
    static_assert(2 * kHeads * kRowMergeStride<kHeadDim> * 4 <= kRowRingBytes<kHeadDim>);
    return reinterpret_cast<float*>(rings_ + warp * kRowRingBytes<kHeadDim>) +
           region * kHeads * kRowMergeStride<kHeadDim>;
  }
  // -inf only where this block has no piece.
  __device__ float largest_of(int region, int h) const {
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) max = fmaxf(max, shared_.maxima[w][region][h]);
    return max;
  }
  // What warp w's sums weigh beside the largest.
  __device__ float factor_of(int w, int region, int h, float max) const {
    return exp2_approx(shared_.maxima[w][region][h] - (max == -INFINITY ? 0.0F : max));
  }

  const SampledArgs<T>& args_;
  SampledShared<T, kHeadDim>& shared_;
  unsigned char* const rings_;
  const int list_;
};

}  // namespace vesper::cuda
