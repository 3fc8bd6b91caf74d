// The CPU's worker threads.
#pragma once

#include <cstdint>
#include <functional>

namespace vesper {

// Runs `body(begin, end)` over disjoint ranges that cover [0, count), on all CPU threads, and waits. Ranges hold at
// least `grain` items, except the last. Calls from inside a body run in place. The first exception is rethrown.
void parallel_for(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body);

// Threads that parallel_for uses: VESPER_THREADS where it is set (1 to 1024), else what the process may run on.
int cpu_threads();

}  // namespace vesper
