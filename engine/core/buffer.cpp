#include "engine/core/buffer.h"

#include <array>
#include <cstdlib>
#include <mutex>
#include <string>
#include <utility>

#include "engine/core/device.h"
#include "engine/core/error.h"
#include "engine/core/stream.h"

namespace vesper {
namespace {

constexpr std::size_t kAlignment = 256;

struct Counters {
  std::mutex mutex;
  std::array<AllocationCount, 3> by_memory;
};

Counters& counters() {
  static Counters instance;
  return instance;
}

void count_allocation(Memory memory, std::int64_t bytes) {
  const std::scoped_lock lock(counters().mutex);
  AllocationCount& count = counters().by_memory[static_cast<std::size_t>(memory)];
  ++count.allocations;
  count.live_bytes += bytes;
  count.peak_bytes = std::max(count.peak_bytes, count.live_bytes);
}

void count_release(Memory memory, std::int64_t bytes) {
  const std::scoped_lock lock(counters().mutex);
  counters().by_memory[static_cast<std::size_t>(memory)].live_bytes -= bytes;
}

void* allocate(Memory memory, std::int64_t bytes) {
  switch (memory) {
    case Memory::kHost: {
      const std::size_t rounded = (static_cast<std::size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
      return std::aligned_alloc(kAlignment, rounded);
    }
    case Memory::kPinned:
      return cuda::allocate_pinned(bytes);
    case Memory::kDevice:
      return cuda::allocate_device(bytes);
  }
  return nullptr;
}

}  // namespace

Buffer::Buffer(Memory memory, std::int64_t bytes, std::string_view what) : bytes_(bytes), memory_(memory) {
  if (bytes <= 0) return;
  data_ = allocate(memory, bytes);
  if (data_ == nullptr) {
    const DeviceKind kind = memory == Memory::kDevice ? DeviceKind::kCuda : DeviceKind::kCpu;
    fail({"allocating " + std::string(what), std::to_string(device_info(kind).free_bytes) + " bytes free",
          std::to_string(bytes) + " bytes", "lower --max-context or the number of sequences"});
  }
  count_allocation(memory, bytes);
}

Buffer::~Buffer() {
  release();
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)), memory_(other.memory_) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    release();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    memory_ = other.memory_;
  }
  return *this;
}

void Buffer::release() noexcept {
  if (data_ == nullptr) return;
  switch (memory_) {
    case Memory::kHost:
      std::free(data_);
      break;
    case Memory::kPinned:
      cuda::release_pinned(data_);
      break;
    case Memory::kDevice:
      cuda::release_device(data_);
      break;
  }
  count_release(memory_, bytes_);
  data_ = nullptr;
}

AllocationCount allocation_count(Memory memory) {
  const std::scoped_lock lock(counters().mutex);
  return counters().by_memory[static_cast<std::size_t>(memory)];
}

void restart_peak(Memory memory) {
  const std::scoped_lock lock(counters().mutex);
  AllocationCount& count = counters().by_memory[static_cast<std::size_t>(memory)];
  count.peak_bytes = count.live_bytes;
}

}  // namespace vesper
