// A progress line on the terminal; nothing where stderr is no terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace vesper {

// Cells are counted in thousandths.
enum class ProgressUnit : std::uint8_t { kBytes, kTokens, kSamples, kSteps, kCells };

// Redraws one line of stderr at most ten times a second: title, share, amount, rate, time left. Nothing for what takes
// less than half a second. finish() clears it and begins anew.
class ProgressLine {
 public:
  ProgressLine(std::string title, ProgressUnit unit);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ProgressLine(ProgressLine&&) = delete;
  ProgressLine& operator=(ProgressLine&&) = delete;

  void update(std::int64_t done, std::int64_t total);
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  std::string title_;
  ProgressUnit unit_;
  bool terminal_;
  bool drawn_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_draw_;
};

}  // namespace vesper
