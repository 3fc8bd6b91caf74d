// What `vesper bench` prints and saves.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "engine/bench.h"
#include "engine/crossover.h"
#include "engine/kernel_bench.h"

namespace vesper {

// Tables of times, of bytes and of attention, with what they were measured on and the rulers beside them.
std::string bench_markdown(const BenchSetting& setting, const BenchReport& report);
// {"model", "device", "roof", "clocks", "rows": [a member for each of bench_columns(), and "stages" where
// they were timed], "skipped"}.
nlohmann::json bench_json(const BenchSetting& setting, const BenchReport& report);
// A head and a line a row.
std::string bench_csv(const BenchReport& report);

// The same of `--kernels`: a row a kernel, by stage.
std::string kernels_markdown(const KernelSetting& setting, const KernelReport& report);
nlohmann::json kernels_json(const KernelSetting& setting, const KernelReport& report);
std::string kernels_csv(const KernelReport& report);

// The same of `--crossover`: what was measured, and the lines of configuration that come of it.
std::string crossover_markdown(const BenchSetting& setting, const CrossoverReport& report);
nlohmann::json crossover_json(const BenchSetting& setting, const CrossoverReport& report);
std::string crossover_csv(const CrossoverReport& report);

// Every figure and its meaning, a line each: for --help.
std::string bench_definitions();

}  // namespace vesper
