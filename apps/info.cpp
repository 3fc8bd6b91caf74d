// vesper info: the model, the memory plan, the attention of each layer, the device.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "apps/attention_report.h"
#include "apps/options.h"
#include "kvcache/kv_cache.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

struct InfoOptions {
  ModelOptions model;
  int max_seqs = 1;
  bool json = false;
};

std::string device_line(const DeviceInfo& device) {
  if (device.kind == DeviceKind::kCpu) {
    return fmt::format("{}, {} of {} memory free", device.name, format_bytes(device.free_bytes),
                       format_bytes(device.total_bytes));
  }
  return fmt::format("{}, compute capability {}.{}, {} multiprocessors, {} L2, {} of {} memory free", device.name,
                     device.compute_capability / 10, device.compute_capability % 10, device.multiprocessors,
                     format_bytes(device.l2_bytes), format_bytes(device.free_bytes), format_bytes(device.total_bytes));
}

// For each run of layers with one setting: its range, its setting, and the side tables of one of its layers in bytes.
struct AttentionLine {
  std::string layers;
  std::string backend;
  std::int64_t side_table_bytes = 0;
};

std::vector<AttentionLine> attention_lines(const AttentionConfig& attention, const MemoryPlan& plan,
                                           const KvShape& shape) {
  std::vector<AttentionLine> lines;
  const std::vector<SideTables> tables = ModelAttention::side_tables({&attention, 1});
  for (const auto& [first, last] : layer_runs(attention)) {
    KvShape layer = shape;
    layer.layers = 1;
    const SideTables& of_layer = tables[static_cast<std::size_t>(first)];
    lines.push_back({layer_range(first, last), describe(attention.layers[static_cast<std::size_t>(first)]),
                     KvCache::bytes(layer, plan.kv_pages, {&of_layer, 1}) - KvCache::bytes(layer, plan.kv_pages)});
  }
  return lines;
}

nlohmann::json as_json(const ModelConfig& config, const std::string& tokenizer, const MemoryPlan& plan,
                       const std::vector<AttentionLine>& attention, const DeviceInfo& device,
                       const std::string& weights) {
  nlohmann::json document;
  document["device"] = {{"kind", device.kind == DeviceKind::kCuda ? "cuda" : "cpu"},
                        {"name", device.name},
                        {"total_bytes", device.total_bytes},
                        {"free_bytes", device.free_bytes}};
  document["model"] = {{"architecture", config.architecture},
                       {"layers", config.layers},
                       {"hidden", config.hidden},
                       {"heads", config.heads},
                       {"kv_heads", config.kv_heads},
                       {"head_dim", config.head_dim},
                       {"ffn", config.ffn},
                       {"vocab", config.vocab},
                       {"rope_theta", config.rope.theta},
                       {"rope", describe(config.rope)},
                       {"max_positions", config.max_positions},
                       {"tied_embeddings", config.tied_embeddings},
                       {"parameters", config.parameters()}};
  document["tokenizer"] = tokenizer.empty() ? nlohmann::json() : nlohmann::json(tokenizer);
  document["weights"] = weights;
  document["memory"] = {{"max_context", plan.limits.max_context}, {"max_seqs", plan.limits.max_seqs},
                        {"page_tokens", plan.limits.page_tokens}, {"kv_pages", plan.kv_pages},
                        {"total_bytes", plan.total_bytes},        {"free_bytes", plan.free_bytes},
                        {"parts", nlohmann::json::object()}};
  for (const MemoryPart& part : plan.parts) document["memory"]["parts"][part.name] = part.bytes;
  document["attention"] = nlohmann::json::array();
  for (const AttentionLine& line : attention) {
    document["attention"].push_back(
        {{"layers", line.layers}, {"backend", line.backend}, {"side_table_bytes_a_layer", line.side_table_bytes}});
  }
  return document;
}

int run_info(const InfoOptions& options) {
  const EngineOptions engine = engine_options(options.model, options.max_seqs);
  const ModelConfig config = model_config_of(options.model.model);
  const AttentionConfig attention = parse_attention(options.model.attention, config.layers);
  const MemoryPlan plan = plan_engine_memory(options.model.model, config, engine);
  const DeviceInfo device = device_info(engine.limits.device);
  const std::vector<AttentionLine> lines = attention_lines(attention, plan, kv_shape(config, plan));
  std::string tokenizer;
  if (has_tokenizer(options.model.model)) tokenizer = load_tokenizer(options.model.model)->description();
  if (options.json) {
    fmt::print("{}\n", as_json(config, tokenizer, plan, lines, device, options.model.weights).dump(2));
    return 0;
  }
  fmt::print("device      {}\n", device_line(device));
  fmt::print("model       {}: {} layers, hidden {}, {} heads, {} KV heads, head_dim {}, ffn {}, vocab {}{}\n",
             config.architecture, config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim,
             config.ffn, config.vocab, config.tied_embeddings ? ", tied embeddings" : "");
  fmt::print("            {:.2f} M parameters, {} positions, rope {}\n", static_cast<double>(config.parameters()) / 1e6,
             config.max_positions, describe(config.rope));
  fmt::print("tokenizer   {}\n", tokenizer.empty() ? "none: prompts are token ids" : tokenizer);
  for (const AttentionLine& line : lines) {
    fmt::print(
        "attention   layers {}: {}{}\n", line.layers, line.backend,
        line.side_table_bytes == 0 ? "" : fmt::format(", side tables {} a layer", format_bytes(line.side_table_bytes)));
  }
  fmt::print("context     {} sequence{} of {} token{}, {} page{} of {} tokens{}\n", plan.limits.max_seqs,
             plan.limits.max_seqs == 1 ? "" : "s", plan.limits.max_context, plan.limits.max_context == 1 ? "" : "s",
             plan.kv_pages, plan.kv_pages == 1 ? "" : "s", plan.limits.page_tokens,
             plan.context_was_cut ? " (what fits in 90 % of free memory)" : "");
  fmt::print("weights     {}\n", options.model.weights);
  fmt::print("memory      {} of {} free\n", format_bytes(plan.total_bytes), format_bytes(plan.free_bytes));
  for (const MemoryPart& part : plan.parts) fmt::print("  {:<20} {:>10}\n", part.name, format_bytes(part.bytes));
  return 0;
}

}  // namespace

Command make_info(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "info", "What a run would be: device, model, attention of each layer, memory plan. Loads and allocates nothing.");
  app->footer(
      "Examples:\n"
      "  vesper info --model configs/demo\n"
      "  vesper info --model synthetic:llama-3.1-8b --max-context 32768 --max-seqs 4");
  auto options = std::make_shared<InfoOptions>();
  add_model_flag(*app, options->model.model);
  add_engine_flags(*app, options->model);
  add_seed_flag(*app, options->model, "As a run takes it; changes nothing here", kRunFlags);
  app->add_option("--max-seqs", options->max_seqs, "Sequences side by side")
      ->check(whole_number(1, 4096))
      ->capture_default_str()
      ->type_name("N")
      ->group(kRunFlags);
  app->add_flag("--json", options->json, "Print one JSON document instead of text")->group(kOutputFlags);
  return Command{app, [options] { return run_info(*options); }};
}

}  // namespace vesper
