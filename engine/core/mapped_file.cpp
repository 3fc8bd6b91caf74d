#include "engine/core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "engine/core/error.h"

namespace vesper {

MappedFile::MappedFile(const std::string& path) {
  // Without waiting: a named pipe would keep it until somebody writes.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) refuse({"opening " + path, std::strerror(errno), "a readable file", "check the path"});
  struct stat facts {};
  const bool regular = fstat(descriptor, &facts) == 0 && S_ISREG(facts.st_mode);
  void* mapped = nullptr;
  if (regular && facts.st_size > 0) {
    size_ = static_cast<std::size_t>(facts.st_size);
    mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
  }
  const int map_error = errno;
  close(descriptor);
  if (!regular) refuse({"opening " + path, "something that is no regular file", "a file", "check the path"});
  if (mapped == MAP_FAILED) fail({"mapping " + path, std::strerror(map_error), "", "check the memory limits"});
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace vesper
