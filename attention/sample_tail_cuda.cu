// The random tail of sampled lists on CUDA: pilot, size, guard; semantics and formulas in attention/sample_tail.h.
//
// Shapes: q, out [seqs, heads, head_dim], lse [seqs, heads]; K and V [pages, kv_heads, page_tokens, head_dim] in tile
//   order (kvcache/layout.h).
// Mapping: grid (kv_heads, seqs), 512 threads a list.
//   Terms w_i of a token: head_dim / 8 lanes hold its key, 16 bytes each, and go through the group's heads; a warp
//   takes 2 tokens of 128 channels or 4 of 64.
//   Moments over the pilot, 128 tokens at a time: first the terms of all heads go to shared memory, then warp h sums
//   those of head h, and thread i sums the channels i, i + 512, ... of [heads, head_dim] of w_i (v_i - o).
//   Sums are fp64 in a fixed order: what the formulas ask for is a difference of sums of squares.
//   The guard deals the sampled tokens out to the warps and counts.
// Bytes: K and V of the pilot once for the moments; K of the sampled tokens once more for the guard, and V where the
//   output is verified; twice where the sample doubles.
#include <cmath>
#include <cstdint>
#include <string>

#include "attention/sample_tail.h"
#include "engine/core/dispatch.h"
#include "engine/core/error.h"
#include "engine/core/launch.cuh"
#include "engine/core/vector.cuh"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxGroup = 16;
static_assert(kMaxGroup <= kWarps, "a warp for each head");
constexpr int kChunk = 128;  // tokens

struct TailArgs {
  TensorView<const std::int32_t, 1> kv_len;
  TensorView<const std::int32_t, 1> request;
  SampleRule rule;
  Selection list;
  std::int32_t dense_tokens = 0;
};

// The residual of one list, and its tail as it grows.
struct Tail {
  std::int32_t* index;
  std::int32_t begin;
  std::int32_t rest;
  DrawKey key;

  __device__ Tail(const TailArgs& args, int s, int g, std::int32_t visible)
      : index(&args.list.index(s, g, 0)),
        begin(args.list.tail_begin(s, g)),
        rest(visible - begin),
        key{.seed = args.rule.seed,
            .request = static_cast<std::uint32_t>(args.request(s)),
            .step = static_cast<std::uint32_t>(visible - 1),
            .layer = static_cast<std::uint32_t>(args.rule.layer),
            .kv_head = static_cast<std::uint32_t>(g)} {}

  // Draws [from, to) join the list; other threads see them after a barrier.
  __device__ void append(std::int32_t from, std::int32_t to) const {
    for (std::int32_t i = from + static_cast<std::int32_t>(threadIdx.x); i < to; i += kThreads) {
      index[begin + i] = residual_token(residual_draw(i, rest, key), index, begin);
    }
  }
};

// One thread's word on how many are drawn.
__device__ void set_drawn(const TailArgs& args, int s, int g, const Tail& tail, std::int32_t drawn) {
  args.list.count(s, g) = tail.begin + drawn;
  args.list.tail_log_weight(s, g) = drawn == 0 ? 0.0F : static_cast<float>(log(static_cast<double>(tail.rest) / drawn));
}

__global__ void __launch_bounds__(kThreads) write_pilot(const __grid_constant__ TailArgs args) {
  const auto g = static_cast<int>(blockIdx.x);
  const auto s = static_cast<int>(blockIdx.y);
  const std::int32_t visible = args.kv_len(s);
  if (visible <= args.dense_tokens) return;
  const Tail tail(args, s, g, visible);
  const std::int32_t pilot = min(max(2, tokens_of(args.rule.pilot, visible)), tail.rest);
  tail.append(0, pilot);
  if (threadIdx.x == 0) set_drawn(args, s, g, tail, pilot);
}

template <typename T>
struct SizeArgs {
  TailArgs tail;
  TensorView<const T, 3> q;  // [seqs, heads, head_dim]
  TensorView<const T, 3> out;
  TensorView<const float, 2> lse;
  const T* k = nullptr;
  const T* v = nullptr;
  TensorView<const std::int32_t, 2> page_table;
  SampleReport report;
  int group = 0;
  int kv_heads = 0;
  int page_tokens = 0;
  float scale = 0.0F;
};

template <int kHeadDim>
struct Shared {
  alignas(16) float q[kMaxGroup][kHeadDim];
  alignas(16) float out[kMaxGroup][kHeadDim];
  float lse[kMaxGroup];
  float out_squared[kMaxGroup];
  float weight[kMaxGroup][kChunk];  // w_i
  std::int64_t tile[kChunk];        // of a token: where its tile begins in K and V
  int line[kChunk];                 // and its row in it
  double trace[kMaxGroup * kHeadDim / 32];
  std::int32_t drawn;
  std::int32_t heavy;
};

template <typename Number>
__device__ Number sum_of_lanes(Number value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0U, value, step);
  return value;
}

// A lane's part of a . b; `b` lies at a multiple of 16 bytes.
__device__ float dot(const float (&a)[kVectorWidth], const float* b) {
  const float4 low = *reinterpret_cast<const float4*>(b);
  const float4 high = *reinterpret_cast<const float4*>(b + 4);
  float sum = a[0] * low.x;
  sum = fmaf(a[1], low.y, sum);
  sum = fmaf(a[2], low.z, sum);
  sum = fmaf(a[3], low.w, sum);
  sum = fmaf(a[4], high.x, sum);
  sum = fmaf(a[5], high.y, sum);
  sum = fmaf(a[6], high.z, sum);
  return fmaf(a[7], high.w, sum);
}

// A lane's part of |a - b|^2.
__device__ float distance_squared(const float (&a)[kVectorWidth], const float* b) {
  float sum = 0.0F;
#pragma unroll
  for (int half = 0; half < kVectorWidth; half += 4) {
    const float4 four = *reinterpret_cast<const float4*>(b + half);
    sum = fmaf(a[half] - four.x, a[half] - four.x, sum);
    sum = fmaf(a[half + 1] - four.y, a[half + 1] - four.y, sum);
    sum = fmaf(a[half + 2] - four.z, a[half + 2] - four.z, sum);
    sum = fmaf(a[half + 3] - four.w, a[half + 3] - four.w, sum);
  }
  return sum;
}

template <typename T, int kHeadDim>
class Block {
 public:
  __device__ Block(const SizeArgs<T>& args, Shared<kHeadDim>& shared, const Tail& tail, int s, int g)
      : args_(args), shared_(shared), tail_(tail), s_(s), g_(g) {
    for (int i = thread_; i < args.group * kHeadDim; i += kThreads) {
      const int h = i / kHeadDim;
      const int d = i % kHeadDim;
      shared.q[h][d] = widen(args.q(s, g * args.group + h, d));
      shared.out[h][d] = widen(args.out(s, g * args.group + h, d));
    }
    if (thread_ < args.group) shared.lse[thread_] = args.lse(s, g * args.group + thread_);
    __syncthreads();
    if (warp_ < args.group) {
      float sum = 0.0F;
      for (int d = lane_; d < kHeadDim; d += 32) sum = fmaf(shared.out[warp_][d], shared.out[warp_][d], sum);
      sum = sum_of_lanes(sum, 32);
      if (lane_ == 0) shared.out_squared[warp_] = sum;
    }
    __syncthreads();
  }

  // The largest sample that a head of the group asks for.
  __device__ std::int32_t sized(std::int32_t pilot) {
    Sums weights;            // of head warp_, this lane's tokens
    Sums errors[kChannels];  // of this thread's channels, all tokens
    for (std::int32_t first = 0; first < pilot; first += kChunk) {
      const int tokens = min(kChunk, pilot - first);
      weigh_chunk(first, tokens);
      if (warp_ < args_.group) {
        for (int i = lane_; i < tokens; i += 32) weights.add(static_cast<double>(shared_.weight[warp_][i]));
      }
      if (of_output()) add_errors(errors, tokens);
      __syncthreads();  // before the next chunk takes the place of this one
    }
    if (of_output()) {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        const double trace = sum_of_lanes(unbiased_variance(errors[j].once, errors[j].squares, pilot), 32);
        const int channel = thread_ + j * kThreads;
        if (lane_ == 0 && channel < args_.group * kHeadDim) shared_.trace[channel / 32] = trace;
      }
    }
    if (thread_ == 0) shared_.drawn = pilot;
    __syncthreads();
    const double once = sum_of_lanes(weights.once, 32);
    const double squares = sum_of_lanes(weights.squares, 32);
    if (warp_ < args_.group && lane_ == 0) {
      ask(pilot, unbiased_variance(once, squares, pilot), rule().epsilon);
      if (of_output()) {
        double trace = 0.0;
        for (int i = 0; i < kHeadDim / 32; ++i) trace += shared_.trace[warp_ * (kHeadDim / 32) + i];
        ask(pilot, trace, static_cast<double>(rule().epsilon) * sqrt(static_cast<double>(shared_.out_squared[warp_])));
      }
    }
    __syncthreads();
    return shared_.drawn;
  }

  // Of draws [from, to), those with a term beyond the tolerance where `drawn` are drawn. In every thread.
  __device__ std::int32_t count_heavy(std::int32_t from, std::int32_t to, std::int32_t drawn) {
    if (thread_ == 0) shared_.heavy = 0;
    __syncthreads();
    const float each = static_cast<float>(static_cast<double>(tail_.rest) / drawn);
    const float epsilon = rule().epsilon;
    std::int32_t heavy = 0;
    for (std::int32_t first = from + warp_ * kTokens; first < to; first += kWarps * kTokens) {
      const std::int32_t i = min(first + lane_ / kLanes, to - 1);
      const Place place = place_of(i);
      float key[kVectorWidth];
      float value[kVectorWidth] = {};
      load_chunk(args_.k, place, key);
      if (of_output()) load_chunk(args_.v, place, value);
      bool beyond = false;
      for (int h = 0; h < args_.group; ++h) {
        const float term = each * weight(key, h);
        beyond |= term > epsilon;
        if (of_output()) {
          const float apart = sum_of_lanes(distance_squared(value, &shared_.out[h][channel_]), kLanes);
          beyond |= term * term * apart > epsilon * epsilon * shared_.out_squared[h];
        }
      }
      heavy += beyond && first + lane_ / kLanes < to && lane_ % kLanes == 0 ? 1 : 0;
    }
    if (heavy > 0) atomicAdd(&shared_.heavy, heavy);
    __syncthreads();
    const std::int32_t all = shared_.heavy;
    __syncthreads();
    return all;
  }

 private:
  static constexpr int kLanes = kHeadDim / kVectorWidth;  // that hold one row
  static constexpr int kTokens = 32 / kLanes;             // of a warp at a time
  static constexpr int kChannels = kMaxGroup * kHeadDim / kThreads;

  struct Place {
    std::int64_t tile;
    int line;
  };
  struct Sums {
    double once = 0.0;
    double squares = 0.0;
    __device__ void add(double x) {
      once += x;
      squares = fma(x, x, squares);
    }
  };

  __device__ const SampleRule& rule() const {
    return args_.tail.rule;
  }
  __device__ bool of_output() const {
    return rule().verify == Verify::kOutput;
  }

  // Of draw i.
  __device__ Place place_of(std::int32_t i) const {
    const std::int32_t token = tail_.index[tail_.begin + i];
    const std::int64_t page = args_.page_table(s_, token / args_.page_tokens);
    return {(page * args_.kv_heads + g_) * args_.page_tokens * kHeadDim, token % args_.page_tokens};
  }
  // This lane's channels of a row.
  __device__ void load_chunk(const T* tiles, const Place& place, float (&to)[kVectorWidth]) const {
    load_widened<kVectorWidth>(tiles + place.tile + tile_offset(place.line, channel_, kHeadDim), to);
  }
  // w_i of head h from this lane's part of the key; the same in all lanes of a row.
  __device__ float weight(const float (&key)[kVectorWidth], int h) const {
    const float product = sum_of_lanes(dot(key, &shared_.q[h][channel_]), kLanes);
    return expf(fmaf(product, args_.scale, -shared_.lse[h]));
  }

  // The terms and places of draws [first, first + tokens), into shared memory.
  __device__ void weigh_chunk(std::int32_t first, int tokens) {
    for (int begin = warp_ * kTokens; begin < tokens; begin += kWarps * kTokens) {
      const int i = begin + lane_ / kLanes;
      const Place place = place_of(first + min(i, tokens - 1));
      float key[kVectorWidth];
      load_chunk(args_.k, place, key);
      const bool writes = i < tokens && lane_ % kLanes == 0;
      for (int h = 0; h < args_.group; ++h) {
        const float term = weight(key, h);
        if (writes) shared_.weight[h][i] = term;
      }
      if (writes) {
        shared_.tile[i] = place.tile;
        shared_.line[i] = place.line;
      }
    }
    __syncthreads();
  }

  // Adds w_i (v_i - o) of the chunk's tokens, channel by channel.
  __device__ void add_errors(Sums (&errors)[kChannels], int tokens) const {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int channel = thread_ + j * kThreads;
      if (channel >= args_.group * kHeadDim) break;
      const int h = channel / kHeadDim;
      const int d = channel % kHeadDim;
      const float out = shared_.out[h][d];
#pragma unroll 4
      for (int i = 0; i < tokens; ++i) {
        const float value = widen(args_.v[shared_.tile[i] + tile_offset(shared_.line[i], d, kHeadDim)]);
        errors[j].add(static_cast<double>(shared_.weight[h][i] * (value - out)));
      }
    }
  }

  __device__ void ask(std::int32_t pilot, double variance, double tolerance) {
    const double draws = draws_for(rule().z, tail_.rest, variance, tolerance);
    atomicMax(&shared_.drawn, sample_tokens(static_cast<double>(rule().safety), draws, pilot, tail_.rest));
  }

  const SizeArgs<T>& args_;
  Shared<kHeadDim>& shared_;
  const Tail& tail_;
  const int s_, g_;
  const int thread_ = static_cast<int>(threadIdx.x);
  const int warp_ = thread_ / 32;
  const int lane_ = thread_ % 32;
  const int channel_ = lane_ % kLanes * kVectorWidth;  // of this lane where lanes hold rows
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) size_tail(const __grid_constant__ SizeArgs<T> args) {
  __shared__ Shared<kHeadDim> shared;
  const auto g = static_cast<int>(blockIdx.x);
  const auto s = static_cast<int>(blockIdx.y);
  const bool writes = threadIdx.x == 0;
  if (writes) args.report.guard_hits(s, g) = 0;
  const std::int32_t visible = args.tail.kv_len(s);
  if (visible <= args.tail.dense_tokens) return;
  const Tail tail(args.tail, s, g, visible);
  const std::int32_t pilot = args.tail.list.count(s, g) - tail.begin;
  if (pilot == tail.rest) return;

  Block<T, kHeadDim> block(args, shared, tail, s, g);
  std::int32_t drawn = block.sized(pilot);
  tail.append(pilot, drawn);
  __syncthreads();
  std::int32_t hits = 0;
  if (drawn < tail.rest) {
    hits = block.count_heavy(0, drawn, drawn);
    if (hits > 0 && args.tail.rule.on_outlier == OnOutlier::kEscalate) {
      const std::int32_t more = doubled(drawn, tail.rest);
      tail.append(drawn, more);
      __syncthreads();
      std::int32_t still = 0;
      std::int32_t fresh = 0;
      if (more < tail.rest) {
        still = block.count_heavy(0, drawn, more);
        fresh = block.count_heavy(drawn, more, more);
      }
      drawn = still + fresh > 0 ? tail.rest : more;
      tail.append(more, drawn);
      hits += fresh;
    }
  }
  if (!writes) return;
  args.report.guard_hits(s, g) = hits;
  set_drawn(args.tail, s, g, tail, drawn);
}

template <typename T, int kHeadDim>
void launch_size(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                 const Batch& batch, const TensorRef& out, TensorView<const float, 2> lse, const TailArgs& tail,
                 const SampleReport& report) {
  const SizeArgs<T> args{.tail = tail,
                         .q = TensorView<const T, 3>(q.as<const T, 2>().data(), batch.seqs, shape.heads, kHeadDim),
                         .out = TensorView<const T, 3>(out.as<const T, 2>().data(), batch.seqs, shape.heads, kHeadDim),
                         .lse = lse,
                         .k = kv.k.as<const T, 4>().data(),
                         .v = kv.v.as<const T, 4>().data(),
                         .page_table = batch.page_table,
                         .report = report,
                         .group = shape.group(),
                         .kv_heads = shape.kv_heads,
                         .page_tokens = shape.page_tokens,
                         .scale = shape.scale};
  launch(
      "size_sample", size_tail<T, kHeadDim>,
      {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs)), .block = dim3(kThreads)},
      exec.stream, args);
}

TailArgs tail_args(const Batch& batch, const SampleRule& rule, DenseLimit dense, const Selection& list) {
  return {.kv_len = batch.kv_len, .request = batch.request, .rule = rule, .list = list, .dense_tokens = dense.tokens};
}

}  // namespace

void draw_pilot(const Exec& exec, const AttentionShape& shape, const Batch& batch, const SampleRule& rule,
                DenseLimit dense, const Selection& list) {
  if (batch.seqs == 0) return;
  launch(
      "draw_pilot", write_pilot,
      {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs)), .block = dim3(kThreads)},
      exec.stream, tail_args(batch, rule, dense, list));
}

void size_sample(const Exec& exec, const AttentionShape& shape, const TensorRef& q, const LayerKv& kv,
                 const Batch& batch, const TensorRef& out, TensorView<const float, 2> lse, const SampleRule& rule,
                 DenseLimit dense, const Selection& list, const SampleReport& report) {
  check_attention_shape(shape);
  if (batch.seqs == 0) return;
  const TailArgs tail = tail_args(batch, rule, dense, list);
  dispatch_16bit(kv.k.dtype, "sizing a sample", [&](auto element) {
    using T = decltype(element);
    if (shape.head_dim == 64) return launch_size<T, 64>(exec, shape, q, kv, batch, out, lse, tail, report);
    launch_size<T, 128>(exec, shape, q, kv, batch, out, lse, tail, report);
  });
}

}  // namespace vesper::cuda
