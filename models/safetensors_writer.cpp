#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "engine/core/error.h"
#include "models/safetensors.h"

namespace vesper {
namespace {

constexpr std::size_t kHeaderAlignment = 8;  // so that the tensors lie aligned in a mapping, as the format asks
constexpr int kMaxLeftovers = 1000;

std::int64_t bytes_of(const NamedTensor& tensor) {
  std::int64_t bytes = dtype_bytes(tensor.dtype);
  for (const std::int64_t extent : tensor.shape) bytes *= extent;
  return bytes;
}

const char* format_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBf16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kI32:
      return "I32";
    case DType::kU8:
      return "U8";
  }
  return "";
}

// 8 bytes of length, then the JSON, padded with spaces.
std::string header_of(std::span<const NamedTensor> tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::int64_t begin = 0;
  for (const NamedTensor& tensor : tensors) {
    const std::int64_t end = begin + bytes_of(tensor);
    header[tensor.name] = {
        {"dtype", format_name(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
    begin = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + kHeaderAlignment - 1) / kHeaderAlignment * kHeaderAlignment, ' ');
  const std::uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text;
}

// A file beside `path` that takes its name when it is complete, and goes away otherwise.
class PendingFile {
 public:
  explicit PendingFile(const std::string& path) : path_(path) {
    struct stat facts {};
    if (stat(path.c_str(), &facts) == 0 && !S_ISREG(facts.st_mode)) {
      refuse({"writing " + path, "something that is no regular file", "the name of a file", "choose another path"});
    }
    for (int i = 0; descriptor_ < 0 && i < kMaxLeftovers; ++i) {
      pending_ = path + ".partial" + std::to_string(i);
      descriptor_ = open(pending_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor_ < 0 && errno != EEXIST) break;
    }
    if (descriptor_ < 0) refuse_path();
  }

  ~PendingFile() {
    if (descriptor_ >= 0) close(descriptor_);
    if (!pending_.empty()) unlink(pending_.c_str());
  }

  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;
  PendingFile(PendingFile&&) = delete;
  PendingFile& operator=(PendingFile&&) = delete;

  void write(const void* data, std::int64_t bytes) {
    const auto* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::write(descriptor_, from, static_cast<std::size_t>(bytes));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) fail_writing();
      from += written;
      bytes -= written;
    }
  }

  void finish() {
    if (fsync(descriptor_) != 0) fail_writing();
    const int closed = close(descriptor_);
    descriptor_ = -1;
    if (closed != 0) fail_writing();
    if (std::rename(pending_.c_str(), path_.c_str()) != 0) refuse_path();
    pending_.clear();
  }

 private:
  [[noreturn]] void refuse_path() const {
    refuse({"writing " + path_, std::strerror(errno), "a path that can be written", "choose another path"});
  }
  [[noreturn]] void fail_writing() const {
    fail({"writing " + path_, std::strerror(errno), "", "make room or choose another path"});
  }

  std::string path_;
  std::string pending_;
  int descriptor_ = -1;
};

}  // namespace

void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors) {
  // Wide types first, so that each tensor lies aligned for its own.
  std::vector<NamedTensor> ordered(tensors.begin(), tensors.end());
  std::stable_sort(ordered.begin(), ordered.end(), [](const NamedTensor& a, const NamedTensor& b) {
    return dtype_bytes(a.dtype) > dtype_bytes(b.dtype);
  });
  PendingFile file(path);
  const std::string header = header_of(ordered);
  file.write(header.data(), static_cast<std::int64_t>(header.size()));
  for (const NamedTensor& tensor : ordered) file.write(tensor.data, bytes_of(tensor));
  file.finish();
}

}  // namespace vesper
