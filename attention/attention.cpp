#include "attention/attention.h"

#include <algorithm>
#include <numeric>

#include "attention/sparse.h"
#include "engine/core/error.h"
#include "engine/core/stream.h"
#include "kvcache/side_tables.h"

namespace vesper {
namespace {

constexpr int kCounterKinds = 5;  // of LayerCounters

struct NeededTables {
  SideTables operator()(const DenseConfig& /*config*/) const { return {}; }
  SideTables operator()(const QuestConfig& config) const { return of_pages(config.page_score); }
  SideTables operator()(const TwilightConfig& config) const {
    SideTables tables = config.dense_base ? SideTables{} : of_pages(config.page_score);
    tables.int4_keys = config.scores == KeySource::kInt4;
    return tables;
  }
  SideTables operator()(const VAttentionConfig& config) const {
    SideTables tables = config.top_k_by == TopKBy::kQuest ? of_pages(config.page_score) : SideTables{};
    tables.int4_keys = config.top_k_by == TopKBy::kInt4;
    return tables;
  }

 private:
  static SideTables of_pages(PageScore score) {
    SideTables tables;
    tables.page_bounds = score == PageScore::kMinMax;
    tables.page_moments = score == PageScore::kMeanStd;
    tables.int8_bounds = score == PageScore::kMinMaxInt8;
    return tables;
  }
};

struct MakeBackend {
  const AttentionLimits& limits;
  int dense_below;
  std::unique_ptr<AttentionBackend> operator()(const DenseConfig& /*config*/) const {
    return std::make_unique<DenseAttention>(limits);
  }
  std::unique_ptr<AttentionBackend> operator()(const QuestConfig& config) const {
    return make_quest(config, dense_below, limits);
  }
  std::unique_ptr<AttentionBackend> operator()(const TwilightConfig& config) const {
    return make_twilight(config, dense_below, limits);
  }
  std::unique_ptr<AttentionBackend> operator()(const VAttentionConfig& config) const {
    return make_vattention(config, dense_below, limits);
  }
};

struct ScratchOf {
  const AttentionLimits& limits;
  AttentionScratch operator()(const DenseConfig& /*config*/) const { return {}; }
  AttentionScratch operator()(const QuestConfig& config) const { return quest_scratch(config, limits); }
  AttentionScratch operator()(const TwilightConfig& config) const { return twilight_scratch(config, limits); }
  AttentionScratch operator()(const VAttentionConfig& config) const { return vattention_scratch(config, limits); }
};

std::vector<BackendConfig> distinct_backends(const AttentionConfig& config) {
  std::vector<BackendConfig> distinct;
  for (const BackendConfig& layer : config.layers) {
    if (std::find(distinct.begin(), distinct.end(), layer) == distinct.end()) distinct.push_back(layer);
  }
  return distinct;
}

std::int64_t counter_bytes(const AttentionConfig& config, const AttentionLimits& limits) {
  return static_cast<std::int64_t>(config.layers.size()) * kCounterKinds * limits.shape.kv_heads *
         static_cast<std::int64_t>(sizeof(std::int64_t));
}

void check_int4(const std::vector<SideTables>& tables, const AttentionShape& shape) {
  const bool int4 = std::any_of(tables.begin(), tables.end(), [](const SideTables& t) { return t.int4_keys; });
  if (!int4 || shape.head_dim % 2 == 0) return;
  refuse({"setting up int4 keys", "head_dim " + std::to_string(shape.head_dim), "an even one",
          "choose a backend that keeps no int4 keys"});
}

}  // namespace

std::vector<SideTables> ModelAttention::side_tables(std::span<const AttentionConfig> arms) {
  std::vector<SideTables> tables;
  for (const AttentionConfig& arm : arms) {
    tables.resize(arm.layers.size());
    for (std::size_t l = 0; l < tables.size(); ++l) {
      const SideTables needed = std::visit(NeededTables{}, arm.layers[l].settings);
      tables[l].page_bounds = tables[l].page_bounds || needed.page_bounds;
      tables[l].int8_bounds = tables[l].int8_bounds || needed.int8_bounds;
      tables[l].page_moments = tables[l].page_moments || needed.page_moments;
      tables[l].int4_keys = tables[l].int4_keys || needed.int4_keys;
    }
  }
  return tables;
}

AttentionScratch ModelAttention::scratch_bytes(const AttentionConfig& config, const AttentionLimits& limits) {
  AttentionScratch total;
  total.selections = counter_bytes(config, limits);
  for (const BackendConfig& backend : distinct_backends(config)) {
    const AttentionScratch own = std::visit(ScratchOf{limits}, backend.settings);
    total.partials += DenseAttention::scratch_bytes(limits) + own.partials;
    total.selections += own.selections;
  }
  return total;
}

ModelAttention::ModelAttention(const AttentionConfig& config, const AttentionLimits& limits, const Exec& exec)
    : config_(config),
      limits_(limits),
      counters_(memory_of(exec.device), counter_bytes(config, limits), "the counters of attention"),
      counted_(config.layers.size()),
      tables_(side_tables({&config, 1})) {
  if constexpr (kHaveCuda) {
    if (limits.device == DeviceKind::kCuda) cuda::check_attention_shape(limits.shape);
  }
  check_int4(tables_, limits.shape);
  const std::vector<BackendConfig> distinct = distinct_backends(config);
  for (const BackendConfig& backend : distinct) {
    backends_.push_back(std::visit(MakeBackend{limits, backend.dense_below}, backend.settings));
  }
  for (const BackendConfig& layer : config.layers) {
    const auto number = std::find(distinct.begin(), distinct.end(), layer) - distinct.begin();
    of_layer_.push_back(backends_[static_cast<std::size_t>(number)].get());
  }
  unfinished_.reserve(config.layers.size());
  unfinished_kv_.reserve(config.layers.size());
  reset_totals(exec);
}

LayerCounters ModelAttention::counters(int layer) const {
  auto* numbers = static_cast<std::int64_t*>(counters_.data());
  const std::int64_t kv_heads = limits_.shape.kv_heads;
  const auto kind = [&](int k) {
    return TensorView<std::int64_t, 1>(numbers + (std::int64_t{layer} * kCounterKinds + k) * kv_heads, kv_heads);
  };
  return {.kept_tokens = kind(0),
          .visible_tokens = kind(1),
          .sampled_tokens = kind(2),
          .lists = kind(3),
          .guard_hits = kind(4)};
}

void ModelAttention::plan(const Batch& batch) {
  if (batch.phase == Phase::kPrefill) return;
  for (const auto& backend : backends_) backend->plan(batch);
}

std::vector<unsigned> ModelAttention::plan_key() const {
  std::vector<unsigned> key;
  for (const auto& backend : backends_) key.push_back(backend->planned_work());
  return key;
}

void ModelAttention::count_step(const Batch& batch) {
  const std::int64_t token_bytes =
      std::int64_t{2} * limits_.shape.kv_heads * limits_.shape.head_dim * dtype_bytes(limits_.dtype);
  const std::int64_t tokens = std::accumulate(batch.host_kv_len.begin(), batch.host_kv_len.end(), std::int64_t{0});
  for (std::size_t l = 0; l < counted_.size(); ++l) {
    counted_[l].steps += batch.seqs;
    counted_[l].metadata_bytes += of_layer_[l]->metadata_bytes();
    counted_[l].dense_bytes += tokens * token_bytes;
  }
}

void ModelAttention::begin_append(const Exec& exec, const StageOwner& owner, const Batch& batch) const {
  if (!mark_) return;
  const KvShape shape{.layers = 1,
                      .kv_heads = limits_.shape.kv_heads,
                      .head_dim = limits_.shape.head_dim,
                      .page_tokens = limits_.shape.page_tokens,
                      .dtype = limits_.dtype};
  Cost sum;
  for (const int layer : owner.sharers.empty() ? std::span(&owner.layer, 1) : owner.sharers) {
    sum = sum + side_tables_cost(shape, tables_[static_cast<std::size_t>(layer)], batch.seqs);
  }
  mark_(exec, owner, "append", [sum] { return sum; });
}

bool ModelAttention::waits_for_tables(int layer) const {
  return of_layer_[static_cast<std::size_t>(layer)]->needs_newest_entries();
}

void ModelAttention::update_tables(const Exec& exec, int layer, const LayerKv& kv, const Batch& batch) const {
  if (batch.phase == Phase::kDecode && !waits_for_tables(layer)) return;
  if (tables_[static_cast<std::size_t>(layer)] != SideTables{}) begin_append(exec, {.layer = layer}, batch);
  update_side_tables(exec, batch, written(batch.phase, layer, kv));
}

void ModelAttention::finish_tables(const Exec& exec, std::span<const LayerKv> layers, const Batch& batch) {
  if (batch.phase == Phase::kPrefill) return;
  unfinished_.clear();
  unfinished_kv_.clear();
  for (int layer = 0; layer < static_cast<int>(layers.size()); ++layer) {
    if (tables_[static_cast<std::size_t>(layer)] == SideTables{} || waits_for_tables(layer)) continue;
    unfinished_.push_back(layer);
    unfinished_kv_.push_back(written(batch.phase, layer, layers[static_cast<std::size_t>(layer)]));
  }
  if (unfinished_.empty()) return;
  const StageOwner all{.layer = unfinished_.front(), .sharers = unfinished_};
  begin_append(exec, all, batch);
  update_side_tables(exec, batch, unfinished_kv_);
  if (mark_) mark_(exec, all, {}, {});
}

void ModelAttention::run(const Exec& exec, int layer, const TensorRef& q, const LayerKv& kv, const Batch& batch,
                         const TensorRef& out, TensorView<float, 2> lse) {
  if (batch.phase == Phase::kPrefill) return attend_prefill(exec, limits_.shape, q, kv, batch, out);
  AttentionBackend& backend = *of_layer_[static_cast<std::size_t>(layer)];
  backend.run(exec, {.number = layer, .kv = kv, .counters = counters(layer), .mark = &mark_}, q, batch, out, lse);
  if (mark_) mark_(exec, {.layer = layer}, {}, {});
  if (!probe_) return;
  probe_(exec, {.number = layer,
                .q = q,
                .kv = kv,
                .batch = batch,
                .out = out,
                .list = backend.last_selection(),
                .dense = backend.dense_limit()});
}

LayerKv ModelAttention::written(Phase phase, int layer, const LayerKv& kv) const {
  if (phase == Phase::kPrefill) return kv;
  const SideTables& tables = tables_[static_cast<std::size_t>(layer)];
  LayerKv own = kv;
  if (!tables.page_bounds) own.bounds = {};
  if (!tables.int8_bounds) own.int8_bounds = own.int8_scales = {};
  if (!tables.page_moments) own.moments = {};
  if (!tables.int4_keys) own.int4 = own.int4_params = {};
  return own;
}

Selection ModelAttention::last_selection(int layer) const {
  return of_layer_[static_cast<std::size_t>(layer)]->last_selection();
}

std::vector<AttentionTotals> ModelAttention::totals(const Exec& exec) const {
  const auto kv_heads = static_cast<std::size_t>(limits_.shape.kv_heads);
  std::vector<std::int64_t> numbers(counted_.size() * kCounterKinds * kv_heads);
  copy_bytes(exec, numbers.data(), counters_.data(), counters_.bytes());
  synchronize(exec);
  std::vector<AttentionTotals> all = counted_;
  const std::int64_t row_bytes = std::int64_t{2} * limits_.shape.head_dim * dtype_bytes(limits_.dtype);
  for (std::size_t l = 0; l < all.size(); ++l) {
    const auto sum = [&](std::size_t kind) {
      const auto begin = numbers.begin() + static_cast<std::ptrdiff_t>((l * kCounterKinds + kind) * kv_heads);
      return std::accumulate(begin, begin + static_cast<std::ptrdiff_t>(kv_heads), std::int64_t{0});
    };
    AttentionTotals& layer = all[l];
    layer.backend = backend_name(config_.layers[l]);
    layer.kept_tokens = sum(0);
    layer.visible_tokens = sum(1);
    layer.sampled_tokens = sum(2);
    layer.lists = sum(3);
    layer.sparse_steps = layer.lists / static_cast<std::int64_t>(kv_heads);
    layer.guard_hits = sum(4);
    layer.kv_bytes = layer.dense_bytes - (layer.visible_tokens - layer.kept_tokens) * row_bytes;
  }
  return all;
}

void ModelAttention::reset_totals(const Exec& exec) {
  zero_bytes(exec, counters_.data(), counters_.bytes());
  std::fill(counted_.begin(), counted_.end(), AttentionTotals{});
}

}  // namespace vesper
