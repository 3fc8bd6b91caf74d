#include "apps/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

#include "engine/memory_plan.h"

namespace vesper {
namespace {

constexpr std::chrono::milliseconds kRedraw(100);
// What takes less is not worth a line, which would also clear the one that the cursor stands on.
constexpr std::chrono::milliseconds kPatience(500);

std::string amount_of(ProgressUnit unit, std::int64_t done, std::int64_t total, double rate) {
  if (unit == ProgressUnit::kBytes) {
    return fmt::format("{} of {}, {}/s", format_bytes(done), format_bytes(total),
                       format_bytes(static_cast<std::int64_t>(rate)));
  }
  if (unit == ProgressUnit::kCells) {
    return fmt::format("{:.1f} of {} cells", static_cast<double>(done) / 1000.0, total / 1000);
  }
  const char* what = unit == ProgressUnit::kTokens ? "tokens" : unit == ProgressUnit::kSamples ? "samples" : "steps";
  return fmt::format("{} of {} {}, {:.0f}/s", done, total, what, rate);
}

}  // namespace

ProgressLine::ProgressLine(std::string title, ProgressUnit unit)
    : title_(std::move(title)), unit_(unit), terminal_(isatty(STDERR_FILENO) != 0) {}

ProgressLine::~ProgressLine() {
  finish();
}

void ProgressLine::update(std::int64_t done, std::int64_t total) {
  const Clock::time_point now = Clock::now();
  const bool worth_it = drawn_ || (now - start_ >= kPatience && done < total);
  if (!terminal_ || total <= 0 || !worth_it || (done < total && now - last_draw_ < kRedraw)) return;
  last_draw_ = now;
  drawn_ = true;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double rate = seconds > 0.0 ? static_cast<double>(done) / seconds : 0.0;
  const auto percent = static_cast<int>(100 * done / total);
  const std::string left =
      rate > 0.0 && done < total ? fmt::format(", {:.0f} s left", static_cast<double>(total - done) / rate) : "";
  fmt::print(stderr, "\r\x1b[K{} {:3} % ({}{})", title_, percent, amount_of(unit_, done, total, rate), left);
  std::fflush(stderr);
}

void ProgressLine::finish() {
  start_ = Clock::now();
  if (!drawn_) return;
  fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  drawn_ = false;
}

}  // namespace vesper
