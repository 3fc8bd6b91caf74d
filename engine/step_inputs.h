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

  //   max_context: tokens of the longest sequence
  StepInputs(int max_tokens, int max_seqs, int seq_pages, int max_context, DeviceKind device);

  // A bound of lengths that a captured decode step can serve: the next power of two, from 512 on, or max_context.
  [[nodiscard]] int context_bucket(int kv_len) const;

  // Fills the arrays and queues their copy to the device. The previous step's copies must be done (synchronise first).
  // A decode step's max_kv_len is its context_bucket.
  Batch prepare(const Exec& exec, Phase phase, std::span<const StepEntry> entries);

  // A decode step of sequences of these lengths, nothing filled in: to plan and to record ahead of the step itself.
  // `kv_len` must outlive it.
  [[nodiscard]] Batch decode_batch(std::span<const std::int32_t> kv_len) const;

  // Queues the numbers of query tokens whose logits are wanted, and gives their device array; valid until the next
  // call.
  TensorView<const std::int32_t, 1> prepare_rows(const Exec& exec, std::span<const std::int32_t> rows);

 private:
  enum Array { kRows, kIds, kPositions, kSeqOfToken, kQueryStart, kKvLen, kRequest, kPageTable, kArrays };
  [[nodiscard]] static std::int64_t capacity(Array array, int max_tokens, int max_seqs, int seq_pages);
  [[nodiscard]] std::int32_t* host(Array array) const;
  [[nodiscard]] std::int32_t* device(Array array) const;  // host(array) on the CPU
  // Copies what lies from `first` to `count` numbers of `last`.
  void send(const Exec& exec, Array first, Array last, std::int64_t count);
  // Views of the first `seqs` sequences and `tokens` tokens, on the device.
  [[nodiscard]] Batch views(Phase phase, int seqs, int tokens) const;

  int max_tokens_;
  int max_seqs_;
  int seq_pages_;
  int max_context_;
  int sent_tables_ = 0;  // sequences whose page tables the device has held
  Buffer staging_;       // pinned where there is a device; the arrays themselves on the CPU
  Buffer device_;        // CUDA only
};

}  // namespace vesper
