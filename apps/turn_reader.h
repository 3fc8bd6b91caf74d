// The lines that a user types or a pipe brings.
#pragma once

#include <optional>
#include <string>

#include "apps/interrupts.h"

namespace vesper {

class TurnReader {
 public:
  // `interrupts` outlives this.
  explicit TurnReader(const Interrupts& interrupts) : interrupts_(interrupts) {}

  // The next line of stdin without its end; nothing at the end of stdin and at an interrupt. Throws an input error for
  // a line of more than 16 MiB and where stdin cannot be read.
  std::optional<std::string> next();

 private:
  std::optional<std::string> take_line(bool at_end);

  const Interrupts& interrupts_;
  std::string pending_;
};

}  // namespace vesper
