// The GPU's clocks and what holds them down, beside every measurement. From NVML, which comes with the driver; it is
// looked for at run time, so that nothing links to it.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace vesper {

struct ClockState {
  unsigned sm_mhz = 0;
  unsigned max_sm_mhz = 0;
  unsigned memory_mhz = 0;
  unsigned max_memory_mhz = 0;
  unsigned temperature_c = 0;
  double power_w = 0.0;
  std::vector<std::string> throttled_by;  // none: the card runs as fast as it may
};

// Of the current CUDA device; nothing where there is none or NVML does not answer.
std::optional<ClockState> read_clocks();

// "1980 of 1980 MHz, memory 2619 of 2619 MHz, 54 C, 412 W, not throttled", or "not available".
std::string describe_clocks(const std::optional<ClockState>& clocks);

}  // namespace vesper
