// Reading and writing safetensors files: 8 bytes of little-endian header length, a JSON header, raw tensors.
// Source: https://github.com/huggingface/safetensors, README, "Format".
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/core/mapped_file.h"
#include "engine/core/tensor.h"

namespace vesper {

// One tensor of a file: where it lies and what it says of itself. Any rank from 0 to 8.
struct StoredTensor {
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;  // inside the mapping
  std::int64_t bytes = 0;
};

// A memory-mapped safetensors file whose header has been validated whole: length, cap of 100 MB, UTF-8 JSON, known
// dtypes, offsets contiguous without hole or overlap, bytes = product of the shape (overflow-checked), end = end of the
// file. Throws input errors that name the file, the tensor, what was found and what was expected.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
  // nullptr where there is none of that name.
  [[nodiscard]] const StoredTensor* find(const std::string& name) const;

 private:
  std::string path_;
  MappedFile file_;
  std::map<std::string, StoredTensor> tensors_;
};

// A tensor to write: host memory, dense.
struct NamedTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;
};

// Writes a file whole or not at all: to a temporary beside it, then renamed. Throws an input error where `path` cannot
// be written, a run error where the disk is full.
void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors);

}  // namespace vesper
