// The read probe's host side, and the whole of it on the CPU.
#include "engine/core/read_probe.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <string>

#include "engine/core/buffer.h"
#include "engine/core/error.h"
#include "engine/core/parallel.h"
#include "engine/core/stream.h"

namespace vesper {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPasses = 9;
// Some 90 ms on an H100, for clocks to settle after whatever ran before: products at full power leave them throttled.
constexpr int kDeviceWarmUps = 64;
constexpr std::int64_t kDeviceBytes = std::int64_t{4} << 30;
constexpr std::int64_t kHostBytes = std::int64_t{256} << 20;
constexpr std::int64_t kGrain = std::int64_t{1} << 16;  // words that a CPU thread takes at once
constexpr std::int64_t kUnit = std::int64_t{1} << 17;   // what a block of the CUDA kernel reads

std::int64_t probe_bytes(DeviceKind device) {
  const std::int64_t wanted = device == DeviceKind::kCuda ? kDeviceBytes : kHostBytes;
  return std::max(kUnit, std::min(wanted, device_info(device).free_bytes / 4) / kUnit * kUnit);
}

void check_sum(std::uint32_t found, std::uint32_t expected) {
  if (found == expected) return;
  fail({"probing the read bandwidth", "the checksum " + std::to_string(found), std::to_string(expected),
        "the memory or the driver is at fault: no measurement on this machine can be trusted"});
}

template <typename WordOf>
std::uint32_t xor_all(std::int64_t words, const WordOf& word_of) {
  std::atomic<std::uint32_t> sum = 0;
  parallel_for(words, kGrain, [&](std::int64_t begin, std::int64_t end) {
    std::uint32_t part = 0;
    for (std::int64_t i = begin; i < end; ++i) part ^= word_of(i);
    sum ^= part;
  });
  return sum;
}

std::array<double, kPasses> time_host_passes(std::int64_t bytes) {
  const std::int64_t words = bytes / 4;
  const Buffer buffer(Memory::kHost, bytes, "the read probe");
  auto* data = static_cast<std::uint32_t*>(buffer.data());
  const std::uint32_t expected =
      xor_all(words, [&](std::int64_t i) { return data[i] = probe_word(static_cast<std::uint64_t>(i)); });
  std::array<double, kPasses> seconds{};
  for (double& pass : seconds) {
    const Clock::time_point begin = Clock::now();
    const std::uint32_t found = xor_all(words, [&](std::int64_t i) { return data[i]; });
    pass = std::chrono::duration<double>(Clock::now() - begin).count();
    check_sum(found, expected);
  }
  return seconds;
}

std::array<double, kPasses> time_device_passes(const Exec& exec, std::int64_t bytes) {
  std::array<double, kPasses> seconds{};
  if constexpr (kHaveCuda) {
    const std::int64_t words = bytes / 4;
    const Buffer buffer(Memory::kDevice, bytes, "the read probe");
    constexpr std::int64_t kSums = 1 + kDeviceWarmUps + kPasses;
    const Buffer sums(Memory::kDevice, kSums * 4, "the read probe's checksums");
    auto* data = static_cast<std::uint32_t*>(buffer.data());
    auto* sum = static_cast<std::uint32_t*>(sums.data());
    zero_bytes(exec, sums.data(), sums.bytes());
    cuda::write_probe_data(exec, data, words, sum);
    for (int i = 0; i < kDeviceWarmUps; ++i)
      cuda::read_probe_data(exec, data, words, ++sum);  // checked as the others are
    std::array<Event, kPasses + 1> events;
    events[0].record(exec);
    for (std::size_t i = 0; i < kPasses; ++i) {
      cuda::read_probe_data(exec, data, words, ++sum);
      events[i + 1].record(exec);
    }
    std::array<std::uint32_t, kSums> found{};
    copy_bytes(exec, found.data(), sums.data(), sums.bytes());
    synchronize(exec);
    for (const std::uint32_t each : found) check_sum(each, found[0]);
    for (std::size_t i = 0; i < kPasses; ++i)
      seconds[i] = static_cast<double>(events[i + 1].ms_since(events[i])) * 1e-3;
  }
  return seconds;
}

}  // namespace

ReadRate probe_read_rate(const Exec& exec) {
  const std::int64_t bytes = probe_bytes(exec.device);
  std::array<double, kPasses> seconds = exec.on_cuda() ? time_device_passes(exec, bytes) : time_host_passes(bytes);
  std::nth_element(seconds.begin(), seconds.begin() + kPasses / 2, seconds.end());
  return {.bytes_per_s = static_cast<double>(bytes) / seconds[kPasses / 2], .bytes = bytes};
}

}  // namespace vesper
