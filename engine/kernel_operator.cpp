#include "engine/kernel_operator.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "engine/bench_figures.h"
#include "engine/core/error.h"
#include "engine/engine.h"
#include "engine/eval_attention.h"
#include "engine/kernel_timer.h"
#include "engine/kernel_world.h"

namespace vesper {
namespace {

constexpr int kMarkedReplays = 5;
constexpr int kLookedTurns = 4;

class Operators {
 public:
  Operators(const Exec& exec, const AttentionLimits& limits, KernelWorld& world)
      : exec_(exec), limits_(limits), world_(world), truth_(exec, world) {}

  std::vector<OperatorRow> run(const std::vector<std::string>& attentions) {
    std::vector<std::unique_ptr<ModelAttention>> arms;
    std::vector<QueueTurn> queues;
    for (const std::string& attention : attentions) {
      const AttentionConfig config = parse_attention(attention, world_.turns(), 0);
      arms.push_back(std::make_unique<ModelAttention>(config, limits_, exec_));
      arms.back()->plan(world_.decode());
      queues.push_back([this, arm = arms.back().get()](int turn) { queue(*arm, turn); });
    }
    const std::vector<std::vector<double>> seconds = time_arms(exec_, world_.turns(), queues);
    std::vector<OperatorRow> rows;
    for (std::size_t i = 0; i < attentions.size(); ++i) {
      OperatorRow& row = rows.emplace_back();
      row.attention = attentions[i];
      row.seconds = seconds[i];
      row.turns = world_.turns();
      count(*arms[i], row);
      check(*arms[i], row);
      time_stages(*arms[i], parse_attention(attentions[i], world_.turns(), 0), row);
    }
    return rows;
  }

  [[nodiscard]] double sigma() const { return truth_.sigma(); }

 private:
  void queue(ModelAttention& attention, int turn) {
    attention.update_tables(exec_, turn, world_.kv(turn), world_.decode());
    attention.run(exec_, turn, world_.q(turn), world_.kv(turn), world_.decode(), world_.out(turn), world_.lse(turn));
    if (turn == world_.turns() - 1) attention.finish_tables(exec_, world_.layers(), world_.decode());
  }
  void queue_all(ModelAttention& attention) {
    for (int turn = 0; turn < world_.turns(); ++turn) queue(attention, turn);
  }

  // One round of turns, by the device's counters, and some of its lists one by one.
  void count(ModelAttention& attention, OperatorRow& row) {
    attention.reset_totals(exec_);
    attention.count_step(world_.decode());
    AttentionFidelity fidelity(limits_, std::vector<BackendConfig>(static_cast<std::size_t>(world_.turns())));
    int looked = 0;
    for (int turn = 0; turn < world_.turns(); ++turn) {
      if (looked++ < kLookedTurns) {
        attention.set_probe([&](const Exec& exec, const AttendedLayer& layer) { fidelity.look(exec, layer); });
      }
      queue(attention, turn);
      attention.set_probe({});
    }
    synchronize(exec_);
    std::int64_t lists = 0;
    std::int64_t kept = 0;
    for (const AttentionTotals& layer : attention.totals(exec_)) {
      row.kv_bytes += static_cast<double>(layer.kv_bytes) / world_.turns();
      row.metadata_bytes += static_cast<double>(layer.metadata_bytes) / world_.turns();
      row.dense_kv_bytes += static_cast<double>(layer.dense_bytes) / world_.turns();
      lists += layer.lists;
      kept += layer.kept_tokens;
    }
    row.kept_tokens = lists == 0 ? world_.context() : static_cast<double>(kept) / static_cast<double>(lists);
    row.kept_tokens_p99 = row.kept_tokens;
    if (lists == 0) return;
    std::vector<double> shares;
    Moments mass;
    for (const LayerFidelity& layer : fidelity.layers()) {
      for (const std::vector<double>& head : layer.kept_share) shares.insert(shares.end(), head.begin(), head.end());
      for (const std::vector<double>& head : layer.kept_mass) {
        for (const double share : head) mass.add(share);
      }
    }
    row.kept_tokens_p99 = quantile(shares, 0.99) * world_.context();
    row.kept_mass = mass.mean();
  }

  void check(ModelAttention& attention, OperatorRow& row) {
    queue(attention, 0);
    const Selection list = attention.last_selection(0);
    std::optional<HostList> host;
    if (list.index.data() != nullptr) host.emplace(exec_, list);
    const std::vector<float> all = read_floats(exec_, world_.out(0));
    const std::int64_t channels = std::int64_t{limits_.shape.group()} * limits_.shape.head_dim;
    row.check = check_attended(row.attention, world_.dtype(), {all.begin(), all.begin() + channels},
                               truth_.attend(host ? &host->list : nullptr));
  }

  // A graph of its own, with marks.
  void time_stages(ModelAttention& attention, const AttentionConfig& config, OperatorRow& row) {
    StageClock clock(limits_.device, world_.turns(), true);
    attention.set_stage_mark(clock.mark());
    if (exec_.on_cuda()) {
      const Graph graph = Graph::capture(exec_, [&] { queue_all(attention); });
      graph.launch(exec_);
      for (int i = 0; i < kMarkedReplays; ++i) {
        graph.launch(exec_);
        synchronize(exec_);
        clock.read();
      }
    } else {
      queue_all(attention);
      clock.read();
    }
    clock.ask_costs(true);
    queue_all(attention);
    synchronize(exec_);
    attention.set_stage_mark({});
    row.stages = clock.figures(config.layers);
    if (!exec_.on_cuda()) return;
    const double seconds = quantile(row.seconds, 0.5);
    row.stages =
        without_seams(std::move(row.stages), {{.backend = {}, .stage = "all", .seconds = seconds, .cost = {}}});
  }

  Exec exec_;
  AttentionLimits limits_;
  KernelWorld& world_;
  KernelTruth truth_;
};

void check_rate(const OperatorRow& row, const Roof& roof) {
  const double rate = (row.kv_bytes + row.metadata_bytes) / quantile(row.seconds, 0.5);
  if (!row.cold || rate <= kRoofTolerance * roof.read_bytes_per_s) return;
  fail({fmt::format("checking the figures of {}", row.attention),
        fmt::format("{:.0f} GB/s, {:.3f} x the read rate of {:.0f} GB/s probed in this run", rate * 1e-9,
                    rate / roof.read_bytes_per_s, roof.read_bytes_per_s * 1e-9),
        fmt::format("at most {} x", kRoofTolerance), "run it again on a machine that nothing else uses"});
}

}  // namespace

OperatorReport run_operators(const KernelSetting& setting, const std::vector<std::string>& attentions) {
  const ModelConfig config = model_config_of(setting.model);
  const AttentionShape shape = attention_shape(config, setting.page_tokens);
  const DType dtype = activation_dtype(setting.device, config.dtype);
  const int context = setting.contexts.at(0);
  const int batch = setting.batches.at(0);
  OperatorReport report;
  const std::int64_t room = KernelWorld::room(setting.device);
  const int turns = KernelWorld::turns_in(room, setting.device, shape, dtype, context, batch);
  if (turns == 0) {
    report.skipped =
        fmt::format("a layer's keys, values and side tables take {}, of which {} have to hold enough",
                    format_bytes(KernelWorld::layer_bytes(shape, dtype, context, batch)), format_bytes(room));
    return report;
  }
  report.roof = probe_roof(setting.device);
  const Stream stream(setting.device);
  KernelWorld world(stream.exec(), shape, dtype, context, batch, turns, setting);
  Operators operators(stream.exec(), world.limits(setting), world);
  report.rows = operators.run(attentions);
  report.sigma = operators.sigma();
  report.roof = higher(report.roof, probe_roof(setting.device));
  const double cache_bytes = 2.0 * static_cast<double>(last_cache_bytes(setting.device));
  for (OperatorRow& row : report.rows) {
    row.cold = row.turns * (row.kv_bytes + row.metadata_bytes) > cache_bytes;
    check_rate(row, report.roof);
  }
  return report;
}

}  // namespace vesper
