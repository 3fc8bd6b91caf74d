#include "engine/core/parallel.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "engine/core/error.h"

namespace vesper {
namespace {

// How long an idle worker spins before it sleeps. A decode step has some sixty short parallel regions; waking a
// sleeping thread for each would cost more than the work.
constexpr int kSpins = 4000;

int threads_from_environment() {
  if (const char* text = std::getenv("VESPER_THREADS"); text != nullptr) {
    int threads = 0;
    const char* end = text + std::strlen(text);
    const auto [stop, error] = std::from_chars(text, end, threads);
    if (error != std::errc() || stop != end || threads < 1 || threads > 1024) {
      refuse({"reading VESPER_THREADS", std::string("\"") + text + "\"", "a number from 1 to 1024", ""});
    }
    return threads;
  }
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// One region of work at a time. Each region has a number; workers join the region they see, and the caller leaves only
// when none is inside.
class Pool {
 public:
  explicit Pool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {  // a limit of processes, or no memory for a stack
      const std::size_t started = workers_.size() + 1;
      stop();
      fail({"starting " + std::to_string(threads) + " threads",
            std::string(error.what()) + " after " + std::to_string(started), "",
            "raise the limit (ulimit -u, ulimit -v) or set VESPER_THREADS to fewer"});
    }
  }

  ~Pool() { stop(); }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  Pool(Pool&&) = delete;
  Pool& operator=(Pool&&) = delete;

  [[nodiscard]] int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(std::int64_t count, std::int64_t chunk, const std::function<void(std::int64_t, std::int64_t)>& body) {
    const std::scoped_lock one_region(region_mutex_);
    {
      const std::scoped_lock lock(mutex_);
      body_ = &body;
      count_ = count;
      chunk_ = chunk;
      next_.store(0);
      error_ = nullptr;
      open_ = true;
      region_.fetch_add(1);
    }
    wake_.notify_all();
    drain();
    {
      const std::scoped_lock lock(mutex_);
      open_ = false;
    }
    while (inside_.load() != 0) std::this_thread::yield();
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

  static bool& inside_region() {
    thread_local bool inside = false;
    return inside;
  }

 private:
  void stop() {
    {
      const std::scoped_lock lock(mutex_);
      stopping_.store(true);
      region_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void drain() {
    inside_region() = true;
    for (;;) {
      const std::int64_t begin = next_.fetch_add(chunk_);
      if (begin >= count_) break;
      try {
        (*body_)(begin, std::min(count_, begin + chunk_));
      } catch (...) {
        const std::scoped_lock lock(mutex_);
        if (error_ == nullptr) error_ = std::current_exception();
        next_.store(count_);
      }
    }
    inside_region() = false;
  }

  void work() {
    std::uint64_t seen = 0;
    while (!stopping_.load()) {
      for (int spin = 0; spin < kSpins && region_.load() == seen; ++spin) __builtin_ia32_pause();
      bool joined = false;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return region_.load() != seen; });
        seen = region_.load();
        joined = open_;
        if (joined) inside_.fetch_add(1);
      }
      if (!joined) continue;
      drain();
      inside_.fetch_sub(1);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex region_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> region_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> inside_{0};
  const std::function<void(std::int64_t, std::int64_t)>* body_ = nullptr;
  std::int64_t count_ = 0;
  std::int64_t chunk_ = 1;
  bool open_ = false;
  std::exception_ptr error_;
};

Pool& pool() {
  static Pool instance(threads_from_environment());
  return instance;
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<std::int64_t>(1, grain);
  if (count <= grain || Pool::inside_region() || pool().threads() == 1) return body(0, count);
  // Four chunks a thread let a thread that was delayed be overtaken.
  const std::int64_t chunk = std::max(grain, count / (std::int64_t{4} * pool().threads()));
  pool().run(count, chunk, body);
}

int cpu_threads() {
  return pool().threads();
}

}  // namespace vesper
