#include "engine/eval_guarantee.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <utility>

#include "attention/score_tokens.h"
#include "engine/core/error.h"
#include "engine/exact_step.h"
#include "engine/step_inputs.h"

namespace vesper {
namespace {

constexpr int kMaxReplicas = 64;
constexpr std::int64_t kMaxArmBytes = std::int64_t{1} << 28;
constexpr double kLeastDeviation = 1e-4;

const VAttentionConfig* vattention_of(const BackendConfig& layer) {
  return std::get_if<VAttentionConfig>(&layer.settings);
}

// The same with one answer to outliers everywhere; layers that are not asked about cost nothing.
AttentionConfig arm_of(const AttentionConfig& config, OnOutlier on_outlier) {
  AttentionConfig arm = config;
  for (BackendConfig& layer : arm.layers) {
    if (auto* settings = std::get_if<VAttentionConfig>(&layer.settings)) {
      settings->on_outlier = on_outlier;
    } else {
      layer = BackendConfig{DenseConfig{}};
    }
  }
  return arm;
}

// Limits of as many replicas at a time as memory allows.
AttentionLimits replica_limits(const AttentionLimits& engine, const AttentionConfig& arm, int seeds) {
  AttentionLimits limits = engine;
  for (limits.max_seqs = std::min(seeds, kMaxReplicas); limits.max_seqs > 1; limits.max_seqs /= 2) {
    const AttentionScratch scratch = ModelAttention::scratch_bytes(arm, limits);
    if (scratch.partials + scratch.selections <= kMaxArmBytes) break;
  }
  return limits;
}

// What one query head's tail looks like from all of its tokens.
struct Rest {
  double tokens = 0.0;
  double deviation = 0.0;  // of e^s / D, unbiased
};

// One run of some replicas, on the host.
struct ReplicaResults {
  std::vector<float> out;  // [replicas, heads * head_dim]
  std::vector<float> lse;  // [replicas, heads]
  std::vector<std::int32_t> count;
  std::vector<std::int32_t> tail_begin;  // [replicas, kv_heads]
  std::int64_t guard_hits = 0;
};

class GuaranteeProbe {
 public:
  GuaranteeProbe(const Engine& engine, const GuaranteeOptions& options, std::int64_t windows, const Exec& exec,
                 const Progress& progress)
      : options_(options),
        progress_(progress),
        report_config_(arm_of(engine.attention_config(), OnOutlier::kReport)),
        escalate_config_(arm_of(engine.attention_config(), OnOutlier::kEscalate)),
        limits_(replica_limits(engine.attention_limits(), report_config_, options.seeds)),
        report_(report_config_, limits_, exec),
        escalate_(escalate_config_, limits_, exec),
        exact_(engine.attention_limits()),
        inputs_(limits_.max_seqs, limits_.max_seqs, engine.pages_for(limits_.max_context), limits_.max_context,
                limits_.device),
        q_(limits_.memory(), limits_.max_seqs * columns() * dtype_bytes(limits_.dtype), "the queries of replicas"),
        out_(limits_.memory(), q_.bytes(), "the outputs of replicas"),
        lse_(limits_.memory(), std::int64_t{limits_.max_seqs} * limits_.shape.heads * 4,
             "the log-sum-exps of replicas"),
        scores_(limits_.memory(), std::int64_t{limits_.shape.heads} * limits_.max_context * 4, "the scores of a step") {
    const AttentionConfig& config = engine.attention_config();
    for (std::size_t l = 0; l < config.layers.size(); ++l) {
      const VAttentionConfig* settings = vattention_of(config.layers[l]);
      if (settings == nullptr) continue;
      GuaranteeLayer& layer = layers_.emplace_back();
      layer.number = static_cast<int>(l);
      layer.config = *settings;
      layer.report.heads.resize(static_cast<std::size_t>(limits_.shape.heads));
      layer.escalate.heads = layer.report.heads;
    }
    total_ = windows * options.last * options.seeds * static_cast<std::int64_t>(layers_.size());
  }

  void begin_window(std::int64_t number) { window_ = number; }
  [[nodiscard]] std::vector<GuaranteeLayer>& layers() { return layers_; }

  void look(const Exec& exec, const AttendedLayer& layer) {
    const auto found = std::find_if(layers_.begin(), layers_.end(),
                                    [&](const GuaranteeLayer& known) { return known.number == layer.number; });
    if (found == layers_.end()) return;
    assert(layer.batch.seqs == 1);
    if (layer.batch.host_kv_len[0] <= layer.dense.tokens) {
      add_short(*found, layer.batch.host_kv_len[0]);
      advance(options_.seeds);
    } else {
      run_replicas(exec, layer, *found);
    }
  }

 private:
  [[nodiscard]] std::int64_t columns() const { return std::int64_t{limits_.shape.heads} * limits_.shape.head_dim; }

  void advance(std::int64_t replicas) {
    done_ += replicas;
    if (progress_) progress_(done_, total_);
  }

  void add_short(GuaranteeLayer& layer, std::int64_t kv_len) const {
    GuaranteeTrials trials;
    trials.heads.resize(layer.report.heads.size());
    for (HeadTrials& head : trials.heads) head.all.trials = options_.seeds;
    trials.lists = trials.short_lists = std::int64_t{options_.seeds} * limits_.shape.kv_heads;
    trials.kept_tokens = trials.visible_tokens = trials.lists * kv_len;
    layer.report.add(trials);
    layer.escalate.add(trials);
  }

  // All seeds of one step of one layer.
  void run_replicas(const Exec& exec, const AttendedLayer& layer, GuaranteeLayer& to) {
    exact_.run(exec, layer);
    const std::int64_t row_bytes = columns() * dtype_bytes(limits_.dtype);
    for (int s = 0; s < limits_.max_seqs; ++s) {
      copy_bytes(exec, static_cast<std::byte*>(q_.data()) + s * row_bytes, layer.q.data, row_bytes);
    }
    const std::int32_t kv_len = layer.batch.host_kv_len[0];
    const int pages = page_count(kv_len, limits_.shape.page_tokens);
    CachedSequence sequence;
    sequence.pages = read_back(exec, TensorView<const std::int32_t, 1>(&layer.batch.page_table(0, 0), pages));
    sequence.length = kv_len - 1;

    GuaranteeTrials report;
    GuaranteeTrials escalate;
    report.heads.resize(to.report.heads.size());
    escalate.heads.resize(to.report.heads.size());
    std::vector<Rest> rest;
    for (int from = 0; from < options_.seeds; from += limits_.max_seqs) {
      const int count = std::min(limits_.max_seqs, options_.seeds - from);
      const Batch batch = replicate(exec, sequence, from, count);
      const ReplicaResults reported = run_arm(exec, report_, layer, batch);
      if (rest.empty()) rest = measure_rest(exec, layer, report_.last_selection(layer.number));
      tally(reported, to.config, kv_len, rest, report);
      // Without a hit there is nothing to escalate, and the other arm would do the same again.
      tally(reported.guard_hits == 0 ? reported : run_arm(exec, escalate_, layer, batch), to.config, kv_len, rest,
            escalate);
      advance(count);
    }
    count_instances(to.config, report);
    count_instances(to.config, escalate);
    to.report.add(report);
    to.escalate.add(escalate);
  }

  // Replicas [from, from + count) of a sequence, one new token each; request numbers differ between windows too.
  Batch replicate(const Exec& exec, const CachedSequence& sequence, int from, int count) {
    std::vector<CachedSequence> replicas(static_cast<std::size_t>(count), sequence);
    constexpr std::array<std::int32_t, 1> kAnyId = {0};
    std::vector<StepEntry> entries;
    std::int64_t request = window_ * options_.seeds + from;
    for (CachedSequence& replica : replicas) {
      replica.request = static_cast<std::int32_t>(request++);
      entries.push_back({.sequence = &replica, .ids = kAnyId});
    }
    return inputs_.prepare(exec, Phase::kDecode, entries);
  }

  ReplicaResults run_arm(const Exec& exec, ModelAttention& arm, const AttendedLayer& layer, const Batch& batch) {
    const TensorRef q = q_.ref(limits_.dtype, batch.seqs, columns());
    const TensorRef out = out_.ref(limits_.dtype, batch.seqs, columns());
    const auto lse = lse_.view<float>(batch.seqs, limits_.shape.heads);
    arm.reset_totals(exec);
    arm.plan(batch);
    arm.run(exec, layer.number, q, layer.kv, batch, out, lse);
    const Selection list = arm.last_selection(layer.number);
    return {.out = read_floats(exec, out),
            .lse = read_back(exec, lse),
            .count = read_back(exec, list.count),
            .tail_begin = read_back(exec, list.tail_begin),
            .guard_hits = arm.totals(exec)[static_cast<std::size_t>(layer.number)].guard_hits};
  }

  // Of each query head. The static part is the same for all replicas: queries are.
  std::vector<Rest> measure_rest(const Exec& exec, const AttendedLayer& layer, const Selection& list) {
    const std::int32_t kv_len = layer.batch.host_kv_len[0];
    const std::int64_t columns = layer.batch.max_kv_len;
    const auto scores = scores_.view<float>(1, limits_.shape.heads, columns);
    score_tokens(exec, limits_.shape, layer.q, layer.kv, layer.batch, {}, KeySource::kExact, layer.dense, scores);
    const std::vector<float> score = read_back(exec, scores);
    const auto tokens = static_cast<std::size_t>(kv_len);
    const std::vector<std::int32_t> tail_begin = read_back(exec, list.tail_begin);
    std::vector<Rest> rest;
    for (int g = 0; g < limits_.shape.kv_heads; ++g) {
      const std::int32_t on_static = tail_begin[static_cast<std::size_t>(g)];
      std::vector<bool> listed(tokens);
      for (const std::int32_t t : read_back(exec, TensorView<const std::int32_t, 1>(&list.index(0, g, 0), on_static))) {
        listed[static_cast<std::size_t>(t)] = true;
      }
      for (int h = g * limits_.shape.group(); h < (g + 1) * limits_.shape.group(); ++h) {
        const auto row = static_cast<std::size_t>(h);
        const std::span<const float> of_head =
            std::span(score).subspan(row * static_cast<std::size_t>(columns), tokens);
        Moments weights;
        for (std::size_t t = 0; t < tokens; ++t) {
          if (!listed[t]) weights.add(std::exp(static_cast<double>(of_head[t] - exact_.lse(row))));
        }
        rest.push_back({.tokens = static_cast<double>(weights.count()), .deviation = std::sqrt(weights.variance())});
      }
    }
    return rest;
  }

  void tally(const ReplicaResults& results, const VAttentionConfig& config, std::int32_t kv_len,
             const std::vector<Rest>& rest, GuaranteeTrials& to) const {
    const auto kv_heads = static_cast<std::size_t>(limits_.shape.kv_heads);
    const auto group = static_cast<std::size_t>(limits_.shape.group());
    const double epsilon = static_cast<double>(config.epsilon);
    to.guard_hits += results.guard_hits;
    for (std::size_t list = 0; list < results.count.size(); ++list) {
      const std::size_t s = list / kv_heads;
      const std::size_t g = list % kv_heads;
      const double drawn = results.count[list] - results.tail_begin[list];
      const double rest_tokens = kv_len - results.tail_begin[list];
      ++to.lists;
      to.whole_lists += results.count[list] == kv_len ? 1 : 0;
      to.kept_tokens += results.count[list];
      to.visible_tokens += kv_len;
      to.sample_shares.push_back(rest_tokens > 0.0 ? drawn / rest_tokens : 1.0);
      double bias = 0.0;
      for (std::size_t h = g * group; h < (g + 1) * group; ++h) {
        bias += add_trial(results, s, h, epsilon, drawn, rest[h], to) / epsilon;
      }
      to.bias.add(bias / static_cast<double>(group));
    }
  }

  // Returns the denominator's relative error.
  double add_trial(const ReplicaResults& results, std::size_t s, std::size_t h, double epsilon, double drawn,
                   const Rest& rest, GuaranteeTrials& to) const {
    const auto heads = static_cast<std::size_t>(limits_.shape.heads);
    const auto channels = static_cast<std::size_t>(limits_.shape.head_dim);
    const std::size_t row = s * heads + h;
    const double error = std::expm1(static_cast<double>(results.lse[row]) - static_cast<double>(exact_.lse(h)));
    const double out_error = relative_error(std::span(results.out).subspan(row * channels, channels), exact_.out(h));
    // A number that is none is a miss.
    const Misses trial{
        .trials = 1, .denominator = std::abs(error) <= epsilon ? 0 : 1, .output = out_error <= epsilon ? 0 : 1};
    to.heads[h].all.add(trial);
    if (drawn >= rest.tokens) return error;
    to.heads[h].sampled.add(trial);
    const double deviation = rest.tokens * rest.deviation * std::sqrt(1.0 / drawn - 1.0 / rest.tokens);
    if (deviation >= kLeastDeviation) to.deviate.add(error / deviation);
    return error;
  }

  static void count_instances(const VAttentionConfig& config, GuaranteeTrials& trials) {
    for (const HeadTrials& head : trials.heads) {
      if (head.sampled.trials == 0) continue;
      const double allowed = static_cast<double>(config.delta) * static_cast<double>(head.all.trials);
      ++trials.instances;
      trials.instances_denominator += static_cast<double>(head.all.denominator) > allowed ? 1 : 0;
      trials.instances_output += static_cast<double>(head.all.output) > allowed ? 1 : 0;
    }
  }

  GuaranteeOptions options_;
  const Progress& progress_;
  AttentionConfig report_config_;
  AttentionConfig escalate_config_;
  AttentionLimits limits_;  // of replicas
  ModelAttention report_;
  ModelAttention escalate_;
  ExactStep exact_;
  StepInputs inputs_;
  Buffer q_;       // [replicas, heads * head_dim], one query
  Buffer out_;     // [replicas, heads * head_dim]
  Buffer lse_;     // [replicas, heads]
  Buffer scores_;  // [heads, max_context]
  std::vector<GuaranteeLayer> layers_;
  std::int64_t window_ = 0;
  std::int64_t done_ = 0;
  std::int64_t total_ = 0;
};

}  // namespace

void Misses::add(const Misses& other) {
  trials += other.trials;
  denominator += other.denominator;
  output += other.output;
}

void HeadTrials::add(const HeadTrials& other) {
  all.add(other.all);
  sampled.add(other.sampled);
}

void GuaranteeTrials::add(const GuaranteeTrials& other) {
  heads.resize(std::max(heads.size(), other.heads.size()));
  for (std::size_t h = 0; h < other.heads.size(); ++h) heads[h].add(other.heads[h]);
  bias.add(other.bias);
  deviate.add(other.deviate);
  sample_shares.insert(sample_shares.end(), other.sample_shares.begin(), other.sample_shares.end());
  lists += other.lists;
  whole_lists += other.whole_lists;
  short_lists += other.short_lists;
  kept_tokens += other.kept_tokens;
  visible_tokens += other.visible_tokens;
  guard_hits += other.guard_hits;
  instances += other.instances;
  instances_denominator += other.instances_denominator;
  instances_output += other.instances_output;
}

void check_guarantee(const AttentionConfig& config, const std::string& attention) {
  const auto promises = [](const BackendConfig& layer) { return vattention_of(layer) != nullptr; };
  if (std::any_of(config.layers.begin(), config.layers.end(), promises)) return;
  refuse({"evaluating the guarantee of --attention " + attention, "no layer with vattention, which alone makes one",
          "at least one", "use --attention vattention"});
}

std::vector<GuaranteeLayer> eval_guarantee(Engine& engine, std::span<const TokenIds> windows,
                                           const GuaranteeOptions& options, const Progress& progress) {
  const Stream stream(engine.attention_limits().device);
  GuaranteeProbe probe(engine, options, static_cast<std::int64_t>(windows.size()), stream.exec(), progress);
  stream.synchronize();
  const ProbeScope scope(engine, [&](const Exec& exec, const AttendedLayer& layer) { probe.look(exec, layer); });
  for (std::size_t w = 0; w < windows.size(); ++w) {
    const std::span<const std::int32_t> ids(windows[w]);
    check_token_ids(engine.config(), ids, "reading a window's ids");
    probe.begin_window(static_cast<std::int64_t>(w));
    feed_through_decode(engine, static_cast<int>(w), ids.first(ids.size() - 1), options.last,
                        [](int /*position*/, std::span<const float> /*logits*/) {}, {});
  }
  return std::move(probe.layers());
}

}  // namespace vesper
