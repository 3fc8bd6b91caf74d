// The integer arrays of a step (ids, positions, lengths, page tables) at fixed device addresses, filled on the host.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/core/buffer.h"
#include "engine/core/stream.h"
#include "kvcache/batch.h"
#include "kvcache/kv_cache.h"

namespace vesper {

// One sequence's part of a step: new token ids that follow what its cache holds.
struct StepEntry {
  const CachedSequence* sequence = nullptr;  // pages must already cover length + ids.size() tokens
  std::span<const std::int32_t> ids;
};

class StepInputs {
 public:
  // Device memory for steps of up to max_tokens query tokens and max_seqs sequences of seq_pages pages.
  static std::int64_t bytes(int max_tokens, int max_seqs, int seq_pages);

  StepInputs(int max_tokens, int max_seqs, int seq_pages, DeviceKind device);

  // Fills the arrays and queues their copy to the device. The previous step's copies must be done (synchronise first).
  Batch prepare(const Exec& exec, Phase phase, std::span<const StepEntry> entries);

  // Queues the numbers of query tokens whose logits are wanted, and gives their device array; valid until the next
  // call.
  TensorView<const std::int32_t, 1> prepare_rows(const Exec& exec, std::span<const std::int32_t> rows);

 private:
  enum Array { kIds, kPositions, kSeqOfToken, kQueryStart, kKvLen, kRequest, kRows, kPageTable, kArrays };
  [[nodiscard]] static std::int64_t capacity(Array array, int max_tokens, int max_seqs, int seq_pages);
  [[nodiscard]] std::int32_t* host(Array array) const;
  // Copies the first `count` numbers of an array to the device and gives the device's address.
  const std::int32_t* send(const Exec& exec, Array array, std::int64_t count);

  int max_tokens_;
  int max_seqs_;
  int seq_pages_;
  Buffer staging_;  // pinned where there is a device; the arrays themselves on the CPU
  Buffer device_;   // CUDA only
};

}  // namespace vesper
