// Where an operation runs.
#pragma once

struct CUstream_st;  // cudaStream_t is CUstream_st*; naming it here keeps CUDA's headers out of ours.

namespace vesper {

// Whether this build holds the CUDA half.
inline constexpr bool kHaveCuda = VESPER_HAVE_CUDA != 0;

enum class DeviceKind { kCpu, kCuda };

// Passed first to every operation that touches tensor data. On CUDA the operation is queued on `stream` and returns
// at once; on the CPU it is done when the call returns.
struct Exec {
  DeviceKind device = DeviceKind::kCpu;
  CUstream_st* stream = nullptr;
  [[nodiscard]] bool on_cuda() const { return device == DeviceKind::kCuda; }
};

}  // namespace vesper
