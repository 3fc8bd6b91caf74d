// Tensors of mapped files on their way to a CUDA device: read, converted or quantised, and copied, all at once.
#pragma once

#include <array>
#include <cstdint>

#include "engine/core/buffer.h"
#include "engine/core/stream.h"
#include "models/int4.h"
#include "models/safetensors.h"
#include "models/weights.h"

namespace vesper {

// Bytes that are staged at once. Two of these: large enough that a copy over PCIe (some 50 GB/s) takes longer than its
// launch, small beside the model.
inline constexpr std::int64_t kStagingBytes = 32LL << 20;

// Host to device through two pinned buffers: while one is copied, all CPU threads fill the other, which is also what
// brings the file into memory. What is to be quantised is copied as it is stored, into a panel of the same size on the
// device, and quantised there, so that it loads at the rate of reading too.
class Uploader {
 public:
  // Calls `progress` (may be empty) with the bytes read so far, of `total_bytes`. `quantises`: whether quantise will be
  // called, which takes the panel.
  Uploader(const Exec& exec, const Progress& progress, std::int64_t total_bytes, bool quantises);

  // Converts to the 16-bit type of `to`, which has as many elements.
  void upload(const StoredTensor& from, const TensorRef& to);
  // The rows of `from` become rows first_row, first_row + 1, ... of `to`.
  void quantise(const StoredTensor& from, std::int64_t first_row, const Int4Matrix& to);
  // Waits for all of it.
  void finish() const;

 private:
  struct Slot {
    Buffer staging{Memory::kPinned, kStagingBytes, "a staging buffer for weights"};
    Event copied;
  };

  Slot& next_slot();
  void count(std::int64_t bytes);

  Exec exec_;
  const Progress& progress_;
  std::int64_t total_bytes_;
  std::int64_t done_bytes_ = 0;
  std::size_t turn_ = 0;
  std::array<Slot, 2> slots_;
  Buffer panel_;
};

}  // namespace vesper
