#include "engine/memory_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "engine/core/error.h"
#include "engine/step_inputs.h"
#include "kvcache/kv_cache.h"
#include "models/decoder.h"

namespace vesper {
namespace {

// Share of the free memory that an undecided max_context may fill; the rest is for the driver and for other processes.
constexpr double kMemoryShare = 0.9;
// `vesper logits` asks for the logits of a whole prompt, this many rows at a time.
constexpr int kLogitBlock = 16;

MemoryPlan plan_for_context(const ModelConfig& config, const WeightsPlan& weights,
                            std::span<const AttentionConfig> arms, EngineLimits limits, int max_context) {
  limits.max_context = max_context;
  const DType dtype = activation_dtype(limits.device, weights.dtype);
  const AttentionShape shape = attention_shape(config, limits.page_tokens);
  const AttentionLimits attention_limits{
      .shape = shape, .device = limits.device, .dtype = dtype, .max_seqs = limits.max_seqs, .max_context = max_context};
  const std::vector<SideTables> side_tables = ModelAttention::side_tables(arms);
  AttentionScratch scratch;
  for (const AttentionConfig& arm : arms) {
    const AttentionScratch own = ModelAttention::scratch_bytes(arm, attention_limits);
    scratch.partials += own.partials;
    scratch.selections += own.selections;
  }
  const int seq_pages = page_count(max_context, limits.page_tokens);
  const int chunk = std::max(limits.prefill_chunk, limits.max_seqs);

  MemoryPlan plan;
  plan.limits = limits;
  plan.kv_dtype = dtype;
  const KvShape kv = kv_shape(config, plan);
  const std::int64_t pages = std::int64_t{seq_pages} * limits.max_seqs;
  plan.kv_pages = static_cast<int>(std::min<std::int64_t>(pages, INT32_MAX));
  plan.parts = {
      {"weights", weights.device_bytes},
      {"KV cache", KvCache::bytes(kv, pages)},
      {"side tables", KvCache::bytes(kv, pages, side_tables) - KvCache::bytes(kv, pages)},
      {"selections", scratch.selections},
      {"split partials", scratch.partials},
      {"activations", Decoder::activation_bytes(config, dtype, chunk)},
      {"logits", std::int64_t{logit_rows(limits.max_seqs)} * config.vocab * dtype_bytes(DType::kF32)},
      {"step inputs", StepInputs::bytes(chunk, limits.max_seqs, seq_pages)},
      {"cuBLASLt workspace", LinearContext::workspace_bytes(limits.device)},
      {"dequantised panel", weights.panel_bytes},
      {"graphs", 0},  // none are captured yet
  };
  for (const MemoryPart& part : plan.parts) plan.total_bytes += part.bytes;
  return plan;
}

}  // namespace

int logit_rows(int max_seqs) {
  return std::max(max_seqs, kLogitBlock);
}

DType activation_dtype(DeviceKind device, DType weights) {
  if (device == DeviceKind::kCpu) return DType::kF32;
  return weights == DType::kF16 ? DType::kF16 : DType::kBf16;
}

AttentionShape attention_shape(const ModelConfig& config, int page_tokens) {
  return AttentionShape{.heads = config.heads,
                        .kv_heads = config.kv_heads,
                        .head_dim = config.head_dim,
                        .page_tokens = page_tokens,
                        .scale = 1.0F / std::sqrt(static_cast<float>(config.head_dim))};
}

KvShape kv_shape(const ModelConfig& config, const MemoryPlan& plan) {
  return KvShape{.layers = config.layers,
                 .kv_heads = config.kv_heads,
                 .head_dim = config.head_dim,
                 .page_tokens = plan.limits.page_tokens,
                 .dtype = plan.kv_dtype};
}

MemoryPlan plan_memory(const ModelConfig& config, const WeightsPlan& weights, std::span<const AttentionConfig> arms,
                       const EngineLimits& limits, std::int64_t free_bytes) {
  const auto plan_at = [&](int context) {
    MemoryPlan plan = plan_for_context(config, weights, arms, limits, context);
    plan.free_bytes = free_bytes;
    return plan;
  };
  const bool undecided = limits.max_context == 0;
  MemoryPlan plan = plan_at(undecided ? config.max_positions : limits.max_context);
  const auto room = undecided ? static_cast<std::int64_t>(kMemoryShare * static_cast<double>(free_bytes)) : free_bytes;
  if (undecided && plan.total_bytes > room) {
    int fits = 0;
    int too_long = config.max_positions;
    while (too_long - fits > 1) {
      const int middle = fits + (too_long - fits) / 2;
      (plan_at(middle).total_bytes <= room ? fits : too_long) = middle;
    }
    plan = plan_at(std::max(1, fits));
    plan.context_was_cut = true;
  }
  if (plan.total_bytes > room) {
    refuse({fmt::format("planning memory for {} sequence{} of {} tokens", limits.max_seqs,
                        limits.max_seqs == 1 ? "" : "s", plan.limits.max_context),
            fmt::format("a need of {} ({} of it weights, {} KV cache)", format_bytes(plan.total_bytes),
                        format_bytes(plan.parts[0].bytes), format_bytes(plan.parts[1].bytes)),
            fmt::format("at most {} ({} are free)", format_bytes(room), format_bytes(free_bytes)),
            "lower --max-context or the number of sequences"});
  }
  return plan;
}

std::string format_bytes(std::int64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KB", "MB", "GB", "TB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 999.95 && unit + 1 < kUnits.size()) {
    value /= 1000.0;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kUnits[unit]);
}

}  // namespace vesper
