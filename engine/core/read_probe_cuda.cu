// The read probe on CUDA: every byte of a large buffer once, 16 bytes a load, into an exclusive or.
//
// Shapes: data [words] u32, checksum [1] u32.
// Mapping: a block reads 128 KiB, so that 4 GiB are 32768 blocks: the card balances them over its multiprocessors, and
//   the last ones to finish are half a percent of the time. A thread has 8 loads of 16 bytes in flight; 256 threads of
//   a warp-contiguous 4 KiB stride each. At 1024 resident threads a multiprocessor that is 17 MB over 132 of them, some
//   eight times bandwidth x latency (targets of the H100: 3.06 TB/s, about 0.7 us).
// Byte bound: it is the bound.
#include "engine/core/launch.cuh"
#include "engine/core/read_probe.h"

namespace vesper::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 8;       // in flight a thread
constexpr int kIterations = 4;  // of a block: 128 KiB
constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr std::int64_t kBlockVectors = std::int64_t{kThreads} * kLoads * kIterations;

struct ProbeArgs {
  uint4* data = nullptr;
  std::int64_t vectors = 0;
  unsigned* checksum = nullptr;
};

// Joins the threads' sums to the checksum, one atomic a warp.
__device__ void join(unsigned sum, unsigned* checksum) {
  sum = __reduce_xor_sync(kAllLanes, sum);
  if (threadIdx.x % kWarpThreads == 0) atomicXor(checksum, sum);
}

__global__ void __launch_bounds__(kThreads) write_words(const __grid_constant__ ProbeArgs args) {
  unsigned sum = 0;
  const std::int64_t first = blockIdx.x * kBlockVectors + threadIdx.x;
  const std::int64_t end = min(args.vectors, (blockIdx.x + 1) * kBlockVectors);
  for (std::int64_t v = first; v < end; v += kThreads) {
    const auto word = static_cast<std::uint64_t>(v) * 4;
    const uint4 drawn = {probe_word(word), probe_word(word + 1), probe_word(word + 2), probe_word(word + 3)};
    args.data[v] = drawn;
    sum ^= drawn.x ^ drawn.y ^ drawn.z ^ drawn.w;
  }
  join(sum, args.checksum);
}

__global__ void __launch_bounds__(kThreads, 4) read_words(const __grid_constant__ ProbeArgs args) {
  unsigned sum = 0;
  const std::int64_t first = blockIdx.x * kBlockVectors + threadIdx.x;
#pragma unroll 1
  for (int i = 0; i < kIterations; ++i) {
    const std::int64_t at = first + std::int64_t{i} * kThreads * kLoads;
    uint4 read[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const std::int64_t v = at + std::int64_t{l} * kThreads;
      read[l] = v < args.vectors ? __ldcs(args.data + v) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int l = 0; l < kLoads; ++l) sum ^= read[l].x ^ read[l].y ^ read[l].z ^ read[l].w;
  }
  join(sum, args.checksum);
}

Dims dims_of(std::int64_t vectors) {
  return {.grid = dim3(static_cast<unsigned>((vectors + kBlockVectors - 1) / kBlockVectors)), .block = dim3(kThreads)};
}

}  // namespace

void write_probe_data(const Exec& exec, std::uint32_t* data, std::int64_t words, std::uint32_t* checksum) {
  const ProbeArgs args{.data = reinterpret_cast<uint4*>(data), .vectors = words / 4, .checksum = checksum};
  launch("write_words", write_words, dims_of(args.vectors), exec.stream, args);
}

void read_probe_data(const Exec& exec, const std::uint32_t* data, std::int64_t words, std::uint32_t* checksum) {
  const ProbeArgs args{
      .data = reinterpret_cast<uint4*>(const_cast<std::uint32_t*>(data)), .vectors = words / 4, .checksum = checksum};
  launch("read_words", read_words, dims_of(args.vectors), exec.stream, args);
}

}  // namespace vesper::cuda
