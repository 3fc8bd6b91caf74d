#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "engine/core/error.h"
#include "tests/fuzz/fuzz.h"

namespace vesper {

void promise(bool kept, const char* what) {
  if (kept) return;
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

const std::string& scratch_folder() {
  static const std::string folder = [] {
    std::string path = (std::filesystem::temp_directory_path() / "vesper-fuzz-XXXXXX").string();
    promise(mkdtemp(path.data()) != nullptr, "TMPDIR can be written to");
    return path;
  }();
  return folder;
}

std::string scratch_file(const std::string& name, std::string_view content) {
  std::string path = scratch_folder() + "/" + name;
  promise((std::ofstream(path, std::ios::binary | std::ios::trunc) << content).flush().good(), "TMPDIR has room");
  return path;
}

}  // namespace vesper

// The name is libFuzzer's.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {  // NOLINT(*-identifier-naming)
  try {
    vesper::fuzz({reinterpret_cast<const char*>(data), size});
  } catch (const vesper::Error& error) {
    if (error.fault() != vesper::Fault::kInput) throw;
  }
  return 0;
}
