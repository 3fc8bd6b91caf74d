// The engine's tests are compiled twice: for the CPU and for CUDA, where they skip on a machine without a GPU.
#pragma once

#include "tests/gpu.h"

namespace vesper {

inline constexpr DeviceKind kTestDevice = DeviceKind::VESPER_TEST_DEVICE;

class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if constexpr (kTestDevice == DeviceKind::kCuda) VESPER_NEEDS_GPU();
  }
};

}  // namespace vesper
