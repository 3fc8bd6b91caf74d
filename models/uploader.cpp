#include "models/uploader.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "engine/core/parallel.h"

namespace vesper {
namespace {

constexpr std::int64_t kConvertGrain = 1LL << 16;  // elements; 128 KiB and more of one thread's reading

template <typename From, typename To>
void convert_range(const std::byte* from, std::byte* to, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {  // memcpy: `from` need not be aligned
    From value{};
    std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof(From)), sizeof(From));
    const To converted = from_float<To>(to_float(value));
    std::memcpy(to + i * static_cast<std::int64_t>(sizeof(To)), &converted, sizeof(To));
  }
}

using ConvertRange = void (*)(const std::byte*, std::byte*, std::int64_t, std::int64_t);

ConvertRange converter(DType from, DType to) {
  assert(to == DType::kBf16 || to == DType::kF16);
  const bool to_bf16 = to == DType::kBf16;
  switch (from) {
    case DType::kF32:
      return to_bf16 ? convert_range<float, bf16> : convert_range<float, f16>;
    case DType::kF16:
      return to_bf16 ? convert_range<f16, bf16> : convert_range<f16, f16>;
    default:
      return to_bf16 ? convert_range<bf16, bf16> : convert_range<bf16, f16>;
  }
}

// Reads, and converts where the types differ, on all CPU threads; this is also what brings the file into memory.
void convert(const std::byte* from, DType from_type, std::byte* to, DType to_type, std::int64_t elements) {
  const ConvertRange range = from_type == to_type ? nullptr : converter(from_type, to_type);
  parallel_for(elements, kConvertGrain, [=](std::int64_t begin, std::int64_t end) {
    if (range != nullptr) return range(from, to, begin, end);
    const std::int64_t size = dtype_bytes(from_type);
    std::memcpy(to + begin * size, from + begin * size, static_cast<std::size_t>((end - begin) * size));
  });
}

}  // namespace

Uploader::Uploader(const Exec& exec, const Progress& progress, std::int64_t total_bytes, bool quantises)
    : exec_(exec), progress_(progress), total_bytes_(total_bytes) {
  if (quantises) panel_ = Buffer(Memory::kDevice, kStagingBytes, "a panel of weights to quantise");
}

Uploader::Slot& Uploader::next_slot() {
  Slot& slot = slots_[turn_++ % slots_.size()];
  slot.copied.synchronize();  // at once where it has not been used yet
  return slot;
}

void Uploader::count(std::int64_t bytes) {
  done_bytes_ += bytes;
  if (progress_) progress_(done_bytes_, total_bytes_);
}

void Uploader::upload(const StoredTensor& from, const TensorRef& to) {
  const std::int64_t from_size = dtype_bytes(from.dtype);
  const std::int64_t to_size = dtype_bytes(to.dtype);
  const std::int64_t step = kStagingBytes / to_size;
  for (std::int64_t first = 0; first < to.size(); first += step) {
    const std::int64_t elements = std::min(step, to.size() - first);
    Slot& slot = next_slot();
    auto* staged = static_cast<std::byte*>(slot.staging.data());
    convert(from.data + first * from_size, from.dtype, staged, to.dtype, elements);
    copy_bytes(exec_, static_cast<std::byte*>(to.data) + first * to_size, staged, elements * to_size);
    slot.copied.record(exec_);
    count(elements * from_size);
  }
}

void Uploader::quantise(const StoredTensor& from, std::int64_t first_row, const Int4Matrix& to) {
  const std::int64_t row_bytes = to.columns * dtype_bytes(from.dtype);
  const std::int64_t step = kStagingBytes / row_bytes;
  assert(step > 0);  // models/model_config.cpp caps columns at 4 MiB of a row
  for (std::int64_t first = 0; first < from.shape[0]; first += step) {
    const std::int64_t rows = std::min(step, from.shape[0] - first);
    Slot& slot = next_slot();
    auto* staged = static_cast<std::byte*>(slot.staging.data());
    convert(from.data + first * row_bytes, from.dtype, staged, from.dtype, rows * to.columns);
    copy_bytes(exec_, panel_.data(), staged, rows * row_bytes);
    slot.copied.record(exec_);
    quantise_int4(exec_, panel_.ref(from.dtype, rows, to.columns), first_row + first, to);
    count(rows * row_bytes);
  }
}

void Uploader::finish() const {
  synchronize(exec_);
}

}  // namespace vesper
