// From logits to token ids on CUDA; semantics in engine/sampling.h.
//
//   logits [seqs, vocab] f32; a cluster of blocks of 1024 threads a row looks for its largest logit, thread i of them
//   all taking the logits i, i + their number, ..., eight loads in flight; what is left to do, its first block does
//
// Thresholds are found without sorting. A float maps to an unsigned key of the same order; "the largest value at and
// above which the logits weigh at least w" is found a byte of the key at a time, from the top, by a histogram of the
// weights of the keys that share the bytes found so far: four passes. Counting weighs 1 each (top-k); probability
// weighs round(2^31 e^((logit - largest) / temperature)) (top-p). Weights are integers, so sums do not depend on the
// order of the atomics and a row always gives the same id. Method: radix selection (Alabi et al., "Fast k-selection
// algorithms for graphics processing units", JEA 2012), with weights.
//
// Bytes: the row once (greedy, plain temperature: twice), and four times for each of top-k and top-p; beyond the first
// time it comes from L2. One block a row is bound by what one multiprocessor can read, some 100 GB/s: 5 us for each
// pass over 128256 logits. So the pass that greedy decoding needs is shared by a cluster (compute capability 9.0).
#include <cstdint>
#include <string>

#include "engine/core/cluster.cuh"
#include "engine/core/error.h"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/philox.h"
#include "engine/sampling.h"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBatch = 8;
constexpr int kMostParts = 8;  // blocks a row
static_assert(kMostParts <= kMaxCluster);
constexpr int kBins = 256;
// Copies of the histogram, by warps, so that fewer atomics meet.
constexpr int kCopies = 8;
// A copy adds 16 bits of a weight at a time into 32 (shared memory has no 64-bit atomic addition), so it must not see
// more than 2^16 logits.
constexpr std::int64_t kMaxVocab = std::int64_t{kCopies} << 16;

struct SampleArgs {
  TensorView<const float, 2> logits;
  TensorView<const SamplingParams, 1> params;
  TensorView<const std::int32_t, 1> step;
  TensorView<std::int32_t, 1> ids;
};

// The best of a set of candidates; ties go to the lowest id.
struct Best {
  float score;
  int id;
  __device__ void offer(const Best& other) {
    if (other.score > score || (other.score == score && other.id < id)) *this = other;
  }
};

struct Histogram {
  unsigned low[kCopies][kBins];   // sums of the weights' lower 16 bits
  unsigned high[kCopies][kBins];  // and of their upper 16
};

struct Shared {
  Histogram histogram;
  std::uint64_t weight[kBins];
  std::uint64_t needed;
  unsigned bin;
  Best of_warp[kThreads / 32];
  Best of_part[kMostParts];
};

// visit(i, logit) for this thread's logits of a row of which `parts` blocks take a part each; a NaN is read as -inf, so
// that it is never chosen.
template <typename Visit>
__device__ void for_each_logit(const float* row, int vocab, int part, int parts, const Visit& visit) {
  const int threads = kThreads * parts;
  for (int first = kThreads * part + static_cast<int>(threadIdx.x); first < vocab; first += threads * kBatch) {
    float batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * threads;
      batch[j] = i < vocab ? row[i] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * threads;
      if (i < vocab) visit(i, isnan(batch[j]) ? -INFINITY : batch[j]);
    }
  }
}

template <typename Visit>
__device__ void for_each_logit(const float* row, int vocab, const Visit& visit) {
  for_each_logit(row, vocab, 0, 1, visit);
}

// The best of all threads' candidates, in every thread.
__device__ Best block_best(Shared& shared, Best best) {
  const auto join_lanes = [&] {
    for (int step = 16; step > 0; step /= 2) {
      best.offer({__shfl_xor_sync(~0U, best.score, step), __shfl_xor_sync(~0U, best.id, step)});
    }
  };
  join_lanes();
  if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  best = shared.of_warp[threadIdx.x % 32];
  join_lanes();
  __syncthreads();
  return best;
}

// Unsigned keys in the order of the floats; the two zeros are one.
__device__ unsigned key_of(float value) {
  const unsigned bits = __float_as_uint(value == 0.0F ? 0.0F : value);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}
__device__ float value_of(unsigned key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7FFFFFFFU : ~key);
}

// In warp 0: the bin at which the weights, summed from the highest bin down, reach what is needed, and what is still
// needed of that bin. Lane i holds the eight bins from 255 - 8i down.
template <typename Needed>
__device__ void choose_bin(Shared& shared, const Needed& needed_of) {
  constexpr int kPerLane = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x);
  const int top = kBins - 1 - kPerLane * lane;
  std::uint64_t mine = 0;
  for (int j = 0; j < kPerLane; ++j) mine += shared.weight[top - j];
  std::uint64_t through = mine;  // of all bins down to this lane's last
  for (int step = 1; step < 32; step *= 2) {
    const std::uint64_t before = __shfl_up_sync(~0U, through, step);
    if (lane >= step) through += before;
  }
  const std::uint64_t needed = needed_of(__shfl_sync(~0U, through, 31));
  std::uint64_t above = through - mine;
  if (above >= needed || through < needed) return;
  int bin = top;
  while (above + shared.weight[bin] < needed) above += shared.weight[bin--];
  shared.bin = static_cast<unsigned>(bin);
  shared.needed = needed - above;
}

// The largest value tau for which the logits >= tau weigh at least needed_of(weight of all). weight(logit) < 2^32;
// 1 <= needed_of(total) <= total.
template <typename Weight, typename Needed>
__device__ float find_threshold(Shared& shared, const float* row, int vocab, const Weight& weight,
                                const Needed& needed_of) {
  const unsigned copy = threadIdx.x / 32 % kCopies;
  unsigned found = 0;  // the upper bytes of the key
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (unsigned b = threadIdx.x; b < kCopies * kBins; b += kThreads) {
      shared.histogram.low[b / kBins][b % kBins] = 0;
      shared.histogram.high[b / kBins][b % kBins] = 0;
    }
    __syncthreads();
    for_each_logit(row, vocab, [&](int, float logit) {
      const unsigned key = key_of(logit);
      if (shift < 24 && key >> (shift + 8) != found) return;
      const unsigned weighs = weight(logit);
      if (weighs == 0) return;
      const unsigned bin = (key >> shift) % kBins;
      atomicAdd(&shared.histogram.low[copy][bin], weighs & 0xFFFFU);
      if (weighs >> 16 != 0) atomicAdd(&shared.histogram.high[copy][bin], weighs >> 16);
    });
    __syncthreads();
    if (threadIdx.x < kBins) {
      std::uint64_t sum = 0;
      for (int c = 0; c < kCopies; ++c) {
        sum += shared.histogram.low[c][threadIdx.x] + (std::uint64_t{shared.histogram.high[c][threadIdx.x]} << 16);
      }
      shared.weight[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      if (shift == 24) {
        choose_bin(shared, needed_of);
      } else {
        const std::uint64_t needed = shared.needed;
        __syncwarp();
        choose_bin(shared, [needed](std::uint64_t) { return needed; });
      }
    }
    __syncthreads();
    found = found << 8 | shared.bin;
  }
  return value_of(found);
}

// The smallest logit that may be drawn.
__device__ float keep_threshold(Shared& shared, const float* row, int vocab, float largest,
                                const SamplingParams& params) {
  float threshold = -INFINITY;
  if (params.top_k > 0 && params.top_k < vocab) {
    threshold = find_threshold(
        shared, row, vocab, [](float) { return 1U; },
        [&](std::uint64_t) { return static_cast<std::uint64_t>(params.top_k); });
  }
  if (params.top_p < 1.0F) {
    const auto probability = [&](float logit) {
      if (logit < threshold) return 0U;
      if (logit == largest) return 1U << 31;  // also where it is +inf
      return __float2uint_rn(expf((logit - largest) / params.temperature) * 0x1p31F);
    };
    const auto share_of = [&](std::uint64_t total) {
      const double share = ceil(static_cast<double>(total) * static_cast<double>(params.top_p));
      return share < 1.0 ? std::uint64_t{1} : static_cast<std::uint64_t>(share);
    };
    threshold = find_threshold(shared, row, vocab, probability, share_of);
  }
  return threshold;
}

__global__ void __launch_bounds__(kThreads) sample_row(const __grid_constant__ SampleArgs args) {
  __shared__ Shared shared;
  const int parts = cluster_blocks();
  const int part = static_cast<int>(blockIdx.x) % parts;
  const int s = static_cast<int>(blockIdx.x) / parts;
  if (parts > 1) arrive_in_cluster();
  wait_for_previous();
  const float* row = &args.logits(s, 0);
  const int vocab = static_cast<int>(args.logits.shape(1));
  const SamplingParams params = args.params(s);

  Best greedy{-INFINITY, vocab};
  for_each_logit(row, vocab, part, parts, [&](int i, float logit) { greedy.offer({logit, i}); });
  greedy = block_best(shared, greedy);
  if (parts > 1) {
    wait_for_cluster();  // the first block has begun
    if (threadIdx.x == 0) *in_block(&shared.of_part[part], 0) = greedy;
    arrive_in_cluster();
    if (part != 0) return;
    wait_for_cluster();
    for (int i = 0; i < parts; ++i) greedy.offer(shared.of_part[i]);
  }
  if (!(params.temperature > 0.0F) || greedy.score == -INFINITY) {
    if (threadIdx.x == 0) args.ids(s) = greedy.score == -INFINITY ? -1 : greedy.id;
    return;
  }

  const float threshold = keep_threshold(shared, row, vocab, greedy.score, params);
  const auto step = static_cast<std::uint32_t>(args.step(s));
  Best drawn{-INFINITY, vocab};
  for_each_logit(row, vocab, [&](int i, float logit) {
    if (logit < threshold || logit == -INFINITY) return;
    const PhiloxCounter draw = philox({{static_cast<std::uint32_t>(i), step, params.request, 0}}, {{params.seed, 0}});
    const float gumbel = -logf(-logf(unit_interval(draw.word[0])));
    drawn.offer({logit / params.temperature + gumbel, i});
  });
  drawn = block_best(shared, drawn);
  if (threadIdx.x == 0) args.ids(s) = drawn.id;
}

// As many as have a multiprocessor each.
std::int64_t parts_of_row(std::int64_t rows) {
  static const bool clusters = code_version(sample_row) >= 90;
  std::int64_t parts = clusters ? kMostParts : 1;
  while (parts > 1 && rows * parts > multiprocessor_count()) parts /= 2;
  return parts;
}

}  // namespace

void sample(const Exec& exec, TensorView<const float, 2> logits, TensorView<const SamplingParams, 1> params,
            TensorView<const std::int32_t, 1> step, TensorView<std::int32_t, 1> ids) {
  if (logits.empty()) return;
  if (logits.shape(1) > kMaxVocab) {
    refuse({"sampling on CUDA", std::to_string(logits.shape(1)) + " logits a row",
            "at most " + std::to_string(kMaxVocab), "use --device cpu"});
  }
  const std::int64_t parts = parts_of_row(logits.shape(0));
  const Dims dims{.grid = dim3(static_cast<unsigned>(logits.shape(0) * parts)),
                  .block = dim3(kThreads),
                  .overlap = true,
                  .cluster = dim3(static_cast<unsigned>(parts))};
  launch("sample", sample_row, dims, exec.stream, SampleArgs{logits, params, step, ids});
}

}  // namespace vesper::cuda
