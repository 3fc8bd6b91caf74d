#include "engine/step_inputs.h"

#include <algorithm>
#include <bit>
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

StepInputs::StepInputs(int max_tokens, int max_seqs, int seq_pages, int max_context, DeviceKind device)
    : max_tokens_(max_tokens), max_seqs_(max_seqs), seq_pages_(seq_pages), max_context_(max_context) {
  const std::int64_t total = bytes(max_tokens, max_seqs, seq_pages);
  const bool cuda = device == DeviceKind::kCuda;
  staging_ = Buffer(cuda ? Memory::kPinned : Memory::kHost, total, "the staging of a step's inputs");
  if (cuda) device_ = Buffer(Memory::kDevice, total, "a step's inputs");
}

int StepInputs::context_bucket(int kv_len) const {
  constexpr unsigned kSmallest = 512;
  return std::min<int>(static_cast<int>(std::bit_ceil(std::max(kSmallest, static_cast<unsigned>(kv_len)))),
                       max_context_);
}

std::int32_t* StepInputs::host(Array array) const {
  auto* numbers = static_cast<std::int32_t*>(staging_.data());
  for (int before = 0; before < array; ++before) {
    numbers += aligned(capacity(static_cast<Array>(before), max_tokens_, max_seqs_, seq_pages_));
  }
  return numbers;
}

std::int32_t* StepInputs::device(Array array) const {
  const auto* start = static_cast<std::int32_t*>(staging_.data());
  return device_.data() == nullptr ? host(array) : static_cast<std::int32_t*>(device_.data()) + (host(array) - start);
}

void StepInputs::send(const Exec& exec, Array first, Array last, std::int64_t count) {
  assert(count <= capacity(last, max_tokens_, max_seqs_, seq_pages_));
  if (!exec.on_cuda()) return;
  copy_bytes(exec, device(first), host(first), (host(last) - host(first) + count) * dtype_bytes(DType::kI32));
}

Batch StepInputs::views(Phase phase, int seqs, int tokens) const {
  using Numbers = TensorView<const std::int32_t, 1>;
  Batch batch;
  batch.phase = phase;
  batch.seqs = seqs;
  batch.tokens = tokens;
  batch.ids = Numbers(device(kIds), tokens);
  batch.positions = Numbers(device(kPositions), tokens);
  batch.seq_of_token = Numbers(device(kSeqOfToken), tokens);
  batch.query_start = Numbers(device(kQueryStart), seqs + 1);
  batch.kv_len = Numbers(device(kKvLen), seqs);
  batch.request = Numbers(device(kRequest), seqs);
  batch.page_table = TensorView<const std::int32_t, 2>(device(kPageTable), seqs, seq_pages_);
  batch.host_kv_len = std::span<const std::int32_t>(host(kKvLen), static_cast<std::size_t>(seqs));
  return batch;
}

Batch StepInputs::prepare(const Exec& exec, Phase phase, std::span<const StepEntry> entries) {
  const int seqs = static_cast<int>(entries.size());
  bool new_tables = seqs > sent_tables_;
  int tokens = 0;
  int longest = 0;
  int most = 0;
  host(kQueryStart)[0] = 0;
  for (int s = 0; s < seqs; ++s) {
    const auto& [sequence, ids] = entries[static_cast<std::size_t>(s)];
    const int count = static_cast<int>(ids.size());
    const int kv_len = sequence->length + count;
    for (int i = 0; i < count; ++i) {
      host(kIds)[tokens + i] = ids[static_cast<std::size_t>(i)];
      host(kPositions)[tokens + i] = sequence->length + i;
      host(kSeqOfToken)[tokens + i] = s;
    }
    tokens += count;
    host(kQueryStart)[s + 1] = tokens;
    host(kKvLen)[s] = kv_len;
    host(kRequest)[s] = sequence->request;
    most = std::max(most, count);
    longest = std::max(longest, kv_len);
    // A sequence's pages are reserved ahead, so the tables of a run of decode steps seldom change.
    std::int32_t* table = host(kPageTable) + std::int64_t{s} * seq_pages_;
    if (new_tables || !std::equal(sequence->pages.begin(), sequence->pages.end(), table)) {
      std::copy(sequence->pages.begin(), sequence->pages.end(), table);
      new_tables = true;
    }
  }
  if (new_tables) {
    send(exec, kIds, kPageTable, std::int64_t{seqs} * seq_pages_);
    sent_tables_ = std::max(sent_tables_, seqs);
  } else {
    send(exec, kIds, kRequest, seqs);
  }
  Batch batch = views(phase, seqs, tokens);
  batch.max_query_tokens = most;
  batch.max_kv_len = phase == Phase::kDecode ? context_bucket(longest) : longest;
  return batch;
}

Batch StepInputs::decode_batch(std::span<const std::int32_t> kv_len) const {
  const int seqs = static_cast<int>(kv_len.size());
  Batch batch = views(Phase::kDecode, seqs, seqs);
  batch.max_query_tokens = 1;
  batch.max_kv_len = context_bucket(*std::max_element(kv_len.begin(), kv_len.end()));
  batch.host_kv_len = kv_len;
  return batch;
}

TensorView<const std::int32_t, 1> StepInputs::prepare_rows(const Exec& exec, std::span<const std::int32_t> rows) {
  std::copy(rows.begin(), rows.end(), host(kRows));
  const auto count = static_cast<std::int64_t>(rows.size());
  send(exec, kRows, kRows, count);
  return TensorView<const std::int32_t, 1>(device(kRows), count);
}

}  // namespace vesper
