// A build without the CUDA toolkit: nothing here is reached once `unavailable_reason` has been asked.
#include "engine/core/device.h"
#include "engine/core/error.h"

namespace vesper::cuda {
namespace {

[[noreturn]] void no_cuda() {
  refuse({"using CUDA", unavailable_reason(), "a GPU build", "use --device cpu"});
}

}  // namespace

std::string unavailable_reason() {
  return "this build has no CUDA half (no CUDA toolkit was found when it was built)";
}
DeviceInfo current_device_info() {
  no_cuda();
}
std::string current_bus_id() {
  no_cuda();
}
void* allocate_device(std::int64_t) {
  no_cuda();
}
void* allocate_pinned(std::int64_t) {
  no_cuda();
}
void release_device(void*) noexcept {}
void release_pinned(void*) noexcept {}
CUstream_st* create_stream() {
  no_cuda();
}
void destroy_stream(CUstream_st*) noexcept {}
void synchronize_stream(CUstream_st*) {
  no_cuda();
}
CUevent_st* create_event() {
  no_cuda();
}
void destroy_event(CUevent_st*) noexcept {}
void record_event(CUevent_st*, CUstream_st*) {
  no_cuda();
}
void synchronize_event(CUevent_st*) {
  no_cuda();
}
float event_ms_between(CUevent_st*, CUevent_st*) {
  no_cuda();
}
void begin_capture(CUstream_st*) {
  no_cuda();
}
CUgraphExec_st* end_capture(CUstream_st*) {
  no_cuda();
}
void abandon_capture(CUstream_st*) noexcept {}
void launch_graph(CUgraphExec_st*, CUstream_st*) {
  no_cuda();
}
void destroy_graph(CUgraphExec_st*) noexcept {}
void copy_async(void*, const void*, std::int64_t, CUstream_st*) {
  no_cuda();
}
void zero_async(void*, std::int64_t, CUstream_st*) {
  no_cuda();
}

}  // namespace vesper::cuda
