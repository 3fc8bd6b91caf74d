#include "engine/core/stream.h"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <utility>

#include "engine/core/device.h"
#include "engine/core/host_memory.h"

namespace vesper {
namespace {

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "CPU";
}

}  // namespace

std::string cuda_unavailable_reason() {
  return cuda::unavailable_reason();
}

DeviceInfo device_info(DeviceKind kind) {
  if (kind == DeviceKind::kCuda) return cuda::current_device_info();
  DeviceInfo info;
  info.name = cpu_name();
  info.total_bytes = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  const std::int64_t available = free_host_bytes();
  info.free_bytes = available >= 0 ? available : info.total_bytes;
  return info;
}

Stream::Stream(DeviceKind device) : device_(device) {
  if (device == DeviceKind::kCuda) stream_ = cuda::create_stream();
}

Stream::~Stream() {
  if (stream_ != nullptr) cuda::destroy_stream(stream_);
}

Stream::Stream(Stream&& other) noexcept : device_(other.device_), stream_(std::exchange(other.stream_, nullptr)) {}

Stream& Stream::operator=(Stream&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(stream_, other.stream_);
  return *this;
}

void Stream::synchronize() const {
  if (stream_ != nullptr) cuda::synchronize_stream(stream_);
}

Event::Event() : event_(cuda::create_event()) {}

Event::~Event() {
  if (event_ != nullptr) cuda::destroy_event(event_);
}

Event::Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}

Event& Event::operator=(Event&& other) noexcept {
  std::swap(event_, other.event_);
  return *this;
}

void Event::record(const Exec& exec) {
  cuda::record_event(event_, exec.stream);
}

void Event::synchronize() const {
  cuda::synchronize_event(event_);
}

float Event::ms_since(const Event& start) const {
  return cuda::event_ms_between(start.event_, event_);
}

Graph Graph::capture(const Exec& exec, const std::function<void()>& work) {
  cuda::begin_capture(exec.stream);
  try {
    work();
  } catch (...) {
    cuda::abandon_capture(exec.stream);
    throw;
  }
  return Graph(cuda::end_capture(exec.stream));
}

Graph::~Graph() {
  if (graph_ != nullptr) cuda::destroy_graph(graph_);
}

Graph::Graph(Graph&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}

Graph& Graph::operator=(Graph&& other) noexcept {
  std::swap(graph_, other.graph_);
  return *this;
}

void Graph::launch(const Exec& exec) const {
  cuda::launch_graph(graph_, exec.stream);
}

void synchronize(const Exec& exec) {
  if (exec.on_cuda()) cuda::synchronize_stream(exec.stream);
}

void copy_bytes(const Exec& exec, void* to, const void* from, std::int64_t bytes) {
  if (bytes <= 0) return;
  if (exec.on_cuda()) return cuda::copy_async(to, from, bytes, exec.stream);
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

void zero_bytes(const Exec& exec, void* data, std::int64_t bytes) {
  if (bytes <= 0) return;
  if (exec.on_cuda()) return cuda::zero_async(data, bytes, exec.stream);
  std::memset(data, 0, static_cast<std::size_t>(bytes));
}

}  // namespace vesper
