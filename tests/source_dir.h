// Where the data of the tests lies.
#pragma once

#include <cstdlib>
#include <string>

namespace vesper {

// The source tree; VESPER_TEST_ROOT, where it is set, names another folder with configs/ and tests/ (a bundle's root).
inline std::string source_dir() {
  const char* root = std::getenv("VESPER_TEST_ROOT");
  return root != nullptr && *root != '\0' ? root : VESPER_SOURCE_DIR;
}

}  // namespace vesper
