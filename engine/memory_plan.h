// What a run will hold in device memory, part by part, before any of it is taken.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "models/model_config.h"
#include "models/weights.h"

namespace vesper {

// What a user may ask of a run. `max_context` 0: as much as the model knows and memory holds.
struct EngineLimits {
  DeviceKind device = DeviceKind::kCpu;
  int max_context = 0;  // tokens a sequence, prompt and answer together
  int max_seqs = 1;
  int prefill_chunk = 2048;  // query tokens a prefill step
  int page_tokens = 16;
};

struct MemoryPart {
  std::string name;
  std::int64_t bytes = 0;
};

struct MemoryPlan {
  std::vector<MemoryPart> parts;
  std::int64_t total_bytes = 0;
  std::int64_t free_bytes = 0;  // on the device, when the plan was made
  EngineLimits limits;          // with max_context decided
  int kv_pages = 0;
  DType kv_dtype = DType::kF32;
  bool context_was_cut = false;  // max_context was 0 and memory holds less than the model knows
};

// Rows of logits that the engine can make at once: one a sequence, and a block for `vesper logits`.
int logit_rows(int max_seqs);

// Dtype of K, V and activations: f32 on the CPU, the weights' 16-bit type on CUDA.
DType activation_dtype(DeviceKind device, DType weights);

AttentionShape attention_shape(const ModelConfig& config, int page_tokens);

// K and V of the plan's cache.
KvShape kv_shape(const ModelConfig& config, const MemoryPlan& plan);

// The plan for `limits`, with every attention of `arms` over one cache, in `free_bytes` of device memory. A max_context
// of 0 becomes the model's maximum or what fits in nine tenths of the free memory, whichever is less. Throws an input
// error that names need, room and the two knobs
// (--max-context and the number of sequences) where the plan does not fit.
MemoryPlan plan_memory(const ModelConfig& config, const WeightsPlan& weights, std::span<const AttentionConfig> arms,
                       const EngineLimits& limits, std::int64_t free_bytes);

// "16.1 GB", "540.3 MB", "12.0 KB", "17 B"; powers of 1000.
std::string format_bytes(std::int64_t bytes);

}  // namespace vesper
