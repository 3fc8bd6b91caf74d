// How a model's layers attend: the interface of a backend, and the set of backends that a model runs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attention/attend.h"
#include "attention/config.h"
#include "attention/stage.h"
#include "engine/core/buffer.h"

namespace vesper {

// The largest step that attention must serve, and on what; scratch is sized by it when a backend is built.
struct AttentionLimits {
  AttentionShape shape;
  DeviceKind device = DeviceKind::kCpu;
  DType dtype = DType::kF32;  // of the cache
  int max_seqs = 1;
  int max_context = 0;     // tokens a sequence
  std::uint32_t seed = 0;  // of random draws, where a backend's settings name none

  // Where the buffers of attention lie.
  [[nodiscard]] Memory memory() const { return memory_of(device); }
};

// Bytes of scratch: partial results of splits, then scores, lists and counters.
struct AttentionScratch {
  std::int64_t partials = 0;
  std::int64_t selections = 0;
};

// Running totals of one layer's decode steps, on the device: what lists held, for each KV head. Zero for layers and
// sequences that attended dense.
struct LayerCounters {
  TensorView<std::int64_t, 1> kept_tokens;     // [kv_heads]
  TensorView<std::int64_t, 1> visible_tokens;  // [kv_heads]
  TensorView<std::int64_t, 1> sampled_tokens;  // [kv_heads]
  TensorView<std::int64_t, 1> lists;           // [kv_heads]
  TensorView<std::int64_t, 1> guard_hits;      // [kv_heads]
};

// One layer's cache and counters.
struct AttendLayer {
  int number = 0;
  LayerKv kv;
  LayerCounters counters;
  const StageMark* mark = nullptr;

  // Every stage of a backend begins with this. `cost` is a StageCost that holds what it needs by value.
  template <typename CostOf>
  void begin_stage(const Exec& exec, std::string_view stage, CostOf cost) const {
    if (mark != nullptr && *mark) (*mark)(exec, {.layer = number}, stage, StageCost(std::move(cost)));
  }
};

// Decides which cached keys a decode step reads, and reads them. One instance serves all layers that share its
// settings. Not thread-safe; one instance a rank.
class AttentionBackend {
 public:
  AttentionBackend() = default;
  virtual ~AttentionBackend() = default;
  AttentionBackend(const AttentionBackend&) = delete;
  AttentionBackend& operator=(const AttentionBackend&) = delete;
  AttentionBackend(AttentionBackend&&) = delete;
  AttentionBackend& operator=(AttentionBackend&&) = delete;

  // Host work of one decode step, before its first layer.
  virtual void plan(const Batch& batch) = 0;

  // Device work of one layer; K and V of this step are in the cache already. No host reads, no allocation.
  //   q, out [seqs, heads * head_dim];  lse [seqs, heads] is written where its data is not null
  virtual void run(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                   const TensorRef& out, TensorView<float, 2> lse) = 0;

  // The lists of the last run, on the device; null views for dense attention.
  [[nodiscard]] virtual Selection last_selection() const { return {}; }
  // Which kinds of work the planned step queues: bit 0 where a sequence attends dense, bit 1 where one makes lists.
  [[nodiscard]] virtual unsigned planned_work() const { return 1; }
  // Sequences of at most so many tokens attend dense.
  [[nodiscard]] virtual DenseLimit dense_limit() const { return {INT32_MAX}; }
  // Whether what run() leaves depends, in the planned step, on the side tables' entries of the step's own tokens: then
  // they must be up to date before it. Else run() may meet whatever the page's last owner left there.
  [[nodiscard]] virtual bool needs_newest_entries() const { return false; }
  // Bytes of side tables and of keys read for scores alone that one layer of the planned step reads.
  [[nodiscard]] virtual std::int64_t metadata_bytes() const { return 0; }
};

// Blocks that a device runs side by side: decode attention is cut into about so many pieces. The CPU cuts by length
// alone, as finely as it may, so that a sequence's result does not depend on the batch it is in.
int decode_units(const AttentionLimits& limits);

// Attention over every cached key.
class DenseAttention final : public AttentionBackend {
 public:
  // Device memory of the split partials.
  static std::int64_t scratch_bytes(const AttentionLimits& limits);

  explicit DenseAttention(const AttentionLimits& limits);
  void plan(const Batch& batch) override;
  void run(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch, const TensorRef& out,
           TensorView<float, 2> lse) override;
  // The same for the sequences of at most `longest` tokens only.
  void run_short(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                 const TensorRef& out, TensorView<float, 2> lse, std::int32_t longest);

 private:
  AttentionLimits limits_;
  int units_;  // blocks that the device runs side by side
  SplitPlan plan_;
  Buffer partials_;
};

// What a layer's decode steps read, added up over all steps so far.
struct AttentionTotals {
  std::string backend;
  std::int64_t steps = 0;           // sequence-steps, dense ones included
  std::int64_t sparse_steps = 0;    // of these, those that made lists
  std::int64_t lists = 0;           // one for each sparse step and KV head
  std::int64_t visible_tokens = 0;  // over sparse steps and KV heads
  std::int64_t kept_tokens = 0;
  std::int64_t sampled_tokens = 0;
  std::int64_t guard_hits = 0;
  std::int64_t dense_bytes = 0;     // K and V of all visible tokens, over all steps
  std::int64_t kv_bytes = 0;        // K and V read
  std::int64_t metadata_bytes = 0;  // side tables, and keys read for scores alone
};

// One layer's decode step that has just run, on the device: what went in, the list, what came out.
struct AttendedLayer {
  int number = 0;
  TensorRef q;  // [seqs, heads * head_dim]
  LayerKv kv;
  const Batch& batch;
  TensorRef out;     // [seqs, heads * head_dim]
  Selection list;    // of the sequences over `dense`; what it says of the others is stale
  DenseLimit dense;  // sequences of at most so many tokens attended dense
};
using AttentionProbe = std::function<void(const Exec& exec, const AttendedLayer& layer)>;

// The attention of a whole model: layer l decodes through the backend that `config` gives it, and prefills dense, as in
// all three papers.
class ModelAttention {
 public:
  // The facts about keys that each layer's backend needs, in any of several configurations over one cache.
  static std::vector<SideTables> side_tables(std::span<const AttentionConfig> arms);
  // Device memory that the backends of `config` take.
  static AttentionScratch scratch_bytes(const AttentionConfig& config, const AttentionLimits& limits);

  // Throws an input error where the device has no kernel for the shape, or a budget is under a page.
  ModelAttention(const AttentionConfig& config, const AttentionLimits& limits, const Exec& exec);

  // Host work of one step, before its first layer: decides what run() queues, by lengths alone. Steps of one batch
  // size, one max_kv_len and equal plan_key() queue the same work.
  void plan(const Batch& batch);
  // planned_work() of each backend.
  [[nodiscard]] std::vector<unsigned> plan_key() const;
  // Adds the planned decode step to the totals' host side. Once a step, whether run or replayed.
  void count_step(const Batch& batch);
  // A layer, after update_tables. Behind the last layer of a step finish_tables.
  //   q, out [tokens, heads * head_dim];  lse [seqs, heads], decode only, is written where its data is not null
  void run(const Exec& exec, int layer, const TensorRef& q, const LayerKv& kv, const Batch& batch, const TensorRef& out,
           TensorView<float, 2> lse = {});

  // What a step of this attention writes of a layer's cache: a prefill step all side tables there are, since any
  // attention over the cache may read them later, a decode step those that the layer's own backend reads. A sequence
  // that another attention goes on with must first be rewound to where this one began.
  [[nodiscard]] LayerKv written(Phase phase, int layer, const LayerKv& kv) const;

  // From now on `mark` is called where a stage of a layer's attention begins and where the last has ended, and may
  // queue events on the step's stream; an empty one ends that.
  void set_stage_mark(StageMark mark) { mark_ = std::move(mark); }
  [[nodiscard]] bool has_stage_mark() const { return static_cast<bool>(mark_); }
  // The stage before run(), "append": the side tables of the step's own tokens, in a prefill step and where the
  // layer's backend needs them in this very step.
  void update_tables(const Exec& exec, int layer, const LayerKv& kv, const Batch& batch) const;
  // Behind the last layer: those of all other layers at once, in one stage that they share, instead of one launch a
  // layer for which its attention would have to wait. After it the tables hold every token of the step.
  //   layers: of the whole cache
  void finish_tables(const Exec& exec, std::span<const LayerKv> layers, const Batch& batch);

  // From now on `probe` looks at every layer of a decode step after it ran, and may queue work and wait; an empty one
  // ends that. A step that is replayed from a graph runs on the device alone, unseen:
  // engines launch probed steps one by one.
  void set_probe(AttentionProbe probe) { probe_ = std::move(probe); }
  [[nodiscard]] bool probed() const { return probe_ != nullptr; }

  // The lists that `layer` made when it ran last (a replayed graph does not count); waits for nothing.
  [[nodiscard]] Selection last_selection(int layer) const;
  // Reads the device's counters back and waits. One entry a layer.
  [[nodiscard]] std::vector<AttentionTotals> totals(const Exec& exec) const;
  // Starts the counters anew.
  void reset_totals(const Exec& exec);

 private:
  [[nodiscard]] LayerCounters counters(int layer) const;
  void begin_append(const Exec& exec, const StageOwner& owner, const Batch& batch) const;
  [[nodiscard]] bool waits_for_tables(int layer) const;

  AttentionConfig config_;
  AttentionLimits limits_;
  std::vector<std::unique_ptr<AttentionBackend>> backends_;  // one for each distinct setting
  std::vector<AttentionBackend*> of_layer_;
  Buffer counters_;                       // [layers, 5, kv_heads] i64
  std::vector<AttentionTotals> counted_;  // what the host knows: steps and bytes
  AttentionProbe probe_;
  StageMark mark_;
  std::vector<SideTables> tables_;  // that each layer's backend reads
  std::vector<int> unfinished_;     // what finish_tables writes
  std::vector<LayerKv> unfinished_kv_;
};

}  // namespace vesper
