#include "engine/engine.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cstring>

#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr std::string_view kSynthetic = "synthetic:";

WeightsPlan plan_weights_of(const std::string& model, const ModelConfig& config, const EngineOptions& options) {
  const DeviceKind device = options.limits.device;
  return is_synthetic(model) ? plan_synthetic_weights(config, device, options.weights)
                             : plan_weights(model, config, device, options.weights);
}

// Draw arrays for one step, laid out one after the other.
struct SamplingArrays {
  SamplingParams* params;
  std::int32_t* steps;
  std::int32_t* ids;
};

SamplingArrays sampling_arrays(const Buffer& buffer, int rows) {
  auto* params = static_cast<SamplingParams*>(buffer.data());
  auto* numbers = reinterpret_cast<std::int32_t*>(params + rows);
  return {params, numbers, numbers + rows};
}

std::int64_t sampling_bytes(int rows) {
  return static_cast<std::int64_t>(rows) * static_cast<std::int64_t>(sizeof(SamplingParams) + 2 * sizeof(std::int32_t));
}

std::vector<AttentionConfig> parse_arms(const EngineOptions& options, const ModelConfig& config) {
  std::vector<AttentionConfig> arms = {parse_attention(options.attention, config.layers)};
  for (const std::string& other : options.other_attention) arms.push_back(parse_attention(other, config.layers));
  return arms;
}

// Tokens that each sequence of a step will hold, or the whole prompt that the step is a part of.
std::vector<int> lengths_after(std::span<const StepEntry> entries) {
  std::vector<int> lengths;
  lengths.reserve(entries.size());
  for (const auto& [sequence, ids] : entries) {
    lengths.push_back(std::max(sequence->length + static_cast<int>(ids.size()), sequence->prompt_length));
  }
  return lengths;
}

}  // namespace

bool is_synthetic(const std::string& model) {
  return model.starts_with(kSynthetic);
}

ModelConfig model_config_of(const std::string& model) {
  if (is_synthetic(model)) return synthetic_model_config(model.substr(kSynthetic.size()));
  return load_model_config(model);
}

void check_token_ids(const ModelConfig& config, std::span<const std::int32_t> ids, const std::string& doing) {
  for (const std::int32_t id : ids) {
    if (id >= 0 && id < config.vocab) continue;
    refuse({doing, "the id " + std::to_string(id), "ids from 0 to " + std::to_string(config.vocab - 1),
            "check that the tokenizer belongs to the model"});
  }
}

MemoryPlan plan_engine_memory(const std::string& model, const ModelConfig& config, const EngineOptions& options,
                              std::optional<std::int64_t> free_bytes) {
  const EngineLimits& limits = options.limits;
  if constexpr (kHaveCuda) {
    if (limits.device == DeviceKind::kCuda) cuda::check_attention_shape(attention_shape(config, limits.page_tokens));
  }
  return plan_memory(config, plan_weights_of(model, config, options), parse_arms(options, config), limits,
                     free_bytes ? *free_bytes : device_info(limits.device).free_bytes);
}

Engine::Engine(const std::string& model, const EngineOptions& options, const Progress& progress)
    : config_(model_config_of(model)),
      arms_(parse_arms(options, config_)),
      plan_(plan_engine_memory(model, config_, options)),
      stream_(options.limits.device) {
  const EngineLimits& limits = plan_.limits;
  const Exec exec = stream_.exec();
  if (plan_.context_was_cut) {
    spdlog::info("--max-context is {}: what fits in 90 % of free memory (the model knows {})", limits.max_context,
                 config_.max_positions);
  } else if (options.limits.max_context == 0) {
    spdlog::info("--max-context is {}: the model's maximum", limits.max_context);
  } else if (limits.max_context > config_.max_positions) {
    spdlog::warn("--max-context {} is more than the {} positions of the model's config.json", limits.max_context,
                 config_.max_positions);
  }

  weights_ = is_synthetic(model) ? synthetic_weights(config_, options.seed, exec, options.weights)
                                 : load_weights(model, config_, exec, progress, options.weights);
  const DType dtype = activation_dtype(limits.device, weights_.dtype);
  const int chunk = std::max(limits.prefill_chunk, limits.max_seqs);
  const int rows = logit_rows(limits.max_seqs);
  cache_ = std::make_unique<KvCache>(kv_shape(config_, plan_), plan_.kv_pages, limits.device,
                                     ModelAttention::side_tables(arms_));
  attention_limits_ = {.shape = attention_shape(config_, limits.page_tokens),
                       .device = limits.device,
                       .dtype = dtype,
                       .max_seqs = limits.max_seqs,
                       .max_context = limits.max_context,
                       .seed = static_cast<std::uint32_t>(options.seed)};
  for (const AttentionConfig& arm : arms_) {
    attention_.push_back(std::make_unique<ModelAttention>(arm, attention_limits_, exec));
  }
  decoder_ = std::make_unique<Decoder>(config_, weights_, *cache_, chunk, limits.max_seqs, exec);
  inputs_ = std::make_unique<StepInputs>(chunk, limits.max_seqs, cache_->pages_for(limits.max_context),
                                         limits.max_context, limits.device);
  logits_ = Buffer(memory_of(exec.device), std::int64_t{rows} * config_.vocab * 4, "the logits");
  sampling_staging_ =
      Buffer(exec.on_cuda() ? Memory::kPinned : Memory::kHost, sampling_bytes(rows), "the staging of sampling");
  if (exec.on_cuda()) sampling_device_ = Buffer(Memory::kDevice, sampling_bytes(rows), "the inputs of sampling");
  use_graphs_ = exec.on_cuda() && options.graphs;
  stream_.synchronize();
}

Engine::~Engine() = default;

Batch Engine::prepare_step(Phase phase, std::span<const StepEntry> entries) {
  for (const StepEntry& entry : entries) {
    assert(cache_->pages_for(entry.sequence->length + static_cast<int>(entry.ids.size())) <=
           static_cast<int>(entry.sequence->pages.size()));
    check_token_ids(config_, entry.ids, "feeding token ids");
  }
  stream_.synchronize();  // the arrays of the step before may still be on their way
  decoder_->place(stream_.exec(), lengths_after(entries));
  const Batch batch = inputs_->prepare(stream_.exec(), phase, entries);
  attention_[arm_]->plan(batch);
  return batch;
}

void Engine::prefill(CachedSequence& sequence, std::span<const std::int32_t> ids) {
  const StepEntry entry{.sequence = &sequence, .ids = ids};
  decoder_->forward(stream_.exec(), *attention_[arm_], prepare_step(Phase::kPrefill, std::span(&entry, 1)));
  sequence.length += static_cast<int>(ids.size());
}

void Engine::append_drawn(CachedSequence& sequence, int tokens, const DrawnKv& drawn) {
  const std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens), 0);  // stand for the tokens; nothing reads them
  const StepEntry entry{.sequence = &sequence, .ids = ids};
  decoder_->append_drawn(stream_.exec(), prepare_step(Phase::kPrefill, std::span(&entry, 1)), drawn);
  sequence.length += tokens;
}

void Engine::set_stage_mark(StageMark mark) {
  std::erase_if(graphs_, [](const auto& entry) { return entry.first.marked; });
  attention_[arm_]->set_stage_mark(std::move(mark));
}

void Engine::time_steps(bool wanted) {
  step_timer_.reset();
  if (!wanted) return;
  step_timer_.emplace();
  if (!stream_.exec().on_cuda()) return;
  step_timer_->begin.emplace();
  step_timer_->end.emplace();
}

double Engine::step_device_seconds() const {
  assert(step_timer_);
  if (!step_timer_->begin) return step_timer_->host_seconds;
  return static_cast<double>(step_timer_->end->ms_since(*step_timer_->begin)) * 1e-3;
}

void Engine::run_decode(std::span<CachedSequence* const> sequences, std::span<const std::int32_t> ids,
                        std::span<const SamplingParams> params, std::span<const std::int32_t> steps) {
  assert(sequences.size() == ids.size());
  const bool sampled = !params.empty();
  std::vector<StepEntry> entries;
  entries.reserve(ids.size());
  for (std::size_t s = 0; s < ids.size(); ++s) entries.push_back({.sequence = sequences[s], .ids = ids.subspan(s, 1)});
  const Batch batch = prepare_step(Phase::kDecode, entries);
  if (sampled) send_draws(params, steps);
  attention_[arm_]->count_step(batch);
  const bool replays = use_graphs_ && !attention_[arm_]->probed();  // a probe may wait, which no graph can record
  const Graph* graph = replays ? &graph_of(batch, sampled) : nullptr;
  const auto begin = std::chrono::steady_clock::now();
  if (step_timer_ && step_timer_->begin) step_timer_->begin->record(stream_.exec());
  graph != nullptr ? graph->launch(stream_.exec()) : queue_decode(batch, sampled);
  if (step_timer_ && step_timer_->end) step_timer_->end->record(stream_.exec());
  if (step_timer_) {
    step_timer_->host_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  for (CachedSequence* sequence : sequences) ++sequence->length;
}

void Engine::queue_decode(const Batch& batch, bool sampled) {
  const Exec exec = stream_.exec();
  decoder_->forward(exec, *attention_[arm_], batch);
  if (!sampled) return;
  decoder_->logits(exec, logits_.ref(DType::kF32, batch.seqs, config_.vocab));
  queue_draws(batch.seqs);
}

Engine::GraphKey Engine::graph_key(const Batch& batch, bool sampled) const {
  return {.arm = arm_,
          .sampled = sampled,
          .marked = attention_[arm_]->has_stage_mark(),
          .seqs = batch.seqs,
          .max_kv_len = batch.max_kv_len,
          .work = attention_[arm_]->plan_key()};
}

const Graph& Engine::graph_of(const Batch& batch, bool sampled) {
  GraphKey key = graph_key(batch, sampled);
  if (const auto found = graphs_.find(key); found != graphs_.end()) return found->second;
  Graph graph = Graph::capture(stream_.exec(), [&] { queue_decode(batch, sampled); });
  return graphs_.emplace(std::move(key), std::move(graph)).first->second;
}

void Engine::capture_ahead(int seqs, int first, int last) {
  if (!use_graphs_) return;
  last = std::min(last, plan_.limits.max_context);
  while (first <= last) {
    const int bucket_end = std::min(last, inputs_->context_bucket(first));
    capture_between(seqs, first, bucket_end);
    first = bucket_end + 1;
  }
}

// Within a bucket the kinds of work change at the backends' thresholds, which bisection finds.
void Engine::capture_between(int seqs, int first, int last) {
  const auto capture = [&](int kv_len) {
    const std::vector<std::int32_t> lengths(static_cast<std::size_t>(seqs), kv_len);
    const Batch batch = inputs_->decode_batch(lengths);
    attention_[arm_]->plan(batch);
    (void)graph_of(batch, true);
    return attention_[arm_]->plan_key();
  };
  if (capture(first) == capture(last) || last - first <= 1) return;
  const int middle = first + (last - first) / 2;
  capture_between(seqs, first, middle);
  capture_between(seqs, middle, last);
}

void Engine::decode(std::span<CachedSequence* const> sequences, std::span<const std::int32_t> ids) {
  run_decode(sequences, ids, {}, {});
}

std::span<const std::int32_t> Engine::decode_and_sample(std::span<CachedSequence* const> sequences,
                                                        std::span<const std::int32_t> ids,
                                                        std::span<const SamplingParams> params,
                                                        std::span<const std::int32_t> steps) {
  const auto rows = static_cast<std::int64_t>(ids.size());
  assert(params.size() == ids.size());
  logits_made_ = static_cast<int>(rows);
  run_decode(sequences, ids, params, steps);
  return drawn_ids(rows);
}

TensorView<const float, 2> Engine::logits(std::span<const std::int32_t> query_tokens) {
  const auto rows = static_cast<std::int64_t>(query_tokens.size());
  assert(rows <= logit_rows(plan_.limits.max_seqs));
  decoder_->logits(stream_.exec(), inputs_->prepare_rows(stream_.exec(), query_tokens),
                   logits_.ref(DType::kF32, rows, config_.vocab));
  logits_made_ = static_cast<int>(rows);
  return logits_.view<const float>(rows, config_.vocab);
}

void Engine::read_logits(std::span<const std::int32_t> query_tokens, std::span<float> out) {
  const TensorView<const float, 2> made = logits(query_tokens);
  assert(static_cast<std::int64_t>(out.size()) >= made.size());
  copy_bytes(stream_.exec(), out.data(), made.data(), made.size() * dtype_bytes(DType::kF32));
  stream_.synchronize();
}

std::span<const std::int32_t> Engine::sample(std::span<const SamplingParams> params,
                                             std::span<const std::int32_t> steps) {
  const auto rows = static_cast<std::int64_t>(params.size());
  assert(rows == logits_made_);
  send_draws(params, steps);
  queue_draws(rows);
  return drawn_ids(rows);
}

// The staging is free: whoever sent draws before has waited for their ids, or for the step in front of this call.
void Engine::send_draws(std::span<const SamplingParams> params, std::span<const std::int32_t> steps) {
  assert(params.size() == steps.size());
  const Exec exec = stream_.exec();
  const auto rows = static_cast<std::int64_t>(params.size());
  const int capacity = logit_rows(plan_.limits.max_seqs);
  const SamplingArrays host = sampling_arrays(sampling_staging_, capacity);
  std::copy(params.begin(), params.end(), host.params);
  std::copy(steps.begin(), steps.end(), host.steps);
  if (!exec.on_cuda()) return;
  const SamplingArrays device = sampling_arrays(sampling_device_, capacity);
  copy_bytes(exec, device.params, host.params, rows * static_cast<std::int64_t>(sizeof(SamplingParams)));
  copy_bytes(exec, device.steps, host.steps, rows * 4);
}

// Draws from the first `rows` rows of logits, and brings the ids to the host.
void Engine::queue_draws(std::int64_t rows) {
  const Exec exec = stream_.exec();
  const int capacity = logit_rows(plan_.limits.max_seqs);
  const SamplingArrays host = sampling_arrays(sampling_staging_, capacity);
  const SamplingArrays device = exec.on_cuda() ? sampling_arrays(sampling_device_, capacity) : host;
  vesper::sample(exec, logits_.view<const float>(rows, config_.vocab),
                 TensorView<const SamplingParams, 1>(device.params, rows),
                 TensorView<const std::int32_t, 1>(device.steps, rows), TensorView<std::int32_t, 1>(device.ids, rows));
  if (exec.on_cuda()) copy_bytes(exec, host.ids, device.ids, rows * 4);
}

// Waits for what queue_draws queued.
std::span<const std::int32_t> Engine::drawn_ids(std::int64_t rows) const {
  stream_.synchronize();
  const SamplingArrays host = sampling_arrays(sampling_staging_, logit_rows(plan_.limits.max_seqs));
  for (std::int64_t row = 0; row < rows; ++row) {
    if (host.ids[row] >= 0) continue;  // CUDA's answer to a row without a number
    fail({"sampling a token for row " + std::to_string(row) + " of the batch", "no logit that is a number above -inf",
          "at least one", "check the weights for NaN and infinities"});
  }
  return {host.ids, static_cast<std::size_t>(rows)};
}

std::int64_t Engine::decode_step_bytes(int seqs, std::int64_t kv_tokens) const {
  // The embedding is read a row a sequence; a tied head reads it whole, as the head.
  const std::int64_t embedding = weights_.embedding.bytes();
  const bool tied = weights_.head.blocks[0].data == weights_.embedding.data;
  const std::int64_t matrices = tied ? weights_.bytes : weights_.bytes - embedding;
  const std::int64_t embedding_rows = std::int64_t{seqs} * (embedding / config_.vocab);
  const KvShape& kv = cache_->shape();
  return matrices + embedding_rows + kv_tokens * (kv.page_bytes() / kv.page_tokens);
}

std::int64_t Engine::prefill_flops(int tokens) const {
  const std::int64_t hidden = config_.hidden;
  const std::int64_t attention_rows = 2 * std::int64_t{config_.q_rows()} + 2 * std::int64_t{config_.kv_rows()};
  const std::int64_t layer_weights = hidden * (attention_rows + 3 * std::int64_t{config_.ffn});
  const Cost attention = attend_prefill_cost(attention_limits_.shape, cache_->shape().dtype, tokens, tokens);
  return config_.layers * (2 * std::int64_t{tokens} * layer_weights + attention.flops) +
         2 * hidden * std::int64_t{config_.vocab};
}

std::int64_t Engine::peak_memory_bytes() const {
  if (stream_.exec().on_cuda()) return allocation_count(Memory::kDevice).peak_bytes;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return std::int64_t{usage.ru_maxrss} * 1024;
}

}  // namespace vesper
