// Every kernel family alone, at a decoder's shapes, against the bytes and flops that it cannot do without.
//
// Each runs over several layers' worth of distinct data in turn, as many as touch more than four times the last cache
// or fit in memory, so that it finds its data cold; where it may not, its row says so. On CUDA the turns are one graph,
// replayed and timed by events: a time is that of a replay over its turns, launch gaps included. The output of the
// first turn is checked in the same run, of the attention kernels for the first sequence and KV head, against the CPU's
// functions over the same stored bits.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/bench_fill.h"
#include "engine/core/clocks.h"
#include "engine/core/cost.h"
#include "engine/roof.h"

namespace vesper {

// What can be measured without the rest. The lists of twilight and vattention come from quest's scores, so its rows
// come with theirs.
inline constexpr std::array kKernelFamilies = {"products", "append",     "dense",  "quest",
                                               "twilight", "vattention", "prefill"};

struct KernelSetting {
  std::string model;
  DeviceKind device = DeviceKind::kCpu;
  int page_tokens = 16;
  std::vector<int> contexts;
  std::vector<int> batches;
  DrawnScores scores;
  std::uint64_t seed = 0;
  std::vector<std::string> families;  // of kKernelFamilies; all where none is named

  [[nodiscard]] bool wants(const char* family) const {
    return families.empty() || std::find(families.begin(), families.end(), family) != families.end();
  }
};

struct KernelRow {
  std::string stage;   // linear, norm, activate, append, score, select, prune, sample, attend, attention, prefill, draw
  std::string kernel;  // and what it works on
  int context = 0;     // 0: does not matter
  int batch = 0;
  std::vector<double> seconds;    // a launch: one entry a replay
  Cost cost;                      // a launch
  int turns = 0;                  // of distinct data
  std::optional<double> rival_s;  // cuBLASLt's median for the same product
  std::string check;              // against what, and how near
};

struct KernelReport {
  std::vector<KernelRow> rows;
  std::int64_t cache_bytes = 0;  // of the last cache
  std::vector<std::string> skipped;
  Roof roof;
  std::optional<ClockState> clocks_before;
  std::optional<ClockState> clocks_after;
};

// Whether what a round of turns touches is over twice the last cache, so that no launch finds its data there.
bool is_cold(const KernelRow& row, std::int64_t cache_bytes);

// Throws a run error where an output is not what it must be.
KernelReport run_kernel_bench(const KernelSetting& setting,
                              const std::function<void(std::int64_t done, std::int64_t total)>& progress);

}  // namespace vesper
