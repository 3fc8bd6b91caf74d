// A whole safetensors file: header and tensors, of which every byte is read.
#include "models/safetensors.h"

#include "tests/fuzz/fuzz.h"

namespace vesper {

void fuzz(std::string_view input) {
  const SafetensorsFile file(scratch_file("model.safetensors", input));
  std::int64_t bytes = 0;
  std::uint64_t sum = 0;
  for (const auto& [name, tensor] : file.tensors()) {
    std::int64_t expected = dtype_bytes(tensor.dtype);
    for (const std::int64_t extent : tensor.shape) expected *= extent;
    promise(expected == tensor.bytes, "a tensor has the bytes of its shape");
    for (std::int64_t i = 0; i < tensor.bytes; ++i) sum += std::to_integer<std::uint64_t>(tensor.data[i]);
    bytes += tensor.bytes;
    promise(file.find(name) == &tensor, "a tensor is found by its name");
  }
  promise(sum <= 255 * static_cast<std::uint64_t>(bytes), "bytes are bytes");
  promise(bytes + 8 <= static_cast<std::int64_t>(input.size()), "tensors do not overlap");
}

}  // namespace vesper
