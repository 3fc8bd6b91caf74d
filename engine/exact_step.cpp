#include "engine/exact_step.h"

#include <cmath>
#include <limits>

#include "models/widen.h"

namespace vesper {
namespace {

std::int64_t out_columns(const AttentionShape& shape) {
  return std::int64_t{shape.heads} * shape.head_dim;
}

}  // namespace

std::vector<float> read_floats(const Exec& exec, const TensorRef& tensor) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(tensor.bytes()));
  copy_bytes(exec, bytes.data(), tensor.data, tensor.bytes());
  synchronize(exec);
  std::vector<float> values(static_cast<std::size_t>(tensor.size()));
  cpu::widen_row(tensor_ref(bytes.data(), tensor.dtype, tensor.size()), 0, tensor.size(), values.data());
  return values;
}

double relative_error(std::span<const float> found, std::span<const float> expected) {
  double error = 0.0;
  double norm = 0.0;
  for (std::size_t d = 0; d < expected.size(); ++d) {
    const auto value = static_cast<double>(expected[d]);
    const double apart = static_cast<double>(found[d]) - value;
    error += apart * apart;
    norm += value * value;
  }
  if (norm == 0.0) return error == 0.0 ? 0.0 : std::numeric_limits<double>::infinity();
  return std::sqrt(error / norm);
}

ExactStep::ExactStep(const AttentionLimits& limits)
    : limits_(limits),
      dense_(limits),
      device_out_(limits.memory(), limits.max_seqs * out_columns(limits.shape) * dtype_bytes(limits.dtype),
                  "the output of exact attention"),
      device_lse_(limits.memory(), std::int64_t{limits.max_seqs} * limits.shape.heads * 4,
                  "the log-sum-exp of exact attention") {}

void ExactStep::run(const Exec& exec, const AttendedLayer& layer) {
  const int seqs = layer.batch.seqs;
  const TensorRef out = device_out_.ref(limits_.dtype, seqs, out_columns(limits_.shape));
  const auto lse = device_lse_.view<float>(seqs, limits_.shape.heads);
  dense_.plan(layer.batch);
  dense_.run(exec, {.number = layer.number, .kv = layer.kv, .counters = {}}, layer.q, layer.batch, out, lse);
  out_ = read_floats(exec, out);
  lse_ = read_back(exec, lse);
}

std::span<const float> ExactStep::out(std::size_t row) const {
  const auto channels = static_cast<std::size_t>(limits_.shape.head_dim);
  return std::span(out_).subspan(row * channels, channels);
}

}  // namespace vesper
