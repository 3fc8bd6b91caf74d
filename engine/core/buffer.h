// Owned memory: host, pinned host, or CUDA device. Every allocation is counted, so that a test can show that a decode
// step makes none.
#pragma once

#include <cstdint>
#include <string_view>

#include "engine/core/exec.h"
#include "engine/core/tensor.h"

namespace vesper {

enum class Memory : std::uint8_t { kHost, kPinned, kDevice };

// Where what a device works on lies.
constexpr Memory memory_of(DeviceKind device) {
  return device == DeviceKind::kCuda ? Memory::kDevice : Memory::kHost;
}

// Uninitialised bytes, aligned to 256. Move-only; freed on destruction. Throws a run error that names `what`, the bytes
// asked for and the bytes free when memory is short.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Memory memory, std::int64_t bytes, std::string_view what);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  [[nodiscard]] void* data() const { return data_; }
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }
  [[nodiscard]] Memory memory() const { return memory_; }

  // The first `product of extents` elements, as a typed view. The buffer must outlive it.
  template <typename T, std::integral... Extents>
  [[nodiscard]] TensorView<T, static_cast<int>(sizeof...(Extents))> view(Extents... extents) const {
    TensorView<T, static_cast<int>(sizeof...(Extents))> typed(static_cast<T*>(data_), extents...);
    assert(typed.size() * static_cast<std::int64_t>(sizeof(T)) <= bytes_);
    return typed;
  }
  template <std::integral... Extents>
  [[nodiscard]] TensorRef ref(DType dtype, Extents... extents) const {
    TensorRef tagged = tensor_ref(data_, dtype, extents...);
    assert(tagged.bytes() <= bytes_);
    return tagged;
  }

 private:
  void release() noexcept;

  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
  Memory memory_ = Memory::kHost;
};

// What all Buffers of the process have taken so far, by kind of memory.
struct AllocationCount {
  std::int64_t allocations = 0;  // since the process started
  std::int64_t live_bytes = 0;
  std::int64_t peak_bytes = 0;
};
AllocationCount allocation_count(Memory memory);
// Lets peak_bytes begin anew, with what is live.
void restart_peak(Memory memory);

}  // namespace vesper
