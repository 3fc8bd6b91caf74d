// The one way a kernel is launched, and the one way a CUDA call is checked.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>
#include <string>
#include <utility>

#include "engine/core/error.h"

namespace vesper::cuda {

// Throws a run error that names what was being done, where, and the driver's word for what went wrong.
inline void check(cudaError_t status, const char* doing, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (status == cudaSuccess) return;
  fail({std::string(doing) + " (" + file + ":" + std::to_string(line) + ")",
        std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status), "",
        "VESPER_SYNC_LAUNCH=1 names the kernel that caused it"});
}

inline constexpr int kMaxCluster = 8;  // blocks of a cluster; more are not portable

struct Dims {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  bool overlap = false;      // may begin before the kernel in front of it ends: engine/core/overlap.cuh
  dim3 cluster = dim3(1);    // neighbouring blocks that run side by side as one cluster; divides the grid
  bool cooperative = false;  // all blocks run at the same time
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "asking for the current GPU");
  check(cudaDeviceGetAttribute(&value, attribute, device), "reading the GPU's properties");
  return value;
}

// Multiprocessors of the current device.
inline int multiprocessor_count() {
  static const int count = device_attribute(cudaDevAttrMultiProcessorCount);
  return count;
}

// Bytes of shared memory of one of them.
inline std::size_t multiprocessor_shared_bytes() {
  static const auto bytes = static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  return bytes;
}

// The compute capability, times ten, that the current device's code of `kernel` was written for: less than the device's
// own where a build for older devices runs by translation, without what only newer ones have.
template <typename... Params>
int code_version(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "reading a kernel's properties");
  return attributes.ptxVersion;
}

// Shared memory beyond the default limit of 48 KiB has to be asked for; a kernel's static part counts towards that
// limit, and is at most 16 KiB in kernels that have a dynamic one.
template <typename... Params>
void allow_shared_bytes(void (*kernel)(Params...), std::size_t bytes, const char* name) {
  if (bytes <= std::size_t{32} * 1024) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

// Whether kernels wait for those before them themselves: all that are built alike, as those of one type are.
template <typename... Params>
bool launches_can_overlap(void (*kernel)(Params...)) {
  static const bool can = code_version(kernel) >= 90;
  return can;
}

// Blocks of `kernel` that a multiprocessor runs side by side; 0 where it does not have the shared memory for one.
template <typename... Params>
int resident_blocks(void (*kernel)(Params...), int threads, std::size_t shared_bytes) {
  const auto most = static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (shared_bytes + std::size_t{16} * 1024 > most) return 0;
  allow_shared_bytes(kernel, shared_bytes, "asking for shared memory");
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), "asking for occupancy");
  return blocks;
}

inline unsigned cluster_size(const Dims& dims) {
  return dims.cluster.x * dims.cluster.y * dims.cluster.z;
}
inline cudaLaunchAttribute cluster_attribute(const Dims& dims) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {dims.cluster.x, dims.cluster.y, dims.cluster.z};
  return cluster;
}
// What every launch has; attributes are added.
inline cudaLaunchConfig_t plain_config(const Dims& dims) {
  cudaLaunchConfig_t config{};
  config.gridDim = dims.grid;
  config.blockDim = dims.block;
  config.dynamicSmemBytes = dims.shared_bytes;
  return config;
}

// Clusters of more blocks than every device has room for have to be asked for too.
template <typename... Params>
void allow_wide_clusters(void (*kernel)(Params...), const Dims& dims, const char* name) {
  if (cluster_size(dims) <= static_cast<unsigned>(kMaxCluster)) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
}

// Clusters of `kernel` that the device runs side by side; 0 where it has none of that size.
template <typename... Params>
int resident_clusters(void (*kernel)(Params...), const Dims& dims) {
  allow_shared_bytes(kernel, dims.shared_bytes, "asking for shared memory");
  allow_wide_clusters(kernel, dims, "asking for wide clusters");
  cudaLaunchConfig_t config = plain_config(dims);
  cudaLaunchAttribute cluster = cluster_attribute(dims);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
  cudaGetLastError();  // a size that the device does not know
  return 0;
}

// Launches `kernel` and checks the launch at once. With VESPER_SYNC_LAUNCH=1 in the environment it also waits, so that
// a fault is reported by the kernel that caused it.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const Dims& dims, cudaStream_t stream, Args&&... args) {
  static const bool sync = std::getenv("VESPER_SYNC_LAUNCH") != nullptr;
  allow_shared_bytes(kernel, dims.shared_bytes, name);
  cudaLaunchConfig_t config = plain_config(dims);
  config.stream = stream;
  cudaLaunchAttribute attributes[3] = {};
  config.attrs = attributes;
  if (dims.overlap && launches_can_overlap(kernel)) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster_size(dims) > 1) {
    attributes[config.numAttrs++] = cluster_attribute(dims);
    allow_wide_clusters(kernel, dims, name);
  }
  if (dims.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
  if (sync) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capture), name);
    if (capture == cudaStreamCaptureStatusNone) check(cudaStreamSynchronize(stream), name);
  }
}

}  // namespace vesper::cuda
