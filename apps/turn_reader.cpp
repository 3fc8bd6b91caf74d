#include "apps/turn_reader.h"

#include <poll.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr std::size_t kMaxLineBytes = std::size_t{16} << 20;

}  // namespace

// By hand, not by std::getline: an interrupt must reach a program that waits for a line.
std::optional<std::string> TurnReader::next() {
  while (true) {
    if (std::optional<std::string> line = take_line(/*at_end=*/false)) return line;
    if (pending_.size() > kMaxLineBytes) {
      refuse({"reading stdin", "a line of more than " + std::to_string(kMaxLineBytes) + " bytes", "one turn a line",
              "shorten it"});
    }
    std::array<pollfd, 2> ready = {pollfd{STDIN_FILENO, POLLIN, 0}, {interrupts_.descriptor(), POLLIN, 0}};
    if (poll(ready.data(), ready.size(), -1) < 0 && errno != EINTR)
      fail({"waiting for stdin", std::strerror(errno), "", ""});
    if (interrupts_.pending()) return std::nullopt;
    if (ready[0].revents == 0) continue;
    std::array<char, 65536> buffer;
    const ssize_t count = read(STDIN_FILENO, buffer.data(), buffer.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) refuse({"reading stdin", std::strerror(errno), "lines of text", ""});
    if (count == 0) return take_line(/*at_end=*/true);
    pending_.append(buffer.data(), static_cast<std::size_t>(count));
  }
}

std::optional<std::string> TurnReader::take_line(bool at_end) {
  const std::size_t end = pending_.find('\n');
  if (end == std::string::npos && (!at_end || pending_.empty())) return std::nullopt;
  std::string line = pending_.substr(0, end);
  pending_.erase(0, end == std::string::npos ? end : end + 1);
  if (line.ends_with('\r')) line.pop_back();
  return line;
}

}  // namespace vesper
