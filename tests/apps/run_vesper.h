// Runs the vesper binary as a user does: a child process, its two outputs apart, its exit code, under a time limit.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "tests/source_dir.h"

namespace vesper {

struct RunSettings {
  std::string input{};                                             // what stdin gives before it ends
  std::vector<std::pair<std::string, std::string>> environment{};  // set in the child only
  std::string stdout_path{};                                       // where stdout goes instead of into the result
  std::string stderr_path{};                                       // the same for stderr
  std::vector<int> closed{};                                       // standard descriptors that the child has not
  std::int64_t interrupt_after = -1;                               // SIGINT once stdout has given this many bytes
  int limit_s = 120;
};

struct RunResult {
  int exit_code = -1;  // -1: a signal ended it
  std::string out;
  std::string err;
};

// VESPER_BINARY, else a bundle's bin/vesper, else the one that was built with this test.
inline std::string vesper_binary() {
  if (const char* binary = std::getenv("VESPER_BINARY"); binary != nullptr && *binary != '\0') return binary;
  const char* root = std::getenv("VESPER_TEST_ROOT");
  return root != nullptr && *root != '\0' ? std::string(root) + "/bin/vesper" : VESPER_BUILT_BINARY;
}

inline std::string demo_model() {
  return source_dir() + "/configs/demo";
}

// Fails the test where the binary cannot be started, a signal ends it, or the time is up (it is killed then).
RunResult run_vesper(const std::vector<std::string>& arguments, const RunSettings& settings = {});

// The same for what must succeed: a failure shows stderr.
RunResult run_well(const std::vector<std::string>& arguments, const RunSettings& settings = {});

// The one line "error: ..." of a run that must end with exit code 2 and print nothing on stdout. Lines of information
// may come before it.
std::string refused(const std::vector<std::string>& arguments, const RunSettings& settings = {});

}  // namespace vesper
