// Attention over sampled lists on CUDA, in one launch: the tail is drawn, sized and attended to. Semantics and formulas
// in attention/sample_tail.h.
//
// Shapes: q, out [seqs, heads, head_dim]; K and V [pages, kv_heads, page_tokens, head_dim] in tile order
//   (kvcache/layout.h); lists [seqs, kv_heads, capacity] as in attention/selection.h.
// Mapping: as many blocks of four warps as run at once, which take parts of lists as they come to them:
//     0  static part and pilot of every list, cut into `team` parts; sums for both, and for the pilot's moments
//     1  the sample as sized; 2 as much again, where terms are beyond the tolerance; 3 the rest, where there still are
//   The block that ends the last part of a list's round joins the round's parts in order, decides on the next (after
//   round 0 from estimate and moments), begins it, and queues what is more than one part for whoever is idle. So long
//   lists do not keep a block each, and no block waits for another while there is work. Cuts and sums depend on a
//   list's own numbers and on how many lists there are, never on who comes first.
// Bytes: K and V of the listed tokens once; parts of head_dim floats a head.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "attention/attend_sampled.h"
#include "attention/last_block.cuh"
#include "attention/sampled_list.cuh"
#include "attention/sampled_queue.cuh"
#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {
namespace {

// unbiased_variance() of n numbers by the square of their sum: differences in fp64, quotients in fp32, which are
// several times as fast.
__device__ inline float variance(double squared_sum, double sum_of_squares, std::int32_t n) {
  const double deviations = fma(static_cast<double>(n), sum_of_squares, -squared_sum);
  return deviations < 0.0 ? 0.0F : static_cast<float>(deviations) / (static_cast<float>(n) * static_cast<float>(n - 1));
}

template <typename T, int kHeadDim, int kHalves>
class Worker {
 public:
  __device__ Worker(const SampledArgs<T>& args, SampledShared<T, kHeadDim>& shared, unsigned char* rings)
      : args_(args), shared_(shared), rings_(rings), queue_(args, shared.item) {
    // Rows that are no heads weigh nothing.
    const int rest = (kHeads - args.decode.group) * kHeadDim;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rest; i += static_cast<int>(kDecodeThreads)) {
      const int h = args.decode.group + i / kHeadDim;
      shared.high[h][i % kHeadDim] = shared.low[h][i % kHeadDim] = T{};
      shared.lse[h] = INFINITY;
      shared.out_squared[h] = shared.out_inverse[h] = 1.0F;
    }
  }

  __device__ __forceinline__ void run() {
    const int team = args_.scratch.cuts.team;
    const int openings = args_.lists * team;
    for (int item = queue_.next();; item = queue_.next()) {
      const bool opens = item < openings;
      QueuedPart queued = {};
      if (opens) {
        queued.list = item / team;
        queued.part = item % team;
        if (passes_over(queued)) continue;
        queued.fixed = args_.list.tail_begin(queued.list / args_.kv_heads, queued.list % args_.kv_heads);
      } else if (!queue_.take(item - openings, queued)) {
        break;
      }
      List work(args_, shared_, rings_, queued.list, queued.fixed, [&] {
        if (!opens) load_estimate(queued.list);
      });
      Round round = queued.round();
      if (opens) {
        work.attend_static_and_pilot(queued.part);
        if (!is_last(queued.list, team)) continue;
        round = size(work, queued.list);
        queue_.queue_others(queued.list, queued.fixed, round);
        queued.part = 0;
      }
      draw(work, queued.list, round, queued.part);
    }
    queue_.leave();
  }

 private:
  using List = SampledList<T, kHeadDim, kHalves>;
  using Sums = HeadSums<kHeadDim>;
  static constexpr int kOwn = Sums::kOwn;

  // --- a list ---

  // Whether a list's sequence attends dense.
  __device__ bool passes_over(const QueuedPart& opening) {
    const int s = opening.list / args_.kv_heads;
    if (args_.decode.lengths.contains(args_.decode.kv_len(s))) return false;
    if (opening.part == 0) {
      if (threadIdx.x == 0) args_.report.guard_hits(s, opening.list % args_.kv_heads) = 0;
      queue_.end_list();
    }
    return true;
  }

  // Part `part` of a round of draws, and what follows as long as this block ends the list's rounds.
  __device__ __forceinline__ void draw(List& work, int list, Round round, int part) {
    while (true) {
      const RoundCuts cuts(args_.scratch.cuts, round);
      const bool guarded = round.number < kLastRound && round.to < work.rest();
      const bool takes = part < cuts.parts;
      const std::int32_t first = takes ? round.from + part * cuts.draws : (part - cuts.parts) * cuts.draws;
      const Draws draws{first, min(first + cuts.draws, takes ? round.to : round.look)};
      const std::int32_t beyond = static_cast<std::int32_t>(__reduce_add_sync(
          kAllLanes,
          static_cast<unsigned>(work.attend_draws(draws, takes ? part : -1, guarded, work.each_of(round.to)))));
      if (cuts.all() > 1) {
        queue_.count_beyond(list, beyond);
        if (!is_last(list, cuts.all())) return;
        round = queue_.read_round(list);
      } else {
        round.beyond = block_sum(beyond);  // behind barriers
      }
      round.hits += round.beyond;
      const bool grows = guarded && round.beyond + round.old > 0 && args_.rule.on_outlier == OnOutlier::kEscalate;
      if (!grows) return finish(work, round, cuts.parts);
      work.parts().add_to_tail(cuts.parts);
      round = {.number = round.number + 1,
               .from = round.to,
               .to = round.number == 1 ? doubled(round.to, work.rest()) : work.rest(),
               .look = 0,
               .begin = round.begin,
               .hits = round.hits,
               .old = 0,
               .beyond = 0};
      if (round.to < work.rest()) {
        round.old = block_sum(work.beyond_of({round.begin, round.from}, work.each_of(round.to)));
      }
      part = 0;
      queue_.queue_others(list, work.fixed(), round);
    }
  }
  // Of numbers of warps.
  __device__ std::int32_t block_sum(std::int32_t of_warp) const {
    if (this_lane() == 0) shared_.found[this_warp()] = of_warp;
    __syncthreads();
    std::int32_t sum = 0;
#pragma unroll
    for (const std::int32_t found : shared_.found) sum += found;
    __syncthreads();
    return sum;
  }
  // Whether all of a round's parts are done, whose numbers this block then sees.
  __device__ bool is_last(int list, int parts) const {
    if (parts > 1) return is_last_block(&args_.scratch.tickets(list), parts);
    __syncthreads();
    return true;
  }

  // Output and report, with the tail's last `parts`.
  __device__ __forceinline__ void finish(const List& work, const Round& round, int parts) {
    const std::int32_t drawn = round.to;
    const float each = work.each_of(drawn);
    const int first_head = work.kv_head() * args_.decode.group;
#pragma unroll 1
    for (int h = this_warp(); h < args_.decode.group; h += kDecodeWarps) {
      const Sums fixed = work.parts().total_of(kStatic, h);
      Sums tail = work.parts().total_of(kTail, h);
      work.parts().add_parts(tail, parts, h);
      const JoinedHead<kHeadDim> joined(fixed, tail, each);
      T* out = &args_.decode.out(work.sequence(), first_head + h, this_lane() * kOwn);
#pragma unroll
      for (int i = 0; i < kOwn; i += 2) {
        *reinterpret_cast<unsigned*>(out + i) = narrow_pair<T>(joined.out[i], joined.out[i + 1]);
      }
      if (this_lane() == 0 && args_.decode.lse.data() != nullptr) {
        args_.decode.lse(work.sequence(), first_head + h) = joined.lse * kLn2;
      }
    }
    if (threadIdx.x == kDecodeThreads - 1) report(work, drawn, round.hits);
    queue_.end_list();
  }
  // By one thread. Counts are integers, so the order in which lists add to them does not show.
  __device__ void report(const List& work, std::int32_t drawn, std::int32_t hits) const {
    const int s = work.sequence();
    const int g = work.kv_head();
    args_.report.guard_hits(s, g) = hits;
    args_.list.count(s, g) = work.fixed() + drawn;
    args_.list.tail_log_weight(s, g) =
        drawn == 0 ? 0.0F : log1pf(static_cast<float>(work.rest() - drawn) / static_cast<float>(drawn));
    const KeptCounters& counters = args_.counters;
    if (counters.lists.data() == nullptr) return;
    const auto add = [&](const TensorView<std::int64_t, 1>& counter, std::int32_t number) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&counter(g)), static_cast<unsigned long long>(number));
    };
    add(counters.kept_tokens, work.fixed() + drawn);
    add(counters.visible_tokens, work.visible());
    add(counters.sampled_tokens, drawn);
    add(counters.lists, 1);
    if (counters.guard_hits.data() != nullptr) add(counters.guard_hits, hits);
  }

  // --- size ---

  // From round 0's parts: totals and estimate, here and for other blocks, and round 1; the last, without draws, where
  // the pilot is the whole rest.
  __device__ __forceinline__ Round size(const List& work, int list) {
    const std::int32_t pilot = work.pilot();
    const float each = work.each_of(pilot);
#pragma unroll 1
    for (int h = this_warp(); h < args_.decode.group; h += kDecodeWarps) size_head(work, list, h, pilot, each);
    __syncthreads();
    if (pilot == work.rest()) {
      return {
          .number = kLastRound, .from = pilot, .to = pilot, .look = 0, .begin = 0, .hits = 0, .old = 0, .beyond = 0};
    }
    std::int32_t drawn = pilot;
    float bound = 0.0F;
#pragma unroll 1
    for (int h = 0; h < args_.decode.group; ++h) {
      drawn = max(drawn, shared_.drawn[h]);
      bound = fmaxf(bound, shared_.bound[h]);
    }
    const bool shows = work.each_of(drawn) * bound <= args_.rule.epsilon;
    return {.number = 1,
            .from = pilot,
            .to = drawn,
            .look = shows || drawn == work.rest() ? 0 : pilot,
            .begin = shows ? pilot : 0,
            .hits = 0,
            .old = 0,
            .beyond = 0};
  }
  __device__ __forceinline__ void size_head(const List& work, int list, int h, std::int32_t pilot, float each) {
    constexpr int kAtOnce = 8;
    const int team = args_.scratch.cuts.team;
    Sums fixed;
    Sums tail;
    // A lane has a part of the team's.
    float4 of_static = {-INFINITY, 0.0F, 0.0F, 0.0F};
    float4 of_tail = of_static;
    if (this_lane() < team) {
      const auto sums_of = [&](int part) {
        return __ldcg(reinterpret_cast<const float4*>(&args_.scratch.part_sums(list, part, h, 0)));
      };
      of_static = sums_of(this_lane());
      of_tail = sums_of(team + this_lane());
    }
    fixed.raise_to(max_lanes(of_static.x));
    tail.raise_to(max_lanes(of_tail.x));
    const float static_factor = exp2_approx(of_static.x - fixed.max);
    const float factor = exp2_approx(of_tail.x - tail.max);
    fixed.sum = sum_lanes(static_factor * of_static.y);
    tail.sum = sum_lanes(factor * of_tail.y);
    float squares = sum_lanes(factor * factor * of_tail.z);
    const float spread = sum_lanes(factor * factor * of_tail.w);
    const float norm = max_lanes(of_static.z);
    Sums squared;
#pragma unroll 1
    for (int first = 0; first < team; first += kAtOnce) {
      float out[kAtOnce][3][kOwn];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = min(first + i, team - 1);
#pragma unroll
        for (int kind = 0; kind < 3; ++kind) read_own(out[i][kind], &args_.scratch.parts(list, kind * team + r, h, 0));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {  // behind the last of the team factors are 0
        const float tail_factor = __shfl_sync(kAllLanes, factor, first + i);
        fixed.add(__shfl_sync(kAllLanes, static_factor, first + i), out[i][kStatic]);
        tail.add(tail_factor, out[i][kTail]);
        squared.add(tail_factor * tail_factor, out[i][2]);
      }
    }
    work.parts().set_total(kStatic, h, fixed);
    work.parts().set_total(kTail, h, tail);
    if (pilot == work.rest()) return;

    const JoinedHead<kHeadDim> joined(fixed, tail, each);
    const float by = joined.tail_factor;
    float out_squared = 0.0F;
    float pilot_squared = 0.0F;
    float product = 0.0F;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float out = joined.out[i];
      const float apart = by * fmaf(-out, tail.sum, tail.out[i]);  // the pilot's sum of w (v - o)
      out_squared = fmaf(out, out, out_squared);
      pilot_squared = fmaf(apart, apart, pilot_squared);
      product = fmaf(out, by * by * squared.out[i], product);
    }
    out_squared = sum_lanes(out_squared);
    pilot_squared = sum_lanes(pilot_squared);
    product = sum_lanes(product);
    write_own(&args_.scratch.estimates(list, h, 0), joined.out);
    set_estimate(h, joined.out, joined.lse, out_squared);
    if (this_lane() != 0) return;
    args_.scratch.estimate_sums(list, h, 0) = joined.lse;
    args_.scratch.estimate_sums(list, h, 1) = out_squared;

    const SampleRule& rule = args_.rule;
    const bool of_output = rule.verify == Verify::kOutput;
    const auto rest = static_cast<float>(work.rest());
    const auto once = static_cast<double>(by * tail.sum);
    squares *= by * by;
    float draws = draws_for(rule.z, rest, variance(once * once, static_cast<double>(squares), pilot), rule.epsilon);
    const float largest = exp2_approx(tail.max - joined.lse);
    float apart = 1.0F;
    if (of_output) {
      const float distances = fmaxf(0.0F, fmaf(by * by, spread, fmaf(out_squared, squares, -2.0F * product)));
      const float asked =
          draws_for(rule.z, rest, variance(static_cast<double>(pilot_squared), static_cast<double>(distances), pilot),
                    rule.epsilon * sqrtf(out_squared));
      draws = draws < asked || isnan(asked) ? asked : draws;
      apart = fmaxf(1.0F, fmaf(sqrtf(norm), 1.0F / sqrtf(out_squared), 1.0F));
    }
    shared_.drawn[h] = sample_tokens(rule.safety, draws, pilot, work.rest());
    shared_.bound[h] = isnan(largest * apart) ? INFINITY : largest * apart;
  }
  // What terms of draws are measured by. All lanes of a warp have a head.
  __device__ void set_estimate(int h, const float (&out)[kOwn], float lse, float out_squared) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int d = this_lane() * kOwn + i;
      shared_.high[h][d] = narrow<T>(out[i]);
      shared_.low[h][d] = narrow<T>(out[i] - widen(narrow<T>(out[i])));
    }
    if (this_lane() != 0) return;
    shared_.lse[h] = lse;
    shared_.out_squared[h] = out_squared;
    shared_.out_inverse[h] = 1.0F / sqrtf(out_squared);
  }
  // In front of a barrier.
  __device__ void load_estimate(int list) {
#pragma unroll 1
    for (int h = this_warp(); h < args_.decode.group; h += kDecodeWarps) {
      const float2 sums = __ldcg(reinterpret_cast<const float2*>(&args_.scratch.estimate_sums(list, h, 0)));
      float out[kOwn];
      read_own(out, &args_.scratch.estimates(list, h, 0));
      set_estimate(h, out, sums.x, sums.y);
    }
  }

  const SampledArgs<T>& args_;
  SampledShared<T, kHeadDim>& shared_;
  unsigned char* const rings_;
  SampledQueue<T> queue_;
};

template <typename T, int kHeadDim, int kHalves>
__global__ void __launch_bounds__(kDecodeThreads, 2) attend_sampled_lists(const __grid_constant__ SampledArgs<T> args) {
  extern __shared__ __align__(256) unsigned char rings[];  // one a warp
  __shared__ SampledShared<T, kHeadDim> shared;
  Worker<T, kHeadDim, kHalves> worker(args, shared, rings);
  wait_for_previous();
  worker.run();
}

template <typename T, int kHeadDim, int kHalves>
void launch_sampled(const Exec& exec, const SampledArgs<T>& args) {
  const auto kernel = attend_sampled_lists<T, kHeadDim, kHalves>;
  constexpr std::size_t kSharedBytes = std::size_t{kDecodeWarps} * kRowRingBytes<kHeadDim>;
  static const int resident =
      resident_blocks(kernel, static_cast<int>(kDecodeThreads), kSharedBytes) * multiprocessor_count();
  if (resident == 0) {
    fail({"attending to a sample with head_dim " + std::to_string(kHeadDim), "a GPU without room for one block",
          std::to_string(kSharedBytes / 1024) + " KiB of shared memory a block", "choose another attention"});
  }
  launch("attend_sampled_lists", kernel,
         {.grid = dim3(static_cast<unsigned>(resident)),
          .block = dim3(kDecodeThreads),
          .shared_bytes = kSharedBytes,
          .overlap = true},
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
                              .counters = counters,
                              .lists = batch.seqs * shape.kv_heads,
                              .kv_heads = shape.kv_heads};
    const bool few = shape.group() <= 8;
    if (shape.head_dim == 128) {
      few ? launch_sampled<T, 128, 1>(exec, args) : launch_sampled<T, 128, 2>(exec, args);
    } else {
      few ? launch_sampled<T, 64, 1>(exec, args) : launch_sampled<T, 64, 2>(exec, args);
    }
  });
}

}  // namespace vesper::cuda
