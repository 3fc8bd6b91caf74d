// The static part of sampled lists on CUDA; semantics in attention/sample_tail.h.
//
// Mapping: grid (kv_heads, seqs), 1024 threads a list. The group's scores become one key a token, an unsigned number of
//   the scores' order, which is kept in the list's own row at the token's place: a list is never longer than its
//   context, and the entries are written from the left, never past a key that is still to be read.
// The k-th largest key is found a byte at a time from the top, by histograms of the keys that share the bytes found so
//   far (radix selection; Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 2012). Then
//   one pass in order of the tokens writes those above it and the first of those equal to it, each at the place that a
//   block-wide prefix sum gives it. Only integers are counted, so the list does not depend on the order of atomics.
// Bytes of a list: the group's scores once (or the pages'), then the keys written once and read five times, from L2.
#include <cstdint>

#include "attention/sample_tail.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 4;  // consecutive tokens of a thread in the last pass
constexpr int kBins = 256;
constexpr int kCopies = 8;  // of the histogram, by warps, so that fewer atomics meet

struct StaticArgs {
  TensorView<const std::int32_t, 1> kv_len;
  TopKScores scores;
  StaticRule rule;
  Selection list;
  std::int32_t dense_tokens = 0;
  int group = 0;
  int page_tokens = 0;
};

struct Shared {
  unsigned histogram[kCopies][kBins];
  unsigned count[kBins];
  unsigned bin;
  unsigned wanted;             // how many of the keys that share the bytes found so far
  unsigned totals[2][kWarps];  // of the warps, by turns, so that one barrier a chunk is enough
};

// The key of token t. Keys have the order of the scores; the two zeros are one, NaN is -inf. A mean orders a row as its
// sum does, and is summed.
__device__ unsigned key_of(const StaticArgs& args, int s, int g, int t) {
  float score;
  if (args.scores.of_tokens.empty()) {
    score = args.scores.of_pages(s, g, t / args.page_tokens);
  } else {
    const float* scores = &args.scores.of_tokens(s, g * args.group, t);
    const std::int64_t stride = args.scores.of_tokens.shape(2);
    score = scores[0];
    for (int h = 1; h < args.group; ++h) {
      const float next = scores[h * stride];
      score = args.rule.group_score == GroupScore::kMax ? fmaxf(score, next) : score + next;
    }
  }
  if (isnan(score)) score = -INFINITY;
  const unsigned bits = __float_as_uint(score == 0.0F ? 0.0F : score);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}

// In warp 0: the bin at which counts, summed from the highest bin down, reach what is wanted, and what is then still
// wanted of that bin. Lane i holds the eight bins from 255 - 8i down. The counts sum to at least what is wanted.
__device__ void choose_bin(Shared& shared) {
  constexpr int kPerLane = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x);
  const int top = kBins - 1 - kPerLane * lane;
  const unsigned wanted = shared.wanted;
  unsigned mine = 0;
  for (int j = 0; j < kPerLane; ++j) mine += shared.count[top - j];
  unsigned through = mine;  // of all bins down to this lane's last
  for (int step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_up_sync(~0U, through, step);
    if (lane >= step) through += before;
  }
  unsigned above = through - mine;
  __syncwarp();
  if (above >= wanted || through < wanted) return;
  int bin = top;
  while (above + shared.count[bin] < wanted) above += shared.count[bin--];
  shared.bin = static_cast<unsigned>(bin);
  shared.wanted = wanted - above;
}

// The shared.wanted-th largest of keys [first, end); leaves in shared.wanted how many of those equal to it are among
// them. All threads must have seen the keys.
__device__ unsigned find_threshold(Shared& shared, const std::int32_t* keys, int first, int end) {
  const unsigned copy = threadIdx.x / 32 % kCopies;
  unsigned found = 0;  // the upper bytes
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (unsigned b = threadIdx.x; b < kCopies * kBins; b += kThreads) shared.histogram[b / kBins][b % kBins] = 0;
    __syncthreads();
    for (int t = first + static_cast<int>(threadIdx.x); t < end; t += kThreads) {
      const auto key = static_cast<unsigned>(keys[t]);
      if (shift < 24 && key >> (shift + 8) != found) continue;
      atomicAdd(&shared.histogram[copy][(key >> shift) % kBins], 1U);
    }
    __syncthreads();
    if (threadIdx.x < kBins) {
      unsigned sum = 0;
      for (int c = 0; c < kCopies; ++c) sum += shared.histogram[c][threadIdx.x];
      shared.count[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) choose_bin(shared);
    __syncthreads();
    found = found << 8 | shared.bin;
  }
  return found;
}

// Sum of `value` over the lanes up to this one.
__device__ unsigned sum_through(unsigned value) {
  const unsigned lane = threadIdx.x % 32;
  for (unsigned step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_up_sync(~0U, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// Replaces the keys [first, end) of a row by the tokens whose key is above tau and the first `ties` of those at tau, in
// order, from row[first] on. Counts of a chunk fit in 16 bits: those above in the lower, those at tau in the upper.
__device__ void write_best(Shared& shared, std::int32_t* row, int first, int end, unsigned tau, unsigned ties) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  unsigned above_before = 0;  // this chunk
  unsigned ties_before = 0;
  int turn = 0;
  for (int chunk = first; chunk < end; chunk += kThreads * kItems, turn ^= 1) {
    const int mine = chunk + static_cast<int>(threadIdx.x) * kItems;
    unsigned key[kItems];
    unsigned counts = 0;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      key[j] = mine + j < end ? static_cast<unsigned>(row[mine + j]) : 0U;  // below every key of a score
      counts += key[j] > tau ? 1U : 0U;
      counts += key[j] == tau ? 1U << 16 : 0U;
    }
    const unsigned through = sum_through(counts);
    if (lane == 31) shared.totals[turn][warp] = through;
    __syncthreads();  // also: the chunk's keys are in registers
    const unsigned warps_through = sum_through(shared.totals[turn][lane]);
    const unsigned all = __shfl_sync(~0U, warps_through, 31);
    const unsigned warps_before = __shfl_sync(~0U, warps_through, (warp + 31) % 32);
    const unsigned before = (warp == 0 ? 0U : warps_before) + through - counts;
    unsigned above = above_before + (before & 0xFFFFU);
    unsigned equal = ties_before + (before >> 16);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const std::int64_t place = std::int64_t{first} + above + (equal < ties ? equal : ties);
      if (key[j] > tau) {
        row[place] = mine + j;
        ++above;
      } else if (key[j] == tau) {
        if (equal < ties) row[place] = mine + j;
        ++equal;
      }
    }
    above_before += all & 0xFFFFU;
    ties_before += all >> 16;
  }
}

__global__ void __launch_bounds__(kThreads) write_static(const __grid_constant__ StaticArgs args) {
  __shared__ Shared shared;
  const auto g = static_cast<int>(blockIdx.x);
  const auto s = static_cast<int>(blockIdx.y);
  const auto thread = static_cast<int>(threadIdx.x);
  const std::int32_t visible = args.kv_len(s);
  if (visible <= args.dense_tokens) return;
  const std::int32_t window = max(1, tokens_of(args.rule.window_tokens, visible));
  const std::int32_t sink = min(tokens_of(args.rule.sink_tokens, visible), visible - window);
  const std::int32_t between = visible - window - sink;
  const bool scored = !args.scores.of_tokens.empty() || !args.scores.of_pages.empty();
  const std::int32_t top_k = scored ? min(tokens_of(args.rule.top_k, visible), between) : 0;
  const std::int32_t end = sink + between;
  std::int32_t* row = &args.list.index(s, g, 0);

  if (top_k == between) {
    for (std::int32_t t = sink + thread; t < end; t += kThreads) row[t] = t;
  } else if (top_k > 0) {
    for (std::int32_t t = sink + thread; t < end; t += kThreads) {
      row[t] = static_cast<std::int32_t>(key_of(args, s, g, t));
    }
    if (thread == 0) shared.wanted = static_cast<unsigned>(top_k);
    __syncthreads();
    const unsigned tau = find_threshold(shared, row, sink, end);
    write_best(shared, row, sink, end, tau, shared.wanted);
  }
  // Keys are read by now: the last chunk's barrier lies behind.
  for (std::int32_t t = thread; t < sink; t += kThreads) row[t] = t;
  for (std::int32_t t = thread; t < window; t += kThreads) row[sink + top_k + t] = end + t;
  if (thread == 0) {
    args.list.count(s, g) = sink + top_k + window;
    args.list.tail_begin(s, g) = sink + top_k + window;
    args.list.tail_log_weight(s, g) = 0.0F;
  }
}

}  // namespace

void select_static(const Exec& exec, const AttentionShape& shape, const Batch& batch, const TopKScores& scores,
                   const StaticRule& rule, DenseLimit dense, const Selection& list) {
  if (batch.seqs == 0) return;
  launch(
      "select_static", write_static,
      {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs)), .block = dim3(kThreads)},
      exec.stream,
      StaticArgs{.kv_len = batch.kv_len,
                 .scores = scores,
                 .rule = rule,
                 .list = list,
                 .dense_tokens = dense.tokens,
                 .group = shape.group(),
                 .page_tokens = shape.page_tokens});
}

}  // namespace vesper::cuda
