// vesper info: the model, the memory plan, the attention of each layer, the device.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "apps/options.h"
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

// "layers 0-31  dense": neighbours with one setting in one line.
std::vector<std::pair<std::string, std::string>> attention_lines(const AttentionConfig& attention) {
  std::vector<std::pair<std::string, std::string>> lines;
  const std::size_t layers = attention.layers.size();
  for (std::size_t first = 0; first < layers;) {
    std::size_t last = first;
    while (last + 1 < layers && attention.layers[last + 1] == attention.layers[first]) ++last;
    lines.emplace_back(first == last ? fmt::format("{}", first) : fmt::format("{}-{}", first, last),
                       attention.layers[first].backend);
    first = last + 1;
  }
  return lines;
}

nlohmann::json as_json(const ModelConfig& config, const std::string& tokenizer, const MemoryPlan& plan,
                       const AttentionConfig& attention, const DeviceInfo& device) {
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
                       {"rope_theta", config.rope_theta},
                       {"max_positions", config.max_positions},
                       {"tied_embeddings", config.tied_embeddings},
                       {"parameters", config.parameters()}};
  document["tokenizer"] = tokenizer.empty() ? nlohmann::json() : nlohmann::json(tokenizer);
  document["memory"] = {{"max_context", plan.limits.max_context}, {"max_seqs", plan.limits.max_seqs},
                        {"page_tokens", plan.limits.page_tokens}, {"kv_pages", plan.kv_pages},
                        {"total_bytes", plan.total_bytes},        {"free_bytes", plan.free_bytes},
                        {"parts", nlohmann::json::object()}};
  for (const MemoryPart& part : plan.parts) document["memory"]["parts"][part.name] = part.bytes;
  document["attention"] = nlohmann::json::array();
  for (const auto& [layers, backend] : attention_lines(attention)) {
    document["attention"].push_back({{"layers", layers}, {"backend", backend}});
  }
  return document;
}

int run_info(const InfoOptions& options) {
  const EngineOptions engine = engine_options(options.model, options.max_seqs);
  const ModelConfig config = model_config_of(options.model.model);
  const AttentionConfig attention = parse_attention(options.model.attention, config.layers);
  const MemoryPlan plan = plan_engine_memory(options.model.model, config, engine);
  const DeviceInfo device = device_info(engine.limits.device);
  std::string tokenizer;
  if (has_tokenizer(options.model.model)) tokenizer = load_tokenizer(options.model.model)->description();
  if (options.json) {
    fmt::print("{}\n", as_json(config, tokenizer, plan, attention, device).dump(2));
    return 0;
  }
  fmt::print("device      {}\n", device_line(device));
  fmt::print("model       {}: {} layers, hidden {}, {} heads, {} KV heads, head_dim {}, ffn {}, vocab {}{}\n",
             config.architecture, config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim,
             config.ffn, config.vocab, config.tied_embeddings ? ", tied embeddings" : "");
  fmt::print("            {:.2f} M parameters, {} positions, rope theta {}\n",
             static_cast<double>(config.parameters()) / 1e6, config.max_positions, config.rope_theta);
  fmt::print("tokenizer   {}\n", tokenizer.empty() ? "none: prompts are token ids" : tokenizer);
  for (const auto& [layers, backend] : attention_lines(attention)) {
    fmt::print("attention   layers {}: {}\n", layers, backend);
  }
  fmt::print("context     {} sequence{} of {} token{}, {} page{} of {} tokens{}\n", plan.limits.max_seqs,
             plan.limits.max_seqs == 1 ? "" : "s", plan.limits.max_context, plan.limits.max_context == 1 ? "" : "s",
             plan.kv_pages, plan.kv_pages == 1 ? "" : "s", plan.limits.page_tokens,
             plan.context_was_cut ? " (what fits in 90 % of free memory)" : "");
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
