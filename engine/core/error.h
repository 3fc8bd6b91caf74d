// Errors that a user or an operator can act on, and the two exit codes they lead to.
#pragma once

#include <stdexcept>
#include <string>

namespace vesper {

// Who can mend it. `kInput`: the request or a file is wrong (exit code 2). `kRun`: something failed while running, a
// driver call or a full disk (exit code 1).
enum class Fault { kInput, kRun };

// The four parts of a message. `doing` names the file, tensor, key or flag at hand; `change` says what the reader can
// do next and may stay empty where `expected` says it already.
struct ErrorParts {
  std::string doing;
  std::string found;
  std::string expected;
  std::string change;
};

// One sentence: "<doing>: found <found>, expected <expected>; <change>". Only `main` catches it.
class Error : public std::runtime_error {
 public:
  Error(Fault fault, const ErrorParts& parts);
  [[nodiscard]] Fault fault() const noexcept { return fault_; }

 private:
  Fault fault_;
};

// Throws an input error (exit code 2).
[[noreturn]] void refuse(const ErrorParts& parts);

// Throws a run error (exit code 1).
[[noreturn]] void fail(const ErrorParts& parts);

}  // namespace vesper
