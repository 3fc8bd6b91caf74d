// Streams, events and copies of one CUDA device, usable from plain C++; on the CPU a Stream is nothing and copies are
// memcpy.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "engine/core/exec.h"

struct CUevent_st;      // cudaEvent_t is CUevent_st*
struct CUgraphExec_st;  // cudaGraphExec_t is CUgraphExec_st*

namespace vesper {

// What the machine offers. `free_bytes` is read at the call.
struct DeviceInfo {
  DeviceKind kind = DeviceKind::kCpu;
  std::string name;
  std::int64_t total_bytes = 0;
  std::int64_t free_bytes = 0;
  int multiprocessors = 0;     // CUDA only
  int compute_capability = 0;  // 90 for 9.0; CUDA only
  std::int64_t l2_bytes = 0;   // CUDA only
  int driver_version = 0;      // CUDA only, as cudaDriverGetVersion gives it
};

// Why CUDA cannot run here, or an empty string: "this build has no CUDA half", "no NVIDIA driver was found", ...
std::string cuda_unavailable_reason();

// Facts of the current CUDA device, or of the CPU and its memory.
DeviceInfo device_info(DeviceKind kind);

// Owns an execution queue. `Stream(kCpu)` costs nothing.
class Stream {
 public:
  explicit Stream(DeviceKind device);
  ~Stream();
  Stream(Stream&& other) noexcept;
  Stream& operator=(Stream&& other) noexcept;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  [[nodiscard]] Exec exec() const { return Exec{device_, stream_}; }
  // Waits until all queued work is done; a fault of an earlier kernel is thrown here.
  void synchronize() const;

 private:
  DeviceKind device_ = DeviceKind::kCpu;
  CUstream_st* stream_ = nullptr;
};

// A point in a stream, with a time stamp. CUDA only. Recorded into a graph, it is set anew by every replay.
class Event {
 public:
  Event();
  ~Event();
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(const Exec& exec);
  void synchronize() const;
  // Milliseconds from `start` to this event; both must have been reached.
  [[nodiscard]] float ms_since(const Event& start) const;

 private:
  CUevent_st* event_ = nullptr;
};

// Device work recorded once and replayed as one launch. CUDA only.
class Graph {
 public:
  // Records what `work` queues on exec's stream, and runs none of it. `work` must not wait for the device, and what it
  // names must keep its address as long as the graph is launched.
  static Graph capture(const Exec& exec, const std::function<void()>& work);

  ~Graph();
  Graph(Graph&& other) noexcept;
  Graph& operator=(Graph&& other) noexcept;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Queues the recorded work.
  void launch(const Exec& exec) const;

 private:
  explicit Graph(CUgraphExec_st* graph) : graph_(graph) {}

  CUgraphExec_st* graph_ = nullptr;
};

// Copies between any two memories, ordered on the stream. Host memory must stay untouched until the stream has passed
// (pinned memory makes the copy asynchronous).
void copy_bytes(const Exec& exec, void* to, const void* from, std::int64_t bytes);

// Waits until all that was queued on the stream is done.
void synchronize(const Exec& exec);

// Sets bytes to zero, ordered on the stream.
void zero_bytes(const Exec& exec, void* data, std::int64_t bytes);

}  // namespace vesper
