// The driver's side of memory, streams and events: one implementation over CUDA (device_cuda.cpp), one that answers for
// a build without it (device_none.cpp). Only engine/core uses it.
#pragma once

#include <cstdint>
#include <string>

#include "engine/core/stream.h"

namespace vesper::cuda {

// Why CUDA cannot run here; empty where it can.
std::string unavailable_reason();
DeviceInfo current_device_info();
// The current GPU's place on the bus, "0000:41:00.0", by which NVML knows it too.
std::string current_bus_id();

// nullptr where memory is short.
void* allocate_device(std::int64_t bytes);
void* allocate_pinned(std::int64_t bytes);
void release_device(void* data) noexcept;
void release_pinned(void* data) noexcept;

CUstream_st* create_stream();
void destroy_stream(CUstream_st* stream) noexcept;
void synchronize_stream(CUstream_st* stream);

CUevent_st* create_event();
void destroy_event(CUevent_st* event) noexcept;
void record_event(CUevent_st* event, CUstream_st* stream);
void synchronize_event(CUevent_st* event);
float event_ms_between(CUevent_st* start, CUevent_st* end);

void begin_capture(CUstream_st* stream);
CUgraphExec_st* end_capture(CUstream_st* stream);
void abandon_capture(CUstream_st* stream) noexcept;
void launch_graph(CUgraphExec_st* graph, CUstream_st* stream);
void destroy_graph(CUgraphExec_st* graph) noexcept;

void copy_async(void* to, const void* from, std::int64_t bytes, CUstream_st* stream);
void zero_async(void* data, std::int64_t bytes, CUstream_st* stream);

}  // namespace vesper::cuda
