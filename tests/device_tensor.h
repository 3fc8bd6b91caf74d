// Tensors on the device for tests of CUDA operations: filled from floats or poisoned, and watched for writes beside
// them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "engine/core/buffer.h"
#include "engine/core/dispatch.h"
#include "engine/core/stream.h"

namespace vesper {

// Values as the 16-bit type (or f32) holds them.
inline std::vector<float> rounded(DType dtype, std::span<const float> values) {
  std::vector<float> result(values.begin(), values.end());
  dispatch_float(dtype, "rounding", [&](auto element) {
    for (float& value : result) value = to_float(from_float<decltype(element)>(value));
  });
  return result;
}

// A tensor between two guards, all of it bytes of 0xFF (a NaN in every floating type) until something is written. It
// starts `offset` elements after a 256-byte border.
class DeviceTensor {
 public:
  template <std::integral... Extents>
  DeviceTensor(const Exec& exec, std::int64_t offset, DType dtype, Extents... extents) : exec_(exec) {
    ref_ = tensor_ref(nullptr, dtype, extents...);
    before_ = kGuard + offset * dtype_bytes(dtype);
    memory_ = Buffer(Memory::kDevice, before_ + ref_.bytes() + kGuard, "a test's tensor");
    ref_.data = static_cast<char*>(memory_.data()) + before_;
    host_.assign(static_cast<std::size_t>(memory_.bytes()), '\xFF');
    copy_bytes(exec_, memory_.data(), host_.data(), memory_.bytes());
  }

  [[nodiscard]] const TensorRef& ref() const { return ref_; }
  template <typename T>
  [[nodiscard]] T* data() const {
    return static_cast<T*>(ref_.data);
  }

  // Rounds to the tensor's type.
  void write(std::span<const float> values) {
    dispatch_float(ref_.dtype, "writing a test's tensor", [&](auto element) {
      using T = decltype(element);
      std::vector<T> narrow(values.size());
      std::transform(values.begin(), values.end(), narrow.begin(), from_float<T>);
      write_bytes(narrow.data());
    });
  }
  void write_bytes(const void* from) {
    std::memcpy(host_.data() + before_, from, static_cast<std::size_t>(ref_.bytes()));
    copy_bytes(exec_, ref_.data, host_.data() + before_, ref_.bytes());
  }

  // Waits for the stream, checks the guards, and gives the bytes, valid until the next call.
  std::span<const char> read_bytes(const std::string& what) {
    copy_bytes(exec_, host_.data(), memory_.data(), memory_.bytes());
    copy_bytes_done();
    const auto untouched = [](char byte) { return byte == '\xFF'; };
    EXPECT_TRUE(std::all_of(host_.begin(), host_.begin() + before_, untouched)) << what << ": written before the start";
    EXPECT_TRUE(std::all_of(host_.end() - kGuard, host_.end(), untouched)) << what << ": written past the end";
    return {host_.data() + before_, static_cast<std::size_t>(ref_.bytes())};
  }
  std::vector<float> read(const std::string& what) {
    const std::span<const char> bytes = read_bytes(what);
    std::vector<float> values(static_cast<std::size_t>(ref_.size()));
    dispatch_float(ref_.dtype, "reading a test's tensor", [&](auto element) {
      using T = decltype(element);
      std::vector<T> narrow(values.size());
      std::memcpy(narrow.data(), bytes.data(), bytes.size());
      std::transform(narrow.begin(), narrow.end(), values.begin(), [](T value) { return to_float(value); });
    });
    return values;
  }

 private:
  static constexpr std::int64_t kGuard = 1024;

  void copy_bytes_done() {
    Event reached;
    reached.record(exec_);
    reached.synchronize();
  }

  Exec exec_;
  TensorRef ref_;
  Buffer memory_;
  std::vector<char> host_;
  std::int64_t before_ = 0;
};

}  // namespace vesper
