// vesper bench: what a decode step costs, and what sparse attention saves of it.
#include "engine/bench.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "apps/bench_report.h"
#include "apps/options.h"
#include "apps/progress.h"
#include "engine/core/error.h"
#include "engine/core/json.h"
#include "engine/crossover.h"

namespace vesper {
namespace {

constexpr int kMostSeqs = 4096;
constexpr int kLeastKernelContext = 1024;

struct BenchOptions {
  ModelOptions model;
  std::vector<std::string> weights = {"stored"};
  std::string contexts = "1k";
  std::string batches = "1";
  std::vector<std::string> attentions = {"dense"};
  std::string baseline;
  int max_tokens = 32;
  int repeats = 5;
  std::string fill = "prefill";
  std::string sigma = "2";
  double locality = 0.9;
  bool kernels = false;
  std::vector<std::string> families;
  bool stages = false;
  bool crossover = false;
  bool json = false;
  bool csv = false;
  std::string save;
};

bool ends_in(const std::string& path, const std::string& ending) {
  return path.size() > ending.size() && path.ends_with(ending);
}

void check_save_path(const std::string& path) {
  if (path.empty()) return;
  check_output_path(path, "--save");
  if (ends_in(path, ".md") || ends_in(path, ".csv") || ends_in(path, ".json")) return;
  refuse({"reading --save", in_quotes(path), "a name that ends in .md, .csv or .json", ""});
}

int baseline_of(const BenchOptions& options) {
  const auto& all = options.attentions;
  if (options.baseline.empty()) return 0;
  const auto found = std::find(all.begin(), all.end(), options.baseline);
  if (found == all.end()) {
    refuse({"reading --baseline", in_quotes(options.baseline),
            fmt::format("one of --attention: {}", fmt::join(all, ", ")), ""});
  }
  return static_cast<int>(found - all.begin());
}

BenchSetting setting_of(const BenchOptions& options) {
  BenchSetting setting;
  setting.model = options.model.model;
  setting.weights.clear();
  for (const std::string& format : options.weights) setting.weights.push_back(weight_format_of(format));
  setting.contexts = parse_sizes(options.contexts, "--context", kMaxTokens);
  setting.batches = parse_sizes(options.batches, "--batch", kMostSeqs);
  setting.attentions = options.attentions;
  setting.baseline = baseline_of(options);
  setting.max_tokens = options.max_tokens;
  setting.repeats = options.repeats;
  setting.fill = options.fill == "prefill" ? BenchFill::kPrefill : BenchFill::kSynthetic;
  setting.scores = {.sigma = parse_sigma(options.sigma, "--sigma"), .locality = options.locality};
  for (const std::string& attention : setting.attentions) {
    (void)parse_attention(attention, model_config_of(setting.model).layers);
  }
  setting.engine = engine_options(options.model, 1);
  setting.stages = options.stages;
  return setting;
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  if (!file) fail({"writing " + path, "that the file took not all of it", "", "make room, or choose another --save"});
}

// Prints and saves one report in the form asked for.
template <typename Json, typename Csv, typename Markdown>
int write_report(const BenchOptions& options, const Json& as_json, const Csv& as_csv, const Markdown& as_markdown) {
  const auto json_text = [&] { return as_json().dump(2) + '\n'; };
  fmt::print("{}", options.json ? json_text() : options.csv ? as_csv() : as_markdown());
  if (ends_in(options.save, ".json")) write_file(options.save, json_text());
  if (ends_in(options.save, ".csv")) write_file(options.save, as_csv());
  if (ends_in(options.save, ".md")) write_file(options.save, as_markdown());
  return 0;
}

int run_kernels(const BenchOptions& options) {
  const BenchSetting whole = setting_of(options);
  const KernelSetting setting{.model = whole.model,
                              .device = whole.engine.limits.device,
                              .page_tokens = whole.engine.limits.page_tokens,
                              .contexts = whole.contexts,
                              .batches = whole.batches,
                              .scores = whole.scores,
                              .seed = whole.engine.seed,
                              .families = options.families};
  for (const int context : setting.contexts) {
    if (context >= kLeastKernelContext) continue;
    refuse({"reading --context", fmt::format("{} with --kernels", context),
            fmt::format("at least {}: lists need something to leave out", kLeastKernelContext), ""});
  }
  ProgressLine measuring("measuring kernels", ProgressUnit::kSteps);
  const KernelReport report =
      run_kernel_bench(setting, [&](std::int64_t done, std::int64_t total) { measuring.update(done, total); });
  measuring.finish();
  return write_report(
      options, [&] { return kernels_json(setting, report); }, [&] { return kernels_csv(report); },
      [&] { return kernels_markdown(setting, report); });
}

void check_stages(const BenchOptions& options) {
  if (!options.stages || (!options.csv && !ends_in(options.save, ".csv"))) return;
  refuse({"reading --stages", "CSV, a line a row", "Markdown or JSON, which hold stages too", ""});
}

// A flag that the run would not read is no wish to be passed over.
void check_fill_flags(const CLI::App& app, const BenchOptions& options) {
  if (options.kernels || options.fill == "synthetic") return;
  for (const char* flag : {"--sigma", "--locality"}) {
    if (app.count(flag) == 0) continue;
    refuse({fmt::format("reading {}", flag), "--fill prefill, whose keys the model makes", "--fill synthetic",
            fmt::format("add --fill synthetic or leave {} out", flag)});
  }
}

int run(const CLI::App& app, const BenchOptions& options) {
  check_fill_flags(app, options);
  check_save_path(options.save);
  check_stages(options);
  if (options.kernels) return run_kernels(options);
  const BenchSetting setting = setting_of(options);
  ProgressLine loading("loading weights", ProgressUnit::kBytes);
  ProgressLine measuring("measuring", ProgressUnit::kSteps);
  const BenchHooks hooks{.probe = {},
                         .loading = [&](std::int64_t done, std::int64_t total) { loading.update(done, total); },
                         .progress = [&](std::int64_t done, std::int64_t total) { measuring.update(done, total); }};
  if (options.crossover) {
    const CrossoverReport report = find_crossovers(setting, hooks);
    measuring.finish();
    return write_report(
        options, [&] { return crossover_json(setting, report); }, [&] { return crossover_csv(report); },
        [&] { return crossover_markdown(setting, report); });
  }
  const BenchReport report = run_bench(setting, hooks);
  measuring.finish();
  return write_report(
      options, [&] { return bench_json(setting, report); }, [&] { return bench_csv(report); },
      [&] { return bench_markdown(setting, report); });
}

void add_measurement_flags(CLI::App& app, BenchOptions& options) {
  const auto text = [&](const char* flag, std::string& value, const char* what, const char* type) {
    app.add_option(flag, value, what)->check(some_text())->capture_default_str()->type_name(type)->group(kInputFlags);
  };
  text("--context", options.contexts, "Tokens a sequence holds at the last timed step; a list, k is 1024", "LIST");
  text("--batch", options.batches, "Sequences side by side; a list", "LIST");
  app.add_option("--attention", options.attentions,
                 "What the layers attend with, as in generate; several are measured in turns over one cache")
      ->check(some_text())
      ->expected(1, 64)
      ->capture_default_str()
      ->type_name("SPEC...")
      ->group(kInputFlags);
  app.add_option("--weights", options.weights,
                 "What the matrices are held in, as in generate: stored, int4 or int4,head; several are measured one "
                 "after the other")
      ->check(some_text())
      ->expected(1, 3)
      ->capture_default_str()
      ->type_name("FORMAT...")
      ->group(kInputFlags);
  app.add_option("--baseline", options.baseline,
                 "The attention that speed-ups are over, with the same weights, one of --attention; the first of them "
                 "where it is not given")
      ->check(some_text())
      ->type_name("SPEC")
      ->group(kInputFlags);
  app.add_option("--max-tokens", options.max_tokens, "Tokens that a repeat decodes, the last ones of the context")
      ->check(whole_number(1, kMaxTokens))
      ->capture_default_str()
      ->type_name("N")
      ->group(kInputFlags);
  app.add_option("--repeats", options.repeats, "Times that each attention runs; from two on speed-ups have intervals")
      ->check(whole_number(1, 1000))
      ->capture_default_str()
      ->type_name("N")
      ->group(kInputFlags);
  app.add_option("--fill", options.fill,
                 "How the cache gets its depth: prefill runs random ids through the model, synthetic draws keys and "
                 "values")
      ->check(one_of({"prefill", "synthetic"}))
      ->capture_default_str()
      ->type_name("KIND")
      ->group(kInputFlags);
  text(
      "--sigma", options.sigma,
      "Of --fill synthetic: the standard deviation of q.k/sqrt(head_dim) over a sequence's keys, or LEAST:LARGEST over "
      "layers and KV heads",
      "S");
  app.add_option("--locality", options.locality,
                 "Of --fill synthetic: the correlation of the scores of neighbouring keys, runs of 16; at 0 no page "
                 "looks better than another")
      ->check(number(0.0, 1.0))
      ->capture_default_str()
      ->type_name("R")
      ->group(kInputFlags);
}

void add_output_flags(CLI::App& app, BenchOptions& options) {
  auto* kernels =
      app.add_flag("--kernels", options.kernels,
                   "Measure every kernel alone instead of decode steps, at the shapes of --context and --batch")
          ->group(kInputFlags);
  // What describes a step's run says nothing about a kernel alone.
  for (const char* flag : {"--attention", "--weights", "--baseline", "--fill", "--max-tokens", "--repeats"}) {
    kernels->excludes(app.get_option(flag));
  }
  auto* crossover =
      app.add_flag("--crossover", options.crossover,
                   "Find the context from which on each sparse attention's step is faster than the dense one, between "
                   "the two of --context, and print it as a line of configuration (dense_below)")
          ->group(kInputFlags)
          ->excludes(kernels);
  app.add_option("--only", options.families,
                 "Of --kernels: the families to measure; the lists of twilight and vattention bring quest's rows along")
      ->check(one_of({kKernelFamilies.begin(), kKernelFamilies.end()}))
      ->needs(kernels)
      ->type_name("FAMILY...")
      ->group(kInputFlags);
  app.add_flag("--stages", options.stages,
               "Also time every stage of attention by itself, in place in the step, beside what its bytes allow")
      ->group(kInputFlags)
      ->excludes(kernels)
      ->excludes(crossover);
  auto* json = app.add_flag("--json", options.json, "Print one JSON document instead of Markdown")->group(kOutputFlags);
  app.add_flag("--csv", options.csv, "Print CSV, a line a row")->group(kOutputFlags)->excludes(json);
  app.add_option("--save", options.save, "Also write a file: Markdown, CSV or JSON by its ending")
      ->check(some_text())
      ->type_name("FILE")
      ->group(kOutputFlags);
}

}  // namespace

Command make_bench(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "bench",
      "Measure decode: time per token end to end and on the device, bytes by part, share of the read rate probed in "
      "the "
      "same run, attention alone, kept tokens, and sparse attention against dense in turns over one cache.");
  app->footer(
      "Examples:\n"
      "  vesper bench --model synthetic:llama-3.1-8b --context 1k,32k --fill synthetic\n"
      "  vesper bench --model synthetic:llama-3.1-8b --context 32k,128k --batch 1,8 \\\n"
      "    --attention dense quest:token_budget=2048 twilight --fill synthetic --sigma 1:5\n"
      "  vesper bench --model synthetic:llama-3.1-8b --kernels --context 32k --batch 1,8\n"
      "  vesper bench --model synthetic:llama-3.1-8b --context 32k --fill synthetic --stages \\\n"
      "    --attention dense quest twilight vattention\n"
      "  vesper bench --model synthetic:llama-3.1-8b --context 1k,64k --fill synthetic --crossover \\\n"
      "    --attention dense quest twilight vattention\n"
      "  vesper bench --model configs/demo --context 4k --attention dense quest:token_budget=512\n\n"
      "Figures (docs/bench.md tells how each is taken):\n" +
      bench_definitions() +
      "\nA figure over 1.03 x the probed roof, and a speed-up whose device counters say\ndense, end the run with exit "
      "code 1.");
  auto options = std::make_shared<BenchOptions>();
  add_model_flag(*app, options->model.model);
  add_measurement_flags(*app, *options);
  add_output_flags(*app, *options);
  add_hardware_flags(*app, options->model);
  add_prefill_chunk_flag(*app, options->model);
  add_seed_flag(*app, options->model, "Of drawn weights, ids, keys and page tables", kRunFlags);
  return Command{app, [app, options] { return run(*app, *options); }};
}

}  // namespace vesper
