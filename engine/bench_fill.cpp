#include "engine/bench_fill.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "engine/core/error.h"
#include "engine/core/philox.h"
#include "engine/core/stream.h"
#include "engine/exact_step.h"

namespace vesper {
namespace {

constexpr int kQuerySteps = 4;  // decode steps that tell how long queries are

// Even cover of the range: the fractional parts of i * (sqrt(5) - 1) / 2. Source: Knuth, TAOCP 3, 6.4, on Fibonacci
// hashing.
double spread_of(const SigmaRange& range, std::int64_t number) {
  constexpr double kGolden = 0.6180339887498949;
  const double place = (static_cast<double>(number) + 0.5) * kGolden;
  return range.least + (range.largest - range.least) * (place - std::floor(place));
}

// Mean of |q|^2 for each layer and KV head.
std::vector<double> query_lengths(Engine& engine, std::uint64_t seed) {
  const ModelConfig& config = engine.config();
  const int group = config.heads / config.kv_heads;
  std::vector<double> squares(static_cast<std::size_t>(config.layers) * static_cast<std::size_t>(config.kv_heads));
  CachedSequence sequence;
  if (!engine.reserve(sequence, kQuerySteps)) {
    fail({"looking at the model's queries", "no free KV pages", "those of one short sequence", ""});
  }
  const ProbeScope scope(engine, [&](const Exec& exec, const AttendedLayer& layer) {
    const std::vector<float> q = read_floats(exec, layer.q);
    for (std::size_t c = 0; c < q.size(); ++c) {
      const auto g = static_cast<std::int64_t>(c) / config.head_dim / group;
      squares[static_cast<std::size_t>(std::int64_t{layer.number} * config.kv_heads + g)] +=
          static_cast<double>(q[c]) * q[c];
    }
  });
  const std::vector<std::int32_t> ids = drawn_ids(config, seed, 0, kQuerySteps);
  const std::array<CachedSequence*, 1> sequences = {&sequence};
  for (std::size_t i = 0; i < ids.size(); ++i) engine.decode(sequences, std::span(ids).subspan(i, 1));
  engine.synchronize();
  engine.truncate(sequence, 0);
  for (double& square : squares) square /= kQuerySteps * group;
  return squares;
}

// The step's first sequence alone.
Batch first_sequence(const Batch& batch) {
  Batch first = batch;
  first.seqs = 1;
  first.tokens = 1;
  first.host_kv_len = batch.host_kv_len.first(1);
  first.kv_len = TensorView<const std::int32_t, 1>(batch.kv_len.data(), 1);
  first.page_table = TensorView<const std::int32_t, 2>(batch.page_table.data(), 1, batch.page_table.shape(1));
  first.request = TensorView<const std::int32_t, 1>(batch.request.data(), 1);
  first.query_start = TensorView<const std::int32_t, 1>(batch.query_start.data(), 2);
  first.positions = TensorView<const std::int32_t, 1>(batch.positions.data(), 1);
  first.seq_of_token = TensorView<const std::int32_t, 1>(batch.seq_of_token.data(), 1);
  first.max_kv_len = batch.host_kv_len[0];
  return first;
}

}  // namespace

std::vector<std::int32_t> drawn_ids(const ModelConfig& config, std::uint64_t seed, int number, int tokens) {
  std::vector<std::int32_t> ids;
  const PhiloxKey key{{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}};
  for (int t = 0; t < tokens; ++t) {
    const std::uint32_t drawn =
        philox({{static_cast<std::uint32_t>(t), static_cast<std::uint32_t>(number), 1, 0}}, key).word[0];
    ids.push_back(static_cast<std::int32_t>(drawn % static_cast<std::uint32_t>(config.vocab)));
  }
  return ids;
}

SyntheticFill::SyntheticFill(Engine& engine, const DrawnScores& scores, std::uint64_t seed)
    : engine_(engine),
      seed_(seed),
      run_share_(static_cast<float>(std::sqrt(scores.locality))),
      token_share_(static_cast<float>(std::sqrt(1.0 - scores.locality))) {
  const ModelConfig& config = engine.config();
  std::vector<float> numbers;
  for (const double square : query_lengths(engine, seed)) {
    // sigma = |q| r / sqrt(3 d): models/synthetic_kv.h.
    const double sigma = spread_of(scores.sigma, static_cast<std::int64_t>(numbers.size()));
    numbers.push_back(static_cast<float>(sigma * std::sqrt(3.0 * config.head_dim / std::max(square, 1e-12))));
  }
  numbers.resize(numbers.size() + static_cast<std::size_t>(config.head_dim) / 2);
  const DeviceKind device = engine.attention_limits().device;
  const auto bytes = static_cast<std::int64_t>(numbers.size()) * 4;
  numbers_ = Buffer(memory_of(device), bytes, "the ranges of drawn keys");
  const Stream stream(device);
  copy_bytes(stream.exec(), numbers_.data(), numbers.data(), bytes);
  stream.synchronize();
}

void SyntheticFill::fill(CachedSequence& sequence, int tokens) const {
  const ModelConfig& config = engine_.config();
  auto* numbers = static_cast<float*>(numbers_.data());
  const std::int64_t ranges = std::int64_t{config.layers} * config.kv_heads;
  const DrawnKv drawn{.key_range = TensorView<const float, 2>(numbers, config.layers, config.kv_heads),
                      .no_turn = TensorView<const float, 1>(numbers + ranges, config.head_dim / 2),
                      .run_share = run_share_,
                      .token_share = token_share_,
                      .seed = seed_};
  while (sequence.length < tokens) {
    engine_.append_drawn(sequence, std::min(engine_.memory().limits.prefill_chunk, tokens - sequence.length), drawn);
  }
  engine_.synchronize();
}

ScoreSpread measure_spread(Engine& engine, std::span<CachedSequence* const> sequences,
                           std::span<const std::int32_t> ids) {
  const AttentionShape& shape = engine.attention_limits().shape;
  ScoreSpread spread;
  const std::int64_t tokens = sequences[0]->length + 1;
  const Buffer buffer(engine.attention_limits().memory(), shape.heads * tokens * 4, "the scores of all keys");
  const ProbeScope scope(engine, [&](const Exec& exec, const AttendedLayer& layer) {
    const auto scores = buffer.view<float>(1, shape.heads, tokens);
    score_tokens(exec, shape, first_rows(layer.q, 1), layer.kv, first_sequence(layer.batch), {}, KeySource::kExact, {},
                 scores);
    const std::vector<float> values = read_back(exec, scores);
    for (std::int64_t h = 0; h < shape.heads; ++h) {
      Moments of_head;
      for (std::int64_t t = 0; t < tokens; ++t)
        of_head.add(static_cast<double>(values[static_cast<std::size_t>(h * tokens + t)]));
      const double sigma = std::sqrt(of_head.variance());
      const bool first = spread.of_heads.count() == 0;
      spread.least = first ? sigma : std::min(spread.least, sigma);
      spread.largest = first ? sigma : std::max(spread.largest, sigma);
      spread.of_heads.add(sigma);
    }
  });
  engine.decode(sequences, ids);
  engine.synchronize();
  return spread;
}

}  // namespace vesper
