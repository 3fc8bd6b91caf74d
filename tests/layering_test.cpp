// Every `#include "folder/..."` follows the arrows of docs/architecture.md, which are the arrows of the CMake targets.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>

#include "tests/source_dir.h"

namespace {

namespace fs = std::filesystem;

// What each folder may include, besides itself.
const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"engine/core", {}},
    {"kvcache", {"engine/core"}},
    {"attention", {"engine/core", "kvcache"}},
    {"models", {"engine/core", "kvcache", "attention"}},
    {"tokenizer", {"engine/core"}},
    {"engine", {"engine/core", "kvcache", "attention", "models", "tokenizer"}},
    {"apps", {"engine/core", "kvcache", "attention", "models", "tokenizer", "engine"}},
};

std::string folder_of(const std::string& path) {
  if (path.starts_with("engine/core/")) return "engine/core";
  return path.substr(0, path.find('/'));
}

TEST(Layering, EveryIncludeFollowsTheArrows) {
  const fs::path root = vesper::source_dir();
  if (!fs::exists(root / "CMakeLists.txt")) GTEST_SKIP() << "the source tree is not on this machine";
  int includes = 0;
  for (const auto& [folder, allowed] : kMayInclude) {
    for (const auto& entry : fs::recursive_directory_iterator(root / folder)) {
      const std::string path = fs::relative(entry.path(), root).generic_string();
      if (!entry.is_regular_file() || folder_of(path) != folder) continue;
      std::ifstream file(entry.path());
      std::string line;
      for (int number = 1; std::getline(file, line); ++number) {
        if (!line.starts_with("#include \"")) continue;
        const std::string target = line.substr(10, line.find('"', 10) - 10);
        ++includes;
        EXPECT_TRUE(fs::exists(root / target))
            << path << ":" << number << " includes " << target << ", not a path from the root";
        EXPECT_TRUE(folder_of(target) == folder || allowed.contains(folder_of(target)))
            << path << ":" << number << ": " << folder << " may not include " << folder_of(target);
      }
    }
  }
  EXPECT_GT(includes, 20) << "the scan found next to nothing";
}

}  // namespace
