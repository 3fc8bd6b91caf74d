#include <gtest/gtest.h>

#include <cstdio>
#include <vector>

#include "engine/core/buffer.h"
#include "engine/core/launch.cuh"
#include "engine/core/numeric.cuh"
#include "engine/core/philox.h"
#include "engine/core/read_probe.h"
#include "engine/core/stream.h"
#include "tests/gpu.h"

namespace vesper {
namespace {

struct DrawArgs {
  TensorView<std::uint32_t, 1> draws;  // [4 * counters]
};

__global__ void draw(const __grid_constant__ DrawArgs args) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const PhiloxCounter words = philox({{i, 7, 11, 13}}, {{42, 1}});
  for (int w = 0; w < 4; ++w) args.draws(4 * i + w) = words.word[w];
}

TEST(PhiloxCuda, EqualsTheHost) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  constexpr int kCounters = 1024;
  const Buffer device(Memory::kDevice, kCounters * 16, "draws");
  const auto draws = device.view<std::uint32_t>(4 * kCounters);
  cuda::launch("draw", draw, {.grid = dim3(kCounters / 256), .block = dim3(256)}, stream.exec().stream,
               DrawArgs{draws});
  std::vector<std::uint32_t> host(4 * kCounters);
  copy_bytes(stream.exec(), host.data(), device.data(), kCounters * 16);
  stream.synchronize();
  for (std::uint32_t i = 0; i < kCounters; ++i) {
    const PhiloxCounter words = philox({{i, 7, 11, 13}}, {{42, 1}});
    for (std::uint32_t w = 0; w < 4; ++w) ASSERT_EQ(host[4 * i + w], words.word[w]) << "counter " << i;
  }
}

struct NarrowArgs {
  TensorView<const float, 1> in;
  TensorView<bf16, 1> as_bf16;
  TensorView<f16, 1> as_f16;
};

__global__ void narrow_all(const __grid_constant__ NarrowArgs args) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  args.as_bf16(i) = cuda::narrow<bf16>(args.in(i));
  args.as_f16(i) = cuda::narrow<f16>(args.in(i));
}

TEST(NumericCuda, NarrowsAsTheHostDoes) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  constexpr int kCount = 1 << 20;
  std::vector<float> values(kCount);
  for (std::uint32_t i = 0; i < kCount; ++i) {
    const std::uint32_t bits = philox({{i, 0, 0, 0}}, {{1, 2}}).word[0];
    values[i] = std::bit_cast<float>((bits & 0x7F800000U) == 0x7F800000U ? bits & 0xBF800000U : bits);
  }
  const Buffer in(Memory::kDevice, kCount * 4, "values");
  const Buffer out_bf16(Memory::kDevice, kCount * 2, "bf16");
  const Buffer out_f16(Memory::kDevice, kCount * 2, "f16");
  copy_bytes(stream.exec(), in.data(), values.data(), kCount * 4);
  cuda::launch("narrow_all", narrow_all, {.grid = dim3(kCount / 256), .block = dim3(256)}, stream.exec().stream,
               NarrowArgs{in.view<const float>(kCount), out_bf16.view<bf16>(kCount), out_f16.view<f16>(kCount)});
  std::vector<bf16> got_bf16(kCount);
  std::vector<f16> got_f16(kCount);
  copy_bytes(stream.exec(), got_bf16.data(), out_bf16.data(), kCount * 2);
  copy_bytes(stream.exec(), got_f16.data(), out_f16.data(), kCount * 2);
  stream.synchronize();
  for (std::size_t i = 0; i < kCount; ++i) {
    ASSERT_EQ(got_bf16[i].bits, to_bf16(values[i]).bits) << values[i];
    ASSERT_EQ(got_f16[i].bits, to_f16(values[i]).bits) << values[i];
  }
}

// Between a fifth and all of what any card of compute capability 8.0 and up can have; the checksums are checked inside.
TEST(ReadProbeCuda, MeasuresTheCard) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const ReadRate rate = probe_read_rate(stream.exec());
  std::printf("reads %.1f GB/s over %.1f GB\n", rate.bytes_per_s * 1e-9, static_cast<double>(rate.bytes) * 1e-9);
  EXPECT_GT(rate.bytes, device_info(DeviceKind::kCuda).l2_bytes);
  EXPECT_GT(rate.bytes_per_s, 1e11);
  EXPECT_LT(rate.bytes_per_s, 1e13);
}

// An event that a graph holds is set anew by every replay.
TEST(EventCuda, InAGraphTellsTheTimeOfItsReplay) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  const Buffer large(Memory::kDevice, std::int64_t{256} << 20, "what takes a while");
  Event begin;
  Event end;
  const Graph graph = Graph::capture(exec, [&] {
    begin.record(exec);
    zero_bytes(exec, large.data(), large.bytes());
    end.record(exec);
  });
  for (int replay = 0; replay < 2; ++replay) {
    graph.launch(exec);
    stream.synchronize();
    EXPECT_GT(end.ms_since(begin), 0.01F);  // 256 MiB at 25 TB/s
    EXPECT_LT(end.ms_since(begin), 100.0F);
  }
}

}  // namespace
}  // namespace vesper
