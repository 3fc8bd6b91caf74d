#include "engine/eval_attention.h"

#include <algorithm>
#include <cmath>

#include "attention/attend_selected.h"

namespace vesper {
namespace {

constexpr int kSplitTokens = 512;

int split_entries_of(SelectionUnit unit, const AttentionShape& shape) {
  return unit == SelectionUnit::kPages ? kSplitTokens / shape.page_tokens : kSplitTokens;
}

// Floats of split partials: pages round up once more than tokens.
std::int64_t partial_floats(const AttentionLimits& limits) {
  const std::int64_t splits = limits.max_context / kSplitTokens + 2;
  return std::int64_t{limits.max_seqs} * limits.shape.heads * splits * (limits.shape.head_dim + 1);
}

}  // namespace

AttentionFidelity::AttentionFidelity(const Engine& engine)
    : AttentionFidelity(engine.attention_limits(), engine.attention_config().layers) {}

AttentionFidelity::AttentionFidelity(const AttentionLimits& limits, const std::vector<BackendConfig>& backends)
    : limits_(limits),
      exact_(limits_),
      partials_(limits_.memory(), partial_floats(limits_) * 4, "the partial results of a probe"),
      out_(limits_.memory(),
           std::int64_t{limits_.max_seqs} * limits_.shape.heads * limits_.shape.head_dim * dtype_bytes(limits_.dtype),
           "the output of a probe"),
      lse_(limits_.memory(), std::int64_t{limits_.max_seqs} * limits_.shape.heads * 4, "the log-sum-exp of a probe"),
      no_weight_(limits_.memory(), std::int64_t{limits_.max_seqs} * limits_.shape.kv_heads * 4,
                 "the weights of a probe") {
  for (const BackendConfig& layer : backends) {
    LayerFidelity& fidelity = layers_.emplace_back();
    fidelity.backend = backend_name(layer);
    fidelity.error.resize(static_cast<std::size_t>(limits_.shape.heads));
    fidelity.kept_mass.resize(fidelity.error.size());
    fidelity.kept_share.resize(static_cast<std::size_t>(limits_.shape.kv_heads));
  }
}

std::vector<float> AttentionFidelity::listed_lse(const Exec& exec, const AttendedLayer& layer) {
  const AttentionShape& shape = limits_.shape;
  const int seqs = layer.batch.seqs;
  zero_bytes(exec, no_weight_.data(), no_weight_.bytes());
  Selection list = layer.list;
  list.tail_log_weight = no_weight_.view<float>(seqs, shape.kv_heads);
  const int split = split_entries_of(list.unit, shape);
  const std::int64_t splits = (list.index.shape(2) + split - 1) / split;
  const std::int64_t rows = std::int64_t{seqs} * shape.heads * splits;
  assert(rows * (shape.head_dim + 1) * 4 <= partials_.bytes());
  auto* floats = static_cast<float*>(partials_.data());
  const SplitPartials partials{.out = TensorView<float, 4>(floats, seqs, shape.heads, splits, shape.head_dim),
                               .lse = TensorView<float, 3>(floats + rows * shape.head_dim, seqs, shape.heads, splits)};
  const auto lse = lse_.view<float>(seqs, shape.heads);
  attend_selected(exec, shape, layer.q, layer.kv, layer.batch, list, split, layer.dense, partials,
                  out_.ref(limits_.dtype, seqs, std::int64_t{shape.heads} * shape.head_dim), lse);
  return read_back(exec, lse);
}

void AttentionFidelity::look(const Exec& exec, const AttendedLayer& layer) {
  const AttentionShape& shape = limits_.shape;
  const auto heads = static_cast<std::size_t>(shape.heads);
  const auto kv_heads = static_cast<std::size_t>(shape.kv_heads);
  const auto channels = static_cast<std::size_t>(shape.head_dim);
  const std::span<const std::int32_t> kv_len = layer.batch.host_kv_len;
  const bool any_sparse =
      std::any_of(kv_len.begin(), kv_len.end(), [&](std::int32_t tokens) { return tokens > layer.dense.tokens; });
  std::vector<float> out;
  std::vector<float> listed;
  std::vector<std::int32_t> count;
  if (any_sparse) {
    exact_.run(exec, layer);
    out = read_floats(exec, layer.out);
    listed = listed_lse(exec, layer);
    count = read_back(exec, layer.list.count);
  }
  LayerFidelity& fidelity = layers_[static_cast<std::size_t>(layer.number)];
  for (std::size_t s = 0; s < kv_len.size(); ++s) {
    const bool sparse = kv_len[s] > layer.dense.tokens;
    ++fidelity.steps;
    fidelity.sparse_steps += sparse ? 1 : 0;
    for (std::size_t h = 0; h < heads; ++h) {
      const std::size_t row = s * heads + h;
      const auto found = sparse ? std::span<const float>(out).subspan(row * channels, channels) : std::span<float>();
      fidelity.error[h].push_back(sparse ? relative_error(found, exact_.out(row)) : 0.0);
      fidelity.kept_mass[h].push_back(sparse ? std::exp(static_cast<double>(listed[row] - exact_.lse(row))) : 1.0);
    }
    for (std::size_t g = 0; g < kv_heads; ++g) {
      std::int64_t kept = kv_len[s];
      if (sparse) {
        kept = count[s * kv_heads + g];
        // The newest page is on every list of pages, and the only one that may not be full.
        const std::int64_t missing = (shape.page_tokens - kv_len[s] % shape.page_tokens) % shape.page_tokens;
        if (layer.list.unit == SelectionUnit::kPages) kept = kept * shape.page_tokens - missing;
      }
      fidelity.kept_share[g].push_back(static_cast<double>(kept) / kv_len[s]);
    }
  }
}

}  // namespace vesper
