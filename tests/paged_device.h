// The ragged batch and the paged tensors of tests/paged.h on the GPU, in a 16-bit type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "engine/core/buffer.h"
#include "engine/core/stream.h"
#include "tests/compare.h"
#include "tests/paged.h"

namespace vesper {

// What one rounding to T may add: relative, and absolute where the result is subnormal.
template <typename T>
inline constexpr double kRound = std::is_same_v<T, bf16> ? kRoundBf16 : kRoundF16;
template <typename T>
inline constexpr double kRoundSubnormal = std::is_same_v<T, bf16> ? 0x1p-134 : 0x1p-25;

// To the nearest value of T, so that both devices see the same numbers. NaN stays NaN.
template <typename T>
void round_to(std::vector<float>& values) {
  for (float& value : values) value = to_float(from_float<T>(value));
}

template <typename T>
Buffer upload(const Stream& stream, const std::vector<T>& host) {
  const auto bytes = static_cast<std::int64_t>(host.size() * sizeof(T));
  Buffer device(Memory::kDevice, std::max<std::int64_t>(bytes, 1), "test data");
  copy_bytes(stream.exec(), device.data(), host.data(), bytes);
  stream.synchronize();
  return device;
}

template <typename T>
Buffer upload_as(const Stream& stream, const std::vector<float>& host) {
  std::vector<T> narrow(host.size());
  std::transform(host.begin(), host.end(), narrow.begin(), [](float x) { return from_float<T>(x); });
  return upload(stream, narrow);
}

template <typename T>
std::vector<T> download(const Stream& stream, const Buffer& device, std::size_t count) {
  std::vector<T> host(count);
  copy_bytes(stream.exec(), host.data(), device.data(), static_cast<std::int64_t>(count * sizeof(T)));
  stream.synchronize();
  return host;
}

template <typename T>
std::vector<float> download_floats(const Stream& stream, const Buffer& device, std::size_t count) {
  const std::vector<T> narrow = download<T>(stream, device, count);
  std::vector<float> wide(count);
  std::transform(narrow.begin(), narrow.end(), wide.begin(), [](T x) { return to_float(x); });
  return wide;
}

// A Batch whose arrays lie on the device.
struct DeviceBatch {
  Buffer positions, seq_of_token, query_start, kv_len, page_table, request;
  Batch batch;

  DeviceBatch(const Stream& stream, const RaggedBatch& ragged)
      : positions(upload(stream, ragged.positions)),
        seq_of_token(upload(stream, ragged.seq_of_token)),
        query_start(upload(stream, ragged.query_start)),
        kv_len(upload(stream, ragged.kv_len)),
        page_table(upload(stream, ragged.page_table)),
        request(upload(stream, ragged.request)),
        batch(ragged.batch) {
    batch.ids = {};
    batch.positions = positions.view<const std::int32_t>(batch.tokens);
    batch.seq_of_token = seq_of_token.view<const std::int32_t>(batch.tokens);
    batch.query_start = query_start.view<const std::int32_t>(batch.seqs + 1);
    batch.kv_len = kv_len.view<const std::int32_t>(batch.seqs);
    batch.request = request.view<const std::int32_t>(batch.seqs);
    batch.page_table = page_table.view<const std::int32_t>(batch.seqs, ragged.batch.page_table.shape(1));
  }
};

}  // namespace vesper
