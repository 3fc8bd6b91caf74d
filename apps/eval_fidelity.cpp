// vesper eval fidelity: next-token distributions and each layer's attention against dense.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "apps/eval_windows.h"
#include "apps/progress.h"
#include "engine/statistics.h"

namespace vesper {
namespace {

using Values = std::vector<double>;

Values all_of(const std::vector<Values>& rows) {
  Values all;
  for (const Values& row : rows) all.insert(all.end(), row.begin(), row.end());
  return all;
}

nlohmann::json error_json(const Values& errors) {
  return {{"p50", quantile(errors, 0.5)}, {"p95", quantile(errors, 0.95)}, {"p99", quantile(errors, 0.99)}};
}

nlohmann::json mass_json(const Values& masses) {
  return {{"mean", mean(masses)}, {"least", quantile(masses, 0.0)}};
}

nlohmann::json layers_json(const std::vector<LayerFidelity>& layers) {
  nlohmann::json report = nlohmann::json::array();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const LayerFidelity& layer = layers[l];
    nlohmann::json heads = nlohmann::json::array();
    for (std::size_t h = 0; h < layer.error.size(); ++h) {
      heads.push_back({{"error", error_json(layer.error[h])}, {"kept_mass", mass_json(layer.kept_mass[h])}});
    }
    nlohmann::json kv_heads = nlohmann::json::array();
    for (const Values& shares : layer.kept_share) kv_heads.push_back({{"kept_share", mean(shares)}});
    report.push_back({{"layer", l},
                      {"backend", layer.backend},
                      {"steps", layer.steps},
                      {"sparse_steps", layer.sparse_steps},
                      {"error", error_json(all_of(layer.error))},
                      {"kept_mass", mass_json(all_of(layer.kept_mass))},
                      {"kept_share", mean(all_of(layer.kept_share))},
                      {"heads", std::move(heads)},
                      {"kv_heads", std::move(kv_heads)}});
  }
  return report;
}

void print_layers(const std::vector<LayerFidelity>& layers) {
  fmt::print("attention against dense on the same queries and keys, a query head and step:\n");
  fmt::print("{:<6} {:<11} {:>12} {:>10} {:>10} {:>11} {:>11} {:>8}\n", "layer", "backend", "error p50", "p95", "p99",
             "mass kept", "least", "kept");
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const LayerFidelity& layer = layers[l];
    if (layer.sparse_steps == 0) {
      fmt::print("{:<6} {:<11} {}\n", l, layer.backend,
                 layer.backend == "dense" ? "exact" : "dense throughout: every context was at or under the threshold");
      continue;
    }
    const Values errors = all_of(layer.error);
    const Values masses = all_of(layer.kept_mass);
    fmt::print("{:<6} {:<11} {:>12.3g} {:>10.3g} {:>10.3g} {:>9.3f} % {:>9.3f} % {:>6.2f} %{}\n", l, layer.backend,
               quantile(errors, 0.5), quantile(errors, 0.95), quantile(errors, 0.99), 100.0 * mean(masses),
               100.0 * quantile(masses, 0.0), 100.0 * mean(all_of(layer.kept_share)),
               layer.sparse_steps < layer.steps
                   ? fmt::format("  ({} of {} steps sparse)", layer.sparse_steps, layer.steps)
                   : "");
  }
}

int run_fidelity(const WindowOptions& options) {
  const std::vector<TokenIds> windows = read_windows(options);
  EngineOptions settings = eval_engine_options(options.common);
  const std::string attention = std::exchange(settings.attention, "dense");
  settings.other_attention = {attention};
  Engine engine = load_engine(options.common.model.model, settings);
  ProgressLine line("dense", ProgressUnit::kTokens);
  const std::vector<float> dense =
      decode_logits(engine, windows, options.last, [&](auto done, auto total) { line.update(done, total); });
  line.finish();
  engine.use_attention(1);
  const Fidelity result =
      eval_fidelity(engine, windows, options.last, dense, [&](auto done, auto total) { line.update(done, total); });
  line.finish();
  if (options.common.json) {
    nlohmann::json document = head_of("fidelity", options.common, engine);
    document.update({{"last", options.last},
                     {"windows", windows.size()},
                     {"kl", {{"mean", result.kl_mean}, {"p99", result.kl_p99}, {"max", result.kl_max}}},
                     {"top1_agreement", result.top1_agreement},
                     {"perplexity", {{"dense", result.reference.perplexity()}, {"engine", result.engine.perplexity()}}},
                     {"by_layer", layers_json(result.layers)}});
    fmt::print("{}\n", document.dump(2));
    return 0;
  }
  fmt::print("{} against dense ({})\n", attention, describe(options, windows.size()));
  fmt::print("KL of next tokens: mean {:.3g}, p99 {:.3g}, max {:.3g} nats\n", result.kl_mean, result.kl_p99,
             result.kl_max);
  fmt::print("top-1 agreement: {:.2f} %\n", 100.0 * result.top1_agreement);
  fmt::print("perplexity: {:.3f}, dense {:.3f}\n", result.engine.perplexity(), result.reference.perplexity());
  print_layers(result.layers);
  print_report(engine);
  return 0;
}

}  // namespace

Command make_fidelity(CLI::App& eval) {
  CLI::App* app = eval.add_subcommand(
      "fidelity",
      "How far next-token distributions and each layer's attention are from dense ones, on the same tokens.");
  app->footer(
      "Example:\n"
      "  vesper eval fidelity --model configs/demo --text book.txt --context 4096 \\\n"
      "    --attention quest:token_budget=512");
  auto options = std::make_shared<WindowOptions>();
  add_window_flags(*app, *options);
  return Command{app, [options] { return run_fidelity(*options); }};
}

}  // namespace vesper
