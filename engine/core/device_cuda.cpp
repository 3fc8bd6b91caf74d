#include <array>

#include "engine/core/device.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {

std::string unavailable_reason() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice) {
    (void)cudaGetLastError();
    int driver = 0;
    (void)cudaDriverGetVersion(&driver);
    if (driver == 0) return "no NVIDIA driver was found";
    if (status == cudaErrorNoDevice) return "the NVIDIA driver reports no GPU";
    return "the NVIDIA driver supports CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + " and is older than this build's CUDA runtime";
  }
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    return std::string("the CUDA runtime answers ") + cudaGetErrorString(status);
  }
  if (devices == 0) return "the NVIDIA driver reports no GPU";
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "reading the GPU's properties");
  if (properties.major < 8) {
    return std::string(properties.name) + " has compute capability " + std::to_string(properties.major) + "." +
           std::to_string(properties.minor) + " and vesper needs 8.0";
  }
  return "";
}

DeviceInfo current_device_info() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current GPU");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "reading the GPU's properties");
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "reading the GPU's free memory");
  DeviceInfo info;
  info.kind = DeviceKind::kCuda;
  info.name = properties.name;
  info.total_bytes = static_cast<std::int64_t>(total_bytes);
  info.free_bytes = static_cast<std::int64_t>(free_bytes);
  info.multiprocessors = properties.multiProcessorCount;
  info.compute_capability = properties.major * 10 + properties.minor;
  info.l2_bytes = properties.l2CacheSize;
  check(cudaDriverGetVersion(&info.driver_version), "reading the driver's version");
  return info;
}

std::string current_bus_id() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current GPU");
  std::array<char, 32> text{};
  check(cudaDeviceGetPCIBusId(text.data(), static_cast<int>(text.size()), device), "asking for the GPU's bus id");
  return text.data();
}

void* allocate_device(std::int64_t bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    return nullptr;
  }
  check(status, "allocating GPU memory");
  return data;
}

void* allocate_pinned(std::int64_t bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMallocHost(&data, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    return nullptr;
  }
  check(status, "allocating pinned memory");
  return data;
}

void release_device(void* data) noexcept {
  (void)cudaFree(data);
}
void release_pinned(void* data) noexcept {
  (void)cudaFreeHost(data);
}

CUstream_st* create_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a CUDA stream");
  return stream;
}
void destroy_stream(CUstream_st* stream) noexcept {
  (void)cudaStreamDestroy(stream);
}
void synchronize_stream(CUstream_st* stream) {
  check(cudaStreamSynchronize(stream), "waiting for the GPU");
}

CUevent_st* create_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "creating a CUDA event");
  return event;
}
void destroy_event(CUevent_st* event) noexcept {
  (void)cudaEventDestroy(event);
}
void record_event(CUevent_st* event, CUstream_st* stream) {
  // While a graph is recorded, an event is a node of it, and each replay sets its time anew.
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture), "asking whether a CUDA graph is being recorded");
  const unsigned flags = capture == cudaStreamCaptureStatusNone ? cudaEventRecordDefault : cudaEventRecordExternal;
  check(cudaEventRecordWithFlags(event, stream, flags), "recording a CUDA event");
}
void synchronize_event(CUevent_st* event) {
  check(cudaEventSynchronize(event), "waiting for a CUDA event");
}
float event_ms_between(CUevent_st* start, CUevent_st* end) {
  float ms = 0.0F;
  check(cudaEventElapsedTime(&ms, start, end), "reading the time between CUDA events");
  return ms;
}

// Relaxed: a kernel's first launch loads its code, which other modes refuse while they record.
void begin_capture(CUstream_st* stream) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "beginning to record a CUDA graph");
}
CUgraphExec_st* end_capture(CUstream_st* stream) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream, &graph), "recording a CUDA graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  (void)cudaGraphDestroy(graph);
  check(status, "instantiating a CUDA graph");
  return executable;
}
void abandon_capture(CUstream_st* stream) noexcept {
  cudaGraph_t graph = nullptr;
  (void)cudaStreamEndCapture(stream, &graph);
  if (graph != nullptr) (void)cudaGraphDestroy(graph);
  (void)cudaGetLastError();
}
void launch_graph(CUgraphExec_st* graph, CUstream_st* stream) {
  check(cudaGraphLaunch(graph, stream), "launching a CUDA graph");
}
void destroy_graph(CUgraphExec_st* graph) noexcept {
  (void)cudaGraphExecDestroy(graph);
}

void copy_async(void* to, const void* from, std::int64_t bytes, CUstream_st* stream) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream), "copying memory");
}
void zero_async(void* data, std::int64_t bytes, CUstream_st* stream) {
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream), "zeroing memory");
}

}  // namespace vesper::cuda
