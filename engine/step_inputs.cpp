#include "engine/step_inputs.h"

#include <algorithm>
#include <cassert>

namespace vesper {
namespace {

constexpr std::int64_t kAlignment = 64;  // numbers: 256 bytes

std::int64_t aligned(std::int64_t count) {
  return (count + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

std::int64_t StepInputs::capacity(Array array, int max_tokens, int max_seqs, int seq_pages) {
  switch (array) {
    case kIds:
    case kPositions:
    case kSeqOfToken:
    case kRows:
      return max_tokens;
    case kQueryStart:
      return std::int64_t{max_seqs} + 1;
    case kKvLen:
    case kRequest:
      return max_seqs;
    case kPageTable:
      return std::int64_t{max_seqs} * seq_pages;
    case kArrays:
      break;
  }
  return 0;
}

std::int64_t StepInputs::bytes(int max_tokens, int max_seqs, int seq_pages) {
  std::int64_t numbers = 0;
  for (int array = 0; array < kArrays; ++array) {
    numbers += aligned(capacity(static_cast<Array>(array), max_tokens, max_seqs, seq_pages));
  }
  return numbers * dtype_bytes(DType::kI32);
}

StepInputs::StepInputs(int max_tokens, int max_seqs, int seq_pages, DeviceKind device)
    : max_tokens_(max_tokens), max_seqs_(max_seqs), seq_pages_(seq_pages) {
  const std::int64_t total = bytes(max_tokens, max_seqs, seq_pages);
  const bool cuda = device == DeviceKind::kCuda;
  staging_ = Buffer(cuda ? Memory::kPinned : Memory::kHost, total, "the staging of a step's inputs");
  if (cuda) device_ = Buffer(Memory::kDevice, total, "a step's inputs");
}

std::int32_t* StepInputs::host(Array array) const {
  auto* numbers = static_cast<std::int32_t*>(staging_.data());
  for (int before = 0; before < array; ++before) {
    numbers += aligned(capacity(static_cast<Array>(before), max_tokens_, max_seqs_, seq_pages_));
  }
  return numbers;
}

const std::int32_t* StepInputs::send(const Exec& exec, Array array, std::int64_t count) {
  assert(count <= capacity(array, max_tokens_, max_seqs_, seq_pages_));
  const std::int32_t* from = host(array);
  if (!exec.on_cuda()) return from;
  auto* to = static_cast<std::int32_t*>(device_.data()) + (from - host(kIds));
  copy_bytes(exec, to, from, count * dtype_bytes(DType::kI32));
  return to;
}

Batch StepInputs::prepare(const Exec& exec, Phase phase, std::span<const StepEntry> entries) {
  Batch batch;
  batch.phase = phase;
  batch.seqs = static_cast<int>(entries.size());
  host(kQueryStart)[0] = 0;
  for (int s = 0; s < batch.seqs; ++s) {
    const auto& [sequence, ids] = entries[static_cast<std::size_t>(s)];
    const int count = static_cast<int>(ids.size());
    const int kv_len = sequence->length + count;
    for (int i = 0; i < count; ++i) {
      host(kIds)[batch.tokens + i] = ids[static_cast<std::size_t>(i)];
      host(kPositions)[batch.tokens + i] = sequence->length + i;
      host(kSeqOfToken)[batch.tokens + i] = s;
    }
    std::copy(sequence->pages.begin(), sequence->pages.end(), host(kPageTable) + std::int64_t{s} * seq_pages_);
    batch.tokens += count;
    host(kQueryStart)[s + 1] = batch.tokens;
    host(kKvLen)[s] = kv_len;
    host(kRequest)[s] = sequence->request;
    batch.max_query_tokens = std::max(batch.max_query_tokens, count);
    batch.max_kv_len = std::max(batch.max_kv_len, kv_len);
  }
  using Numbers = TensorView<const std::int32_t, 1>;
  batch.ids = Numbers(send(exec, kIds, batch.tokens), batch.tokens);
  batch.positions = Numbers(send(exec, kPositions, batch.tokens), batch.tokens);
  batch.seq_of_token = Numbers(send(exec, kSeqOfToken, batch.tokens), batch.tokens);
  batch.query_start = Numbers(send(exec, kQueryStart, batch.seqs + 1), batch.seqs + 1);
  batch.kv_len = Numbers(send(exec, kKvLen, batch.seqs), batch.seqs);
  batch.request = Numbers(send(exec, kRequest, batch.seqs), batch.seqs);
  batch.page_table = TensorView<const std::int32_t, 2>(send(exec, kPageTable, std::int64_t{batch.seqs} * seq_pages_),
                                                       batch.seqs, seq_pages_);
  batch.host_kv_len = std::span<const std::int32_t>(host(kKvLen), static_cast<std::size_t>(batch.seqs));
  return batch;
}

TensorView<const std::int32_t, 1> StepInputs::prepare_rows(const Exec& exec, std::span<const std::int32_t> rows) {
  std::copy(rows.begin(), rows.end(), host(kRows));
  const auto count = static_cast<std::int64_t>(rows.size());
  return TensorView<const std::int32_t, 1>(send(exec, kRows, count), count);
}

}  // namespace vesper
