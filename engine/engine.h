// One model on one device: its weights, its cache, and the steps that sequences take through it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "engine/memory_plan.h"
#include "engine/sampling.h"
#include "engine/step_inputs.h"
#include "kvcache/kv_cache.h"
#include "models/decoder.h"

namespace vesper {

struct EngineOptions {
  EngineLimits limits;
  std::string attention = "dense";                // FILE or shorthand
  std::vector<std::string> other_attention = {};  // further ones over the same cache, to compare: Engine::use_attention
  std::uint64_t seed = 0;                         // of synthetic weights
  bool graphs = true;                             // CUDA: decode steps are recorded once and replayed
  WeightFormat weights = WeightFormat::kStored;
};

// Whether `--model` names a shape with weights drawn from a seed: synthetic:NAME.
bool is_synthetic(const std::string& model);

// The shape behind `--model`: a folder, or synthetic:NAME.
ModelConfig model_config_of(const std::string& model);

// Refuses an id outside the vocabulary. `doing` says where the ids came from.
void check_token_ids(const ModelConfig& config, std::span<const std::int32_t> ids, const std::string& doing);

// The plan that an engine with these options would obey; reads headers, allocates nothing on the device. `free_bytes`
// stands for what is free on the device, where it is given.
MemoryPlan plan_engine_memory(const std::string& model, const ModelConfig& config, const EngineOptions& options,
                              std::optional<std::int64_t> free_bytes = {});

// Of a decode step: events where there is a device, else the host's clock.
struct StepTimer {
  std::optional<Event> begin;
  std::optional<Event> end;
  double host_seconds = 0.0;
};

// Not thread-safe. All device memory is taken while it is built; a step allocates none.
class Engine {
 public:
  // Loads `model` (a folder or synthetic:NAME). Throws an input error for what a user can mend.
  Engine(const std::string& model, const EngineOptions& options, const Progress& progress);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  Engine(Engine&&) = delete;
  Engine& operator=(Engine&&) = delete;

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] const MemoryPlan& memory() const { return plan_; }
  [[nodiscard]] DType weight_dtype() const { return weights_.dtype; }
  [[nodiscard]] int free_pages() const { return cache_->free_pages(); }
  [[nodiscard]] int pages_for(int tokens) const { return cache_->pages_for(tokens); }

  // Pages for `tokens` tokens of a sequence in all; false where the pool has too few left.
  [[nodiscard]] bool reserve(CachedSequence& sequence, int tokens) { return cache_->reserve(sequence, tokens); }
  // Rewinds a sequence; its later pages go back to the pool.
  void truncate(CachedSequence& sequence, int length) { cache_->truncate(sequence, length); }

  // One prefill step: `ids` (at most prefill_chunk of them) follow what the sequence holds. Ids must lie in the
  // vocabulary (an input error otherwise) and pages must be reserved. A prompt that takes several steps says its end in
  // sequence.prompt_length before the first, since dynamic rotary frequencies follow the whole of it.
  void prefill(CachedSequence& sequence, std::span<const std::int32_t> ids);
  // Stores `tokens` drawn tokens (at most prefill_chunk of them) behind what the sequence holds: a depth to measure at,
  // without a prefill. Pages must be reserved. `drawn.key_scale` lies on the device.
  void append_drawn(CachedSequence& sequence, int tokens, const DrawnKv& drawn);
  // Shuffles the free pages, so that page tables are as scattered as those of a long-running engine.
  void shuffle_free_pages(std::uint64_t seed) { cache_->shuffle_free_pages(seed); }
  // One decode step: one new token for each sequence, through every layer's own attention.
  void decode(std::span<CachedSequence* const> sequences, std::span<const std::int32_t> ids);
  // The same, then logits() of every sequence and sample(), all of it one launch where a graph serves. Waits for the
  // ids.
  //   params, steps: as sample()
  std::span<const std::int32_t> decode_and_sample(std::span<CachedSequence* const> sequences,
                                                  std::span<const std::int32_t> ids,
                                                  std::span<const SamplingParams> params,
                                                  std::span<const std::int32_t> steps);
  // Records the graphs of decode_and_sample for `seqs` sequences as they grow together from `first` to `last` tokens,
  // so that no step has to wait for it. Where steps run without graphs, nothing.
  void capture_ahead(int seqs, int first, int last);
  // Graphs recorded so far. One serves every step of its batch size, its context bucket (StepInputs) and its share of
  // dense and sparse sequences.
  [[nodiscard]] int captured_graphs() const { return static_cast<int>(graphs_.size()); }

  // Makes the logits of chosen query tokens of the last step, at most logit_rows(max_seqs) of them, on the device.
  //   query_tokens [n]: row numbers within the step; -> [n, vocab] f32 on the device, valid until the next call
  TensorView<const float, 2> logits(std::span<const std::int32_t> query_tokens);
  // The same, copied to the host and waited for.
  void read_logits(std::span<const std::int32_t> query_tokens, std::span<float> out);
  // Draws one id for each row of the last logits() call, on the device, and waits for it.
  //   params, steps [n]
  std::span<const std::int32_t> sample(std::span<const SamplingParams> params, std::span<const std::int32_t> steps);

  // Lets decode steps run the n-th attention: 0 is the options' own, the others follow in their order. Each keeps only
  // its own side tables up to date (ModelAttention::written): a sequence that one has decoded must be rewound before
  // another goes on with it.
  void use_attention(int n) { arm_ = static_cast<std::size_t>(n); }
  [[nodiscard]] const AttentionConfig& attention_config() const { return arms_[arm_]; }
  // What each layer's decode steps have read since the last reset.
  [[nodiscard]] std::vector<AttentionTotals> attention_totals() const {
    return attention_[arm_]->totals(stream_.exec());
  }
  void reset_attention_totals() { attention_[arm_]->reset_totals(stream_.exec()); }
  // Lets `probe` look at every layer of the decode steps of the attention in use; an empty one ends that.
  void set_attention_probe(AttentionProbe probe) { attention_[arm_]->set_probe(std::move(probe)); }
  // What that attention was built for.
  [[nodiscard]] const AttentionLimits& attention_limits() const { return attention_limits_; }

  // Lets `mark` mark the stages of every layer of the steps to come (ModelAttention::set_stage_mark), of the attention
  // in use; graphs are recorded with the marks in them. An empty one ends that. What a mark queues is recorded too, so
  // it must outlive the next call.
  void set_stage_mark(StageMark mark);
  // Whether decode steps are timed on the device, from before their launch to after it.
  void time_steps(bool wanted);
  // Device time of the last decode step, which must be done; timing must be on. On the CPU the time of its operations.
  [[nodiscard]] double step_device_seconds() const;

  // Waits for all queued work.
  void synchronize() const { stream_.synchronize(); }

  // Bytes that a decode step cannot do without: every matrix once, and K and V of all its tokens.
  //   kv_tokens: sum of the sequences' lengths
  [[nodiscard]] std::int64_t decode_step_bytes(int seqs, std::int64_t kv_tokens) const;

  // Multiplications and additions of matrices and dense attention that a prompt of `tokens` takes up to its first
  // logits.
  [[nodiscard]] std::int64_t prefill_flops(int tokens) const;
  // Largest memory held so far: device memory on CUDA, the process's resident memory on the CPU.
  [[nodiscard]] std::int64_t peak_memory_bytes() const;

 private:
  struct GraphKey {
    std::size_t arm = 0;
    bool sampled = false;
    bool marked = false;
    int seqs = 0;
    int max_kv_len = 0;
    std::vector<unsigned> work;  // ModelAttention::plan_key
    [[nodiscard]] auto key() const { return std::tie(arm, sampled, marked, seqs, max_kv_len, work); }
    bool operator<(const GraphKey& other) const { return key() < other.key(); }
  };

  Batch prepare_step(Phase phase, std::span<const StepEntry> entries);
  // Without `params` nothing is drawn.
  void run_decode(std::span<CachedSequence* const> sequences, std::span<const std::int32_t> ids,
                  std::span<const SamplingParams> params, std::span<const std::int32_t> steps);
  void queue_decode(const Batch& batch, bool sampled);
  [[nodiscard]] GraphKey graph_key(const Batch& batch, bool sampled) const;
  const Graph& graph_of(const Batch& batch, bool sampled);
  void capture_between(int seqs, int first, int last);
  void send_draws(std::span<const SamplingParams> params, std::span<const std::int32_t> steps);
  void queue_draws(std::int64_t rows);
  [[nodiscard]] std::span<const std::int32_t> drawn_ids(std::int64_t rows) const;

  ModelConfig config_;
  std::vector<AttentionConfig> arms_;
  MemoryPlan plan_;
  Stream stream_;
  ModelWeights weights_;
  std::unique_ptr<KvCache> cache_;
  AttentionLimits attention_limits_;
  std::vector<std::unique_ptr<ModelAttention>> attention_;  // of each arm
  std::size_t arm_ = 0;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<StepInputs> inputs_;
  Buffer logits_;            // [logit_rows, vocab] f32
  Buffer sampling_staging_;  // pinned or host: params [rows], steps [rows], ids [rows]
  Buffer sampling_device_;   // CUDA only, the same three
  int logits_made_ = 0;      // rows of the last logits() call
  std::optional<StepTimer> step_timer_;
  bool use_graphs_ = false;
  std::map<GraphKey, Graph> graphs_;  // look into all of the above
};

}  // namespace vesper
