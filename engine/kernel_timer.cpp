#include "engine/kernel_timer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cmath>

#include "engine/core/error.h"
#include "engine/core/stream.h"
#include "engine/roof.h"

namespace vesper {
namespace {

constexpr int kDeviceReplays = 9;
constexpr int kHostReplays = 3;
constexpr int kLeastLaunches = 24;  // of a replay: its begin and end are shared out over them
constexpr std::int64_t kCacheFactor = 4;
constexpr std::int64_t kMostTurns = 256;
constexpr std::int64_t kMostHostTurns = 8;  // a CPU's times say little; its turns take long

}  // namespace

std::vector<double> time_turns(const Exec& exec, int turns, const std::function<void(int turn)>& queue) {
  return time_arms(exec, turns, {queue}).front();
}

std::vector<std::vector<double>> time_arms(const Exec& exec, int turns, const std::vector<QueueTurn>& queues) {
  const auto all = [&](const QueueTurn& queue) {
    for (int turn = 0; turn < turns; ++turn) queue(turn);
  };
  std::vector<std::vector<double>> seconds(queues.size());
  for (const QueueTurn& queue : queues) all(queue);  // loads code, finds algorithms, fills the output that is checked
  synchronize(exec);
  if (!exec.on_cuda()) {
    for (int i = 0; i < kHostReplays; ++i) {
      for (std::size_t arm = 0; arm < queues.size(); ++arm) {
        const auto begin = std::chrono::steady_clock::now();
        all(queues[arm]);
        const double passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        seconds[arm].push_back(passed / turns);
      }
    }
    return seconds;
  }
  const int rounds = std::max(1, kLeastLaunches / turns);
  std::vector<Graph> graphs;
  for (const QueueTurn& queue : queues) {
    graphs.push_back(Graph::capture(exec, [&] {
      for (int round = 0; round < rounds; ++round) all(queue);
    }));
    graphs.back().launch(exec);
  }
  std::vector<Event> events(kDeviceReplays * queues.size() + 1);
  events[0].record(exec);
  for (std::size_t i = 0; i + 1 < events.size(); ++i) {
    graphs[i % graphs.size()].launch(exec);
    events[i + 1].record(exec);
  }
  synchronize(exec);
  for (std::size_t i = 0; i + 1 < events.size(); ++i) {
    const double passed = static_cast<double>(events[i + 1].ms_since(events[i])) * 1e-3;
    seconds[i % graphs.size()].push_back(passed / (rounds * turns));
  }
  return seconds;
}

int turns_over(DeviceKind device, std::int64_t bytes, std::int64_t touched, std::int64_t room) {
  const std::int64_t most = device == DeviceKind::kCuda ? kMostTurns : kMostHostTurns;
  const std::int64_t wanted = kCacheFactor * last_cache_bytes(device) / touched + 1;
  const std::int64_t turns = std::min(std::min(wanted, most), room / bytes);
  return turns < std::min<std::int64_t>(wanted, 2) ? 0 : static_cast<int>(turns);
}

std::string check_near(const std::string& what, const std::vector<float>& found, const std::vector<float>& expected,
                       const std::vector<float>& bound) {
  assert(found.size() == expected.size() && found.size() == bound.size());
  double worst = 0.0;
  std::size_t at = 0;
  std::size_t outside = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (found[i] == expected[i]) continue;  // infinities too
    const double distance = std::abs(static_cast<double>(found[i]) - expected[i]) / bound[i];
    const bool in = distance <= 1.0;  // false for NaN
    outside += in ? 0 : 1;
    if (in && distance <= worst) continue;
    if (in && outside > 0) continue;
    worst = distance;
    at = i;
  }
  if (outside > 0) {
    fail({"checking the output of " + what,
          fmt::format("{} of {} elements outside their bounds, element {} is {}", outside, found.size(), at, found[at]),
          fmt::format("{} within {}", expected[at], bound[at]), "this kernel is wrong on this device; report it"});
  }
  return fmt::format("CPU, {:.2f} of its bound", worst);
}

}  // namespace vesper
