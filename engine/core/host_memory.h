// How much more host memory this process may take.
#pragma once

#include <cstdint>
#include <string>

namespace vesper {

// The least of what the machine has (MemAvailable), what the control groups around the process leave of their limits
// (a container's, a job's), and what `ulimit -v` leaves; -1 where none of them can be read. Cached pages of files count
// as free, as in MemAvailable: they are given back on demand. `root` stands before /proc and /sys, for tests.
// Sources: proc(5), the kernel's admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, getrlimit(2).
std::int64_t free_host_bytes(const std::string& root = "");

}  // namespace vesper
