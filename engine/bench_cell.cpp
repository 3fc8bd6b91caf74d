#include "engine/bench_cell.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>

#include "engine/core/error.h"
#include "engine/eval_attention.h"

namespace vesper {
namespace {

using Clock = std::chrono::steady_clock;

// Untimed steps before the first repeat of an attention, and in each of the passes that look at the device.
constexpr int kWarmUpSteps = 3;
constexpr int kLookSteps = 4;
constexpr double kConfidence = 0.95;
// Of the free memory, what engines may take: the rest is for what looks at them.
constexpr double kMemoryShare = 0.95;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// The sequences of one cell, filled to a depth, and one decode step of all of them after the other.
class Cell {
 public:
  Cell(Engine& engine, const BenchSetting& setting, int context, int batch)
      : engine_(engine),
        context_(context),
        depth_(context - setting.max_tokens),
        sequences_(static_cast<std::size_t>(batch)),
        greedy_(sequences_.size()),
        numbers_(sequences_.size(), 0) {
    for (std::size_t s = 0; s < sequences_.size(); ++s) {
      sequences_[s].request = static_cast<std::int32_t>(s);
      pointers_.push_back(&sequences_[s]);
    }
    reserve();
  }
  ~Cell() {
    for (CachedSequence& sequence : sequences_) engine_.truncate(sequence, 0);
  }
  Cell(const Cell&) = delete;
  Cell& operator=(const Cell&) = delete;
  Cell(Cell&&) = delete;
  Cell& operator=(Cell&&) = delete;

  // Mean seconds to a sequence's first token.
  double prefill(std::uint64_t seed) {
    std::vector<double> seconds;
    for (std::size_t s = 0; s < sequences_.size(); ++s) {
      const std::vector<std::int32_t> ids = drawn_ids(engine_.config(), seed, static_cast<int>(s), depth_);
      if (s == 0) {  // a chunk untimed: kernels are loaded, and products chosen
        (void)first_token(sequences_[s], std::span(ids).first(std::min(ids.size(), chunk())));
        engine_.truncate(sequences_[s], 0);
        reserve();
      }
      engine_.synchronize();
      const Clock::time_point begin = Clock::now();
      first_ids_.push_back(first_token(sequences_[s], ids));
      seconds.push_back(seconds_since(begin));
    }
    return mean(seconds);
  }

  void fill(const SyntheticFill& drawn, std::uint64_t seed) {
    for (CachedSequence& sequence : sequences_) drawn.fill(sequence, depth_);
    // One more draw than a prompt's: what a first token would be.
    first_ids_ = drawn_ids(engine_.config(), seed, -1, static_cast<int>(sequences_.size()));
  }

  void rewind() {
    for (CachedSequence& sequence : sequences_) engine_.truncate(sequence, depth_);
    reserve();
    ids_ = first_ids_;
  }

  void step() {
    const std::span<const std::int32_t> next = engine_.decode_and_sample(pointers_, ids_, greedy_, numbers_);
    std::copy(next.begin(), next.end(), ids_.begin());
  }

  [[nodiscard]] int depth() const { return depth_; }
  [[nodiscard]] int context() const { return context_; }
  [[nodiscard]] int batch() const { return static_cast<int>(sequences_.size()); }
  [[nodiscard]] std::span<CachedSequence* const> sequences() const { return pointers_; }
  [[nodiscard]] std::span<const std::int32_t> ids() const { return ids_; }

 private:
  [[nodiscard]] std::size_t chunk() const { return static_cast<std::size_t>(engine_.memory().limits.prefill_chunk); }

  std::int32_t first_token(CachedSequence& sequence, std::span<const std::int32_t> ids) {
    std::int32_t last = 0;
    for (std::size_t at = 0; at < ids.size();) {
      const std::size_t count = std::min(chunk(), ids.size() - at);
      engine_.prefill(sequence, ids.subspan(at, count));
      at += count;
      last = static_cast<std::int32_t>(count) - 1;
    }
    (void)engine_.logits({&last, 1});
    return engine_.sample(std::span(greedy_).first(1), std::span(numbers_).first(1))[0];
  }

  // A sequence's pages go back and are taken again one after the other, so each gets its own.
  void reserve() {
    for (CachedSequence& sequence : sequences_) {
      if (engine_.reserve(sequence, context_)) continue;
      fail({"reserving KV pages for the bench", "too few", "those of the memory plan", ""});
    }
  }

  Engine& engine_;
  int context_;
  int depth_;
  std::vector<CachedSequence> sequences_;
  std::vector<CachedSequence*> pointers_;
  std::vector<SamplingParams> greedy_;
  std::vector<std::int32_t> numbers_;  // of draws: greedy ones need none
  std::vector<std::int32_t> first_ids_;
  std::vector<std::int32_t> ids_;
};

// One repeat of one attention: its steps join the row's.
void run_repeat(Engine& engine, Cell& cell, int steps, BenchRow& row) {
  cell.rewind();
  engine.reset_attention_totals();
  engine.time_steps(true);
  double total = 0.0;
  for (int i = 0; i < steps; ++i) {
    const Clock::time_point begin = Clock::now();
    cell.step();
    row.step_s.push_back(seconds_since(begin));
    total += row.step_s.back();
    row.device_s.push_back(engine.step_device_seconds());
  }
  engine.time_steps(false);
  row.tpot_s.push_back(total / steps);
  for (const AttentionTotals& layer : engine.attention_totals()) {
    row.lists += layer.lists;
    row.listed_tokens += layer.kept_tokens;
    row.visible_tokens += layer.visible_tokens;
    row.kv_bytes += static_cast<double>(layer.kv_bytes);
    row.metadata_bytes += static_cast<double>(layer.metadata_bytes);
    row.dense_kv_bytes += static_cast<double>(layer.dense_bytes);
  }
}

// Lets a clock take the marks of an engine's attention in use while it lives.
class MarkScope {
 public:
  MarkScope(Engine& engine, StageClock& clock) : engine_(engine) { engine_.set_stage_mark(clock.mark()); }
  ~MarkScope() { engine_.set_stage_mark({}); }
  MarkScope(const MarkScope&) = delete;
  MarkScope& operator=(const MarkScope&) = delete;
  MarkScope(MarkScope&&) = delete;
  MarkScope& operator=(MarkScope&&) = delete;

 private:
  Engine& engine_;
};

// Attention in place, by marks of every layer; stages each by themselves are timed apart from the whole, which
// their seams lengthen.
void time_attention(Engine& engine, Cell& cell, int steps, bool stages, BenchRow& row) {
  const DeviceKind device = engine.attention_limits().device;
  const auto run = [&](StageClock& clock, bool inner) {
    cell.rewind();
    const MarkScope marked(engine, clock);
    cell.step();  // records the marked graph
    cell.rewind();
    for (int i = 0; i < steps; ++i) {
      cell.step();
      clock.read();
    }
    if (inner) {
      const ProbeScope eager(engine, [](const Exec&, const AttendedLayer&) {});
      clock.ask_costs(true);
      cell.rewind();
      cell.step();
    }
  };
  StageClock whole(device, engine.config().layers, false);
  run(whole, false);
  row.attention_s = whole.layer_seconds();
  if (!stages) return;
  StageClock inner(device, engine.config().layers, true);
  run(inner, true);
  const std::vector<BackendConfig>& backends = engine.attention_config().layers;
  row.stages = inner.figures(backends);
  if (device == DeviceKind::kCuda) row.stages = without_seams(std::move(row.stages), whole.figures(backends));
}

// What lists held and carried, one by one, over the cell's last steps.
void look_at_lists(Engine& engine, Cell& cell, int max_tokens, BenchRow& row) {
  row.kept_tokens = cell.context() - (max_tokens - 1) / 2.0;
  row.kept_tokens_p99 = cell.context();
  if (row.lists > 0) row.kept_tokens = static_cast<double>(row.listed_tokens) / static_cast<double>(row.lists);
  if (!row.sparse) return;
  cell.rewind();
  const int steps = std::min(max_tokens, kLookSteps);
  for (int i = 0; i < max_tokens - steps; ++i) cell.step();
  AttentionFidelity fidelity(engine);
  {
    const ProbeScope scope(engine, [&](const Exec& exec, const AttendedLayer& layer) { fidelity.look(exec, layer); });
    for (int i = 0; i < steps; ++i) cell.step();
  }
  std::vector<double> kept;
  Moments mass;
  for (const LayerFidelity& layer : fidelity.layers()) {
    if (layer.sparse_steps == 0) continue;
    for (const std::vector<double>& head : layer.kept_mass) {
      for (const double share : head) mass.add(share);
    }
    for (const std::vector<double>& head : layer.kept_share) {
      for (std::size_t i = 0; i < head.size(); ++i) {
        const int kv_len = cell.context() - steps + 1 + static_cast<int>(i) / cell.batch();
        kept.push_back(head[i] * kv_len);
      }
    }
  }
  if (kept.empty()) return;
  row.kept_tokens_p99 = quantile(kept, 0.99);
  row.kept_mass = mass.mean();
}

}  // namespace

EngineOptions bench_engine_options(const BenchSetting& setting, WeightFormat weights, int context, int batch) {
  EngineOptions options = setting.engine;
  options.weights = weights;
  options.limits.max_context = context;
  options.limits.max_seqs = batch;
  options.attention = setting.attentions[0];
  options.other_attention.assign(setting.attentions.begin() + 1, setting.attentions.end());
  return options;
}

std::optional<std::string> does_not_fit(const BenchSetting& setting, const EngineOptions& options) {
  const std::int64_t free_bytes = device_info(options.limits.device).free_bytes;
  const MemoryPlan plan = plan_engine_memory(setting.model, model_config_of(setting.model), options,
                                             std::numeric_limits<std::int64_t>::max());
  if (static_cast<double>(plan.total_bytes) <= kMemoryShare * static_cast<double>(free_bytes)) return {};
  return fmt::format("weights {}, context {}, batch {} does not fit: it needs {}, {} are free",
                     weight_format_name(options.weights), options.limits.max_context, options.limits.max_seqs,
                     format_bytes(plan.total_bytes), format_bytes(free_bytes));
}

BenchEngine::BenchEngine(const BenchSetting& setting, const EngineOptions& options, const Progress& loading)
    : setting_(setting), options_(options), engine_(setting.model, options, loading) {
  engine_.shuffle_free_pages(setting.engine.seed);
  if (setting.fill == BenchFill::kSynthetic) drawn_.emplace(engine_, setting.scores, setting.engine.seed);
}

std::vector<BenchRow> BenchEngine::measure(int context, const std::function<void()>& on_repeat) {
  return run(context, true, on_repeat);
}

std::vector<BenchRow> BenchEngine::measure_steps(int context, const std::function<void()>& on_repeat) {
  return run(context, false, on_repeat);
}

std::vector<BenchRow> BenchEngine::run(int context, bool looks, const std::function<void()>& on_repeat) {
  const int arms = static_cast<int>(setting_.attentions.size());
  const int batch = options_.limits.max_seqs;
  Cell cell(engine_, setting_, context, batch);
  std::optional<double> ttft;
  if (drawn_) {
    cell.fill(*drawn_, setting_.engine.seed);
  } else {
    ttft = cell.prefill(setting_.engine.seed);
  }
  std::vector<BenchRow> rows;
  for (int arm = 0; arm < arms; ++arm) {
    engine_.use_attention(arm);
    rows.push_back(new_row(context, arm));
    rows.back().ttft_s = ttft;
    rows.back().prefill_flops = static_cast<double>(engine_.prefill_flops(cell.depth()));
    engine_.capture_ahead(batch, cell.depth() + 1, context);
    cell.rewind();
    for (int i = 0; i < std::min(setting_.max_tokens, kWarmUpSteps); ++i) cell.step();
  }
  for (int repeat = 0; repeat < setting_.repeats; ++repeat) {
    for (int arm = 0; arm < arms; ++arm) {
      engine_.use_attention(arm);
      run_repeat(engine_, cell, setting_.max_tokens, rows[static_cast<std::size_t>(arm)]);
      if (on_repeat) on_repeat();
    }
  }
  const auto steps = static_cast<double>(setting_.repeats) * setting_.max_tokens;
  for (BenchRow& row : rows) {
    row.kv_bytes /= steps;
    row.metadata_bytes /= steps;
    row.dense_kv_bytes /= steps;
    row.speedup = ratio_of_means(rows[static_cast<std::size_t>(setting_.baseline)].tpot_s, row.tpot_s, kConfidence);
    row.peak_bytes = engine_.peak_memory_bytes();
  }
  if (looks) {
    engine_.use_attention(setting_.baseline);
    cell.rewind();
    const ScoreSpread spread = measure_spread(engine_, cell.sequences(), cell.ids());
    for (int arm = 0; arm < arms; ++arm) {
      BenchRow& row = rows[static_cast<std::size_t>(arm)];
      engine_.use_attention(arm);
      row.sigma = spread.of_heads.mean();
      row.sigma_least = spread.least;
      row.sigma_largest = spread.largest;
      time_attention(engine_, cell, std::min(setting_.max_tokens, 2 * kLookSteps), setting_.stages, row);
      look_at_lists(engine_, cell, setting_.max_tokens, row);
    }
  }
  engine_.use_attention(0);
  return rows;
}

BenchRow BenchEngine::new_row(int context, int arm) const {
  BenchRow row;
  row.model = setting_.model;
  row.device = device_info(options_.limits.device).name;
  row.weights = options_.weights == WeightFormat::kStored ? dtype_name(engine_.weight_dtype())
                                                          : weight_format_name(options_.weights);
  row.fill = setting_.fill == BenchFill::kPrefill ? "prefill" : "synthetic";
  row.attention = setting_.attentions[static_cast<std::size_t>(arm)];
  row.context = context;
  row.batch = options_.limits.max_seqs;
  row.max_tokens = setting_.max_tokens;
  row.repeats = setting_.repeats;
  row.layers = engine_.config().layers;
  row.weight_bytes = engine_.decode_step_bytes(row.batch, 0);
  const std::vector<BackendConfig>& layers = engine_.attention_config().layers;
  row.sparse = std::any_of(layers.begin(), layers.end(), [](const BackendConfig& layer) {
    return !std::holds_alternative<DenseConfig>(layer.settings);
  });
  row.cache_bytes = last_cache_bytes(options_.limits.device);
  return row;
}

}  // namespace vesper
