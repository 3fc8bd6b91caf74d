// Ctrl-C as something that can be asked for, instead of the program's end.
#pragma once

namespace vesper {

// For as long as one lives, SIGINT ends nothing. At most one at a time.
class Interrupts {
 public:
  Interrupts();
  ~Interrupts();  // SIGINT ends the program again
  Interrupts(const Interrupts&) = delete;
  Interrupts& operator=(const Interrupts&) = delete;
  Interrupts(Interrupts&&) = delete;
  Interrupts& operator=(Interrupts&&) = delete;

  // Whether one has come since the last clear().
  [[nodiscard]] bool pending() const;
  void clear();
  // Becomes readable with an interrupt, for poll().
  [[nodiscard]] int descriptor() const;
};

}  // namespace vesper
