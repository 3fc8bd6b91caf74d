// vesper eval guarantee: how often vattention's denominators and outputs are further off than epsilon.
#include "engine/eval_guarantee.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "apps/attention_report.h"
#include "apps/eval_windows.h"
#include "apps/progress.h"

namespace vesper {
namespace {

constexpr double kConfidence = 0.95;

struct GuaranteeFlags {
  WindowOptions windows;
  int seeds = 1000;
};

// How often one quantity missed epsilon, and the most that its rate may be.
struct Rate {
  std::int64_t trials = 0;
  std::int64_t misses = 0;
  [[nodiscard]] double value() const {
    return trials == 0 ? 0.0 : static_cast<double>(misses) / static_cast<double>(trials);
  }
  [[nodiscard]] double bound() const { return clopper_pearson_upper(misses, trials, kConfidence); }
};

enum class Quantity : std::uint8_t { kDenominator, kOutput };
constexpr std::array kQuantities = {Quantity::kDenominator, Quantity::kOutput};

const char* name_of(Quantity quantity) {
  return quantity == Quantity::kDenominator ? "denominator" : "output";
}

Rate rate_of(const Misses& misses, Quantity quantity) {
  return {misses.trials, quantity == Quantity::kDenominator ? misses.denominator : misses.output};
}

// Every head together.
HeadTrials pooled(const GuaranteeTrials& trials) {
  HeadTrials all;
  for (const HeadTrials& head : trials.heads) all.add(head);
  return all;
}

// The decimal number that a setting was written as.
double decimal(float value) {
  return std::stod(fmt::format("{}", value));
}

double share(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
}

// The layer and head with the largest rate.
struct Worst {
  int layer = -1;
  std::size_t head = 0;
  Rate rate;
};
Worst worst_of(std::span<const GuaranteeLayer> layers, Quantity quantity) {
  Worst worst;
  for (const GuaranteeLayer& layer : layers) {
    const std::vector<HeadTrials>& heads = layer.configured().heads;
    for (std::size_t h = 0; h < heads.size(); ++h) {
      const Rate rate = rate_of(heads[h].all, quantity);
      if (rate.trials > 0 && (worst.layer < 0 || rate.value() > worst.rate.value())) worst = {layer.number, h, rate};
    }
  }
  return worst;
}

// Neighbouring layers of one setting, which share a promise.
struct Run {
  std::span<const GuaranteeLayer> layers;
  GuaranteeTrials report;
  GuaranteeTrials escalate;

  [[nodiscard]] const VAttentionConfig& config() const { return layers.front().config; }
  [[nodiscard]] const GuaranteeTrials& configured() const {
    return config().on_outlier == OnOutlier::kReport ? report : escalate;
  }
  [[nodiscard]] bool promises(Quantity quantity) const {
    return quantity == Quantity::kDenominator || config().verify == Verify::kOutput;
  }
  [[nodiscard]] std::string range() const { return layer_range(layers.front().number, layers.back().number); }
};

std::vector<Run> runs_of(std::span<const GuaranteeLayer> layers) {
  std::vector<Run> runs;
  for (std::size_t first = 0; first < layers.size();) {
    std::size_t end = first + 1;
    while (end < layers.size() && layers[end].config == layers[first].config &&
           layers[end].number == layers[end - 1].number + 1) {
      ++end;
    }
    Run& run = runs.emplace_back();
    run.layers = layers.subspan(first, end - first);
    for (const GuaranteeLayer& layer : run.layers) {
      run.report.add(layer.report);
      run.escalate.add(layer.escalate);
    }
    first = end;
  }
  return runs;
}

nlohmann::json rate_json(const Rate& rate, double delta) {
  return {{"trials", rate.trials},
          {"misses", rate.misses},
          {"rate", rate.value()},
          {"bound", rate.bound()},
          {"holds", rate.bound() <= delta}};
}

nlohmann::json quantity_json(const HeadTrials& trials, Quantity quantity, double delta) {
  return {{"all", rate_json(rate_of(trials.all, quantity), delta)},
          {"sampled", rate_json(rate_of(trials.sampled, quantity), delta)}};
}

nlohmann::json trials_json(const GuaranteeTrials& trials, double delta) {
  const HeadTrials all = pooled(trials);
  return {
      {"denominator", quantity_json(all, Quantity::kDenominator, delta)},
      {"output", quantity_json(all, Quantity::kOutput, delta)},
      {"bias", {{"mean", trials.bias.mean()}, {"standard_error", trials.bias.standard_error()}}},
      {"deviate",
       {{"trials", trials.deviate.count()}, {"mean", trials.deviate.mean()}, {"variance", trials.deviate.variance()}}},
      {"sample_share",
       {{"median", quantile(trials.sample_shares, 0.5)}, {"p99", quantile(trials.sample_shares, 0.99)}}},
      {"lists", trials.lists},
      {"whole_lists", trials.whole_lists},
      {"short_lists", trials.short_lists},
      {"guard_hits", trials.guard_hits},
      {"kept_share", share(trials.kept_tokens, trials.visible_tokens)},
      {"instances",
       {{"sampled", trials.instances},
        {"denominator_over_delta", trials.instances_denominator},
        {"output_over_delta", trials.instances_output}}}};
}

nlohmann::json run_json(const Run& run) {
  const double delta = decimal(run.config().delta);
  nlohmann::json by_layer = nlohmann::json::array();
  for (const GuaranteeLayer& layer : run.layers) {
    nlohmann::json entry = trials_json(layer.configured(), delta);
    entry["layer"] = layer.number;
    for (const HeadTrials& head : layer.configured().heads) {
      entry["heads"].push_back({{"denominator", quantity_json(head, Quantity::kDenominator, delta)},
                                {"output", quantity_json(head, Quantity::kOutput, delta)}});
    }
    by_layer.push_back(std::move(entry));
  }
  nlohmann::json document = {{"layers", run.range()},
                             {"backend", describe(BackendConfig{run.config()})},
                             {"epsilon", decimal(run.config().epsilon)},
                             {"delta", decimal(run.config().delta)},
                             {"report", trials_json(run.report, delta)},
                             {"escalate", trials_json(run.escalate, delta)},
                             {"by_layer", std::move(by_layer)}};
  for (const Quantity quantity : kQuantities) {
    document["promised"][name_of(quantity)] = run.promises(quantity);
    const Worst worst = worst_of(run.layers, quantity);
    document["worst"][name_of(quantity)] = {
        {"layer", worst.layer}, {"head", worst.head}, {"rate", worst.rate.value()}, {"bound", worst.rate.bound()}};
  }
  return document;
}

void print_verdict(const Run& run, Quantity quantity, const char* which, const Rate& rate) {
  const double delta = decimal(run.config().delta);
  if (rate.trials == 0) {
    fmt::print("  {:<11} {:<7} no trials\n", name_of(quantity), which);
    return;
  }
  const double bound = rate.bound();
  fmt::print("  {:<11} {:<7} {:>9} trials, {:>8} misses: {:.5f}, at most {:.5f}: {} at delta {}{}\n", name_of(quantity),
             which, rate.trials, rate.misses, rate.value(), bound, bound <= delta ? "holds" : "does not hold",
             run.config().delta, run.promises(quantity) ? "" : ", nor is it promised");
}

void print_layers(const Run& run) {
  fmt::print("  {:<6} {:^29} {:^29} {:>9} {:>8} {:>8} {:>9}\n", "layer", "denominator: missed, at most",
             "output: missed, at most", "bias", "sample", "p99", "whole");
  for (const GuaranteeLayer& layer : run.layers) {
    const GuaranteeTrials& trials = layer.configured();
    const HeadTrials heads = pooled(trials);
    fmt::print("  {:<6}", layer.number);
    for (const Quantity quantity : kQuantities) {
      const Rate rate = rate_of(heads.all, quantity);
      fmt::print(" {:>14.5f} {:>14.5f}", rate.value(), rate.bound());
    }
    fmt::print(" {:>9.4f} {:>8.4f} {:>8.4f} {:>7.2f} %\n", trials.bias.mean(), quantile(trials.sample_shares, 0.5),
               quantile(trials.sample_shares, 0.99), 100.0 * share(trials.whole_lists, trials.lists));
  }
}

void print_run(const Run& run) {
  const GuaranteeTrials& trials = run.configured();
  const HeadTrials heads = pooled(trials);
  fmt::print("layers {} {}\n", run.range(), describe(BackendConfig{run.config()}));
  for (const Quantity quantity : kQuantities) {
    print_verdict(run, quantity, "all", rate_of(heads.all, quantity));
    print_verdict(run, quantity, "sampled", rate_of(heads.sampled, quantity));
  }
  for (const Quantity quantity : kQuantities) {
    const Worst worst = worst_of(run.layers, quantity);
    fmt::print("  worst {}: layer {} head {}, {:.5f}, at most {:.5f}\n", name_of(quantity), worst.layer, worst.head,
               worst.rate.value(), worst.rate.bound());
  }
  fmt::print("  steps and heads whose own rate is over delta: denominator {} of {}, output {} of {}\n",
             trials.instances_denominator, trials.instances, trials.instances_output, trials.instances);
  fmt::print("  bias of the denominator: {:+.4f} epsilon, standard error {:.4f}\n", trials.bias.mean(),
             trials.bias.standard_error());
  fmt::print("  its standardised error: mean {:+.3f}, variance {:.3f} over {} trials\n", trials.deviate.mean(),
             trials.deviate.variance(), trials.deviate.count());
  fmt::print("  sample: median {:.4f} of the rest, p99 {:.4f}; of {} lists {} held all of it, {} were too short\n",
             quantile(trials.sample_shares, 0.5), quantile(trials.sample_shares, 0.99), trials.lists,
             trials.whole_lists, trials.short_lists);
  const double escalated = share(run.escalate.kept_tokens, run.escalate.visible_tokens);
  const double reported = share(run.report.kept_tokens, run.report.visible_tokens);
  fmt::print("  kept: {:.2f} % with escalate, {:.2f} % with report; {} guard hits\n", 100.0 * escalated,
             100.0 * reported, trials.guard_hits);
  print_layers(run);
}

int run_guarantee(const GuaranteeFlags& flags) {
  const WindowOptions& options = flags.windows;
  const std::string& attention = options.common.model.attention;
  const int layers = model_config_of(options.common.model.model).layers;
  check_guarantee(parse_attention(attention, layers), attention);
  const std::vector<TokenIds> windows = read_windows(options);
  Engine engine = load_engine(options.common.model.model, eval_engine_options(options.common));
  ProgressLine line("guarantee", ProgressUnit::kSamples);
  const std::vector<GuaranteeLayer> result =
      eval_guarantee(engine, windows, {.last = options.last, .seeds = flags.seeds},
                     [&](auto done, auto total) { line.update(done, total); });
  line.finish();
  const std::vector<Run> runs = runs_of(result);
  if (options.common.json) {
    nlohmann::json document = head_of("guarantee", options.common, engine);
    document.update({{"last", options.last}, {"windows", windows.size()}, {"seeds", flags.seeds}});
    for (const Run& run : runs) document["runs"].push_back(run_json(run));
    fmt::print("{}\n", document.dump(2));
    return 0;
  }
  fmt::print("{} ({}, {} samples of each step)\n", attention, describe(options, windows.size()), flags.seeds);
  for (const Run& run : runs) print_run(run);
  return 0;
}

}  // namespace

Command make_guarantee(CLI::App& eval) {
  CLI::App* app = eval.add_subcommand(
      "guarantee",
      "How often vattention is further off than epsilon, over fresh samples of a model's own decode steps.");
  app->footer(
      "Example:\n"
      "  vesper eval guarantee --model configs/demo --text book.txt --context 4096 \\\n"
      "    --attention vattention:epsilon=0.1,delta=0.1,top_k_by=oracle");
  auto flags = std::make_shared<GuaranteeFlags>();
  flags->windows.last = 4;
  add_window_flags(*app, flags->windows);
  app->add_option("--seeds", flags->seeds, "Samples of each step, layer and KV head")
      ->check(whole_number(1, 1 << 20))
      ->capture_default_str()
      ->type_name("T")
      ->group(kInputFlags);
  return Command{app, [flags] { return run_guarantee(*flags); }};
}

}  // namespace vesper
