#include "engine/bench.h"

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
// Of the free memory, what engines may take: the rest is for what looks at them.
constexpr double kMemoryShare = 0.95;
constexpr double kConfidence = 0.95;

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
      engine_.synchronize();
      const Clock::time_point begin = Clock::now();
      std::int32_t last = 0;
      for (std::size_t at = 0; at < ids.size();) {
        const auto count = std::min(static_cast<std::size_t>(engine_.memory().limits.prefill_chunk), ids.size() - at);
        engine_.prefill(sequences_[s], std::span(ids).subspan(at, count));
        at += count;
        last = static_cast<std::int32_t>(count) - 1;
      }
      (void)engine_.logits({&last, 1});
      first_ids_.push_back(engine_.sample(std::span(greedy_).first(1), std::span(numbers_).first(1))[0]);
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

// Marks of every layer's attention: events on CUDA, where they are nodes of the step's graph, the host's clock else.
class AttentionClock {
 public:
  explicit AttentionClock(Engine& engine)
      : engine_(engine),
        cuda_(engine.attention_limits().device == DeviceKind::kCuda),
        marks_(cuda_ ? 0 : 2 * static_cast<std::size_t>(engine.config().layers)) {
    if (cuda_) events_.resize(2 * static_cast<std::size_t>(engine.config().layers));
    engine_.set_attention_mark([this](const Exec& exec, int layer, AttentionEdge edge) {
      const std::size_t mark = 2 * static_cast<std::size_t>(layer) + (edge == AttentionEdge::kEnd ? 1 : 0);
      if (cuda_) {
        events_[mark].record(exec);
      } else {
        marks_[mark] = Clock::now();
      }
    });
  }
  ~AttentionClock() { engine_.set_attention_mark({}); }
  AttentionClock(const AttentionClock&) = delete;
  AttentionClock& operator=(const AttentionClock&) = delete;
  AttentionClock(AttentionClock&&) = delete;
  AttentionClock& operator=(AttentionClock&&) = delete;

  // Of the last step, which must be done: seconds a layer.
  [[nodiscard]] double layer_seconds() const {
    double total = 0.0;
    const auto layers = static_cast<std::size_t>(engine_.config().layers);
    for (std::size_t l = 0; l < layers; ++l) {
      total += cuda_ ? static_cast<double>(events_[2 * l + 1].ms_since(events_[2 * l])) * 1e-3
                     : std::chrono::duration<double>(marks_[2 * l + 1] - marks_[2 * l]).count();
    }
    return total / static_cast<double>(layers);
  }

 private:
  Engine& engine_;
  bool cuda_;
  std::vector<Event> events_;
  std::vector<Clock::time_point> marks_;
};

void time_attention(Engine& engine, Cell& cell, int steps, BenchRow& row) {
  cell.rewind();
  const AttentionClock clock(engine);
  cell.step();  // records the marked graph
  cell.rewind();
  std::vector<double> seconds;
  for (int i = 0; i < steps; ++i) {
    cell.step();
    seconds.push_back(clock.layer_seconds());
  }
  row.attention_s = quantile(seconds, 0.5);
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

class Bench {
 public:
  Bench(const BenchSetting& setting, const BenchHooks& hooks)
      : setting_(setting), hooks_(hooks), config_(model_config_of(setting.model)) {
    for (const int context : setting.contexts) {
      if (context > setting.max_tokens) continue;
      refuse({"planning the bench", fmt::format("--context {} with --max-tokens {}", context, setting.max_tokens),
              "a context of more tokens than are decoded in it", "raise --context or lower --max-tokens"});
    }
  }

  BenchReport run() {
    plan();
    const DeviceKind device = setting_.engine.limits.device;
    const auto probe = [&] { return hooks_.probe ? hooks_.probe() : probe_roof(device); };
    report_.roof = probe();
    report_.clocks_before = read_clocks();
    for (const BatchPlan& plan : plans_) run_batch(plan);
    report_.clocks_after = read_clocks();
    report_.roof = higher(report_.roof, probe());
    for (BenchRow& row : report_.rows) row.roof = report_.roof;
    for (const BenchRow& row : report_.rows) check_row(row);
    return std::move(report_);
  }

 private:
  struct BatchPlan {
    int batch = 0;
    EngineOptions options;
    std::vector<int> contexts;
  };

  [[nodiscard]] EngineOptions options_of(WeightFormat weights, int context, int batch) const {
    EngineOptions options = setting_.engine;
    options.weights = weights;
    options.limits.max_context = context;
    options.limits.max_seqs = batch;
    options.attention = setting_.attentions[0];
    options.other_attention.assign(setting_.attentions.begin() + 1, setting_.attentions.end());
    return options;
  }

  // Which cells fit, before anything is loaded.
  void plan() {
    for (const WeightFormat weights : setting_.weights) {
      for (const int batch : setting_.batches) plan_batch(weights, batch);
    }
    if (plans_.empty()) {
      refuse({"planning the bench", report_.skipped[0], "at least one cell that does", "lower --context or --batch"});
    }
  }

  void plan_batch(WeightFormat weights, int batch) {
    const std::int64_t free_bytes = device_info(setting_.engine.limits.device).free_bytes;
    BatchPlan fits{.batch = batch, .options = {}, .contexts = {}};
    for (const int context : setting_.contexts) {
      const EngineOptions options = options_of(weights, context, batch);
      const MemoryPlan plan =
          plan_engine_memory(setting_.model, config_, options, std::numeric_limits<std::int64_t>::max());
      if (static_cast<double>(plan.total_bytes) > kMemoryShare * static_cast<double>(free_bytes)) {
        report_.skipped.push_back(fmt::format("weights {}, context {}, batch {} does not fit: it needs {}, {} are free",
                                              weight_format_name(weights), context, batch,
                                              format_bytes(plan.total_bytes), format_bytes(free_bytes)));
        continue;
      }
      if (fits.contexts.empty() || context > fits.options.limits.max_context) fits.options = options;
      fits.contexts.push_back(context);
      total_ += cell_steps();
    }
    if (!fits.contexts.empty()) plans_.push_back(std::move(fits));
  }

  // Timed decode steps of a cell, which progress is counted in.
  [[nodiscard]] std::int64_t cell_steps() const {
    return static_cast<std::int64_t>(setting_.attentions.size()) * setting_.repeats * setting_.max_tokens;
  }

  void run_batch(const BatchPlan& plan) {
    restart_peak(Memory::kDevice);
    Engine engine(setting_.model, plan.options, hooks_.loading);
    engine.shuffle_free_pages(setting_.engine.seed);
    std::optional<SyntheticFill> drawn;
    if (setting_.fill == BenchFill::kSynthetic) drawn.emplace(engine, setting_.scores, setting_.engine.seed);
    for (const int context : plan.contexts) run_cell(engine, plan, drawn ? &*drawn : nullptr, context);
  }

  void run_cell(Engine& engine, const BatchPlan& plan, const SyntheticFill* drawn, int context) {
    const int arms = static_cast<int>(setting_.attentions.size());
    Cell cell(engine, setting_, context, plan.batch);
    std::optional<double> ttft;
    if (drawn != nullptr) {
      cell.fill(*drawn, setting_.engine.seed);
    } else {
      ttft = cell.prefill(setting_.engine.seed);
    }
    std::vector<BenchRow> rows;
    for (int arm = 0; arm < arms; ++arm) {
      engine.use_attention(arm);
      rows.push_back(new_row(engine, cell, plan.options.weights, arm));
      rows.back().ttft_s = ttft;
      engine.capture_ahead(plan.batch, cell.depth() + 1, context);
      cell.rewind();
      for (int i = 0; i < std::min(setting_.max_tokens, kWarmUpSteps); ++i) cell.step();
    }
    for (int repeat = 0; repeat < setting_.repeats; ++repeat) {
      for (int arm = 0; arm < arms; ++arm) {
        engine.use_attention(arm);
        run_repeat(engine, cell, setting_.max_tokens, rows[static_cast<std::size_t>(arm)]);
        done_ += setting_.max_tokens;
        if (hooks_.progress) hooks_.progress(done_, total_);
      }
    }
    engine.use_attention(setting_.baseline);
    cell.rewind();
    const ScoreSpread spread = measure_spread(engine, cell.sequences(), cell.ids());
    for (int arm = 0; arm < arms; ++arm) {
      engine.use_attention(arm);
      finish_row(engine, cell, spread, rows[static_cast<std::size_t>(setting_.baseline)].tpot_s,
                 rows[static_cast<std::size_t>(arm)]);
    }
    engine.use_attention(0);
    report_.rows.insert(report_.rows.end(), rows.begin(), rows.end());
  }

  [[nodiscard]] BenchRow new_row(const Engine& engine, const Cell& cell, WeightFormat weights, int arm) const {
    BenchRow row;
    row.model = setting_.model;
    row.device = device_info(setting_.engine.limits.device).name;
    row.weights = weights == WeightFormat::kStored ? dtype_name(engine.weight_dtype()) : weight_format_name(weights);
    row.fill = setting_.fill == BenchFill::kPrefill ? "prefill" : "synthetic";
    row.attention = setting_.attentions[static_cast<std::size_t>(arm)];
    row.context = cell.context();
    row.batch = cell.batch();
    row.max_tokens = setting_.max_tokens;
    row.repeats = setting_.repeats;
    row.layers = config_.layers;
    row.weight_bytes = engine.decode_step_bytes(cell.batch(), 0);
    const std::vector<BackendConfig>& layers = engine.attention_config().layers;
    row.sparse = std::any_of(layers.begin(), layers.end(), [](const BackendConfig& layer) {
      return !std::holds_alternative<DenseConfig>(layer.settings);
    });
    row.cache_bytes = last_cache_bytes(setting_.engine.limits.device);
    return row;
  }

  void finish_row(Engine& engine, Cell& cell, const ScoreSpread& spread, const std::vector<double>& baseline,
                  BenchRow& row) const {
    const auto steps = static_cast<double>(setting_.repeats) * setting_.max_tokens;
    row.kv_bytes /= steps;
    row.metadata_bytes /= steps;
    row.dense_kv_bytes /= steps;
    row.sigma = spread.of_heads.mean();
    row.sigma_least = spread.least;
    row.sigma_largest = spread.largest;
    row.speedup = ratio_of_means(baseline, row.tpot_s, kConfidence);
    row.peak_bytes = engine.peak_memory_bytes();
    time_attention(engine, cell, std::min(setting_.max_tokens, 2 * kLookSteps), row);
    look_at_lists(engine, cell, setting_.max_tokens, row);
  }

  const BenchSetting& setting_;
  const BenchHooks& hooks_;
  ModelConfig config_;
  BenchReport report_;
  std::vector<BatchPlan> plans_;
  std::int64_t done_ = 0;
  std::int64_t total_ = 0;
};

}  // namespace

BenchReport run_bench(const BenchSetting& setting, const BenchHooks& hooks) {
  return Bench(setting, hooks).run();
}

}  // namespace vesper
