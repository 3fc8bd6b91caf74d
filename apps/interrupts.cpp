// The self-pipe trick with an eventfd: whichever thread the signal reaches, poll() in the main thread wakes up.
#include "apps/interrupts.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>

#include "engine/core/error.h"

namespace vesper {
namespace {

int event = -1;  // of the one Interrupts

void on_interrupt(int /*signal*/) {
  const int error = errno;
  const std::uint64_t one = 1;
  (void)!write(event, &one, sizeof(one));  // async-signal-safe, and nothing to do where it fails
  errno = error;
}

}  // namespace

Interrupts::Interrupts() {
  event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (event < 0) fail({"waiting for Ctrl-C", std::strerror(errno), "an event descriptor", ""});
  (void)std::signal(SIGINT, on_interrupt);
}

Interrupts::~Interrupts() {
  (void)std::signal(SIGINT, SIG_DFL);
  close(event);
}

bool Interrupts::pending() const {
  pollfd ready{event, POLLIN, 0};
  return poll(&ready, 1, 0) == 1;
}

void Interrupts::clear() {
  std::uint64_t count = 0;
  (void)!read(event, &count, sizeof(count));
}

int Interrupts::descriptor() const {
  return event;
}

}  // namespace vesper
