// vesper compare: one prompt, one prefill, several attentions side by side.
#include "engine/compare.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <nlohmann/json.hpp>

#include "apps/attention_report.h"
#include "apps/options.h"
#include "apps/progress.h"
#include "apps/prompts.h"

namespace vesper {
namespace {

struct CompareOptions {
  ModelOptions model;
  std::vector<std::string> others;
  PromptSources sources;
  int decode_last = 32;
  int max_tokens = 32;
  std::vector<std::string> stop;
  bool json = false;
};

// Over all layers that are not dense: what lists kept, and all bytes against dense.
struct Summary {
  double kept_share = 1.0;
  std::int64_t read_bytes = 0;
  std::int64_t dense_bytes = 0;
};

Summary summary_of(const std::vector<AttentionTotals>& totals) {
  Summary summary;
  std::int64_t kept = 0;
  std::int64_t visible = 0;
  for (const AttentionTotals& layer : totals) {
    kept += layer.kept_tokens;
    visible += layer.visible_tokens;
    summary.read_bytes += layer.kv_bytes + layer.metadata_bytes;
    summary.dense_bytes += layer.dense_bytes;
  }
  if (visible > 0) summary.kept_share = static_cast<double>(kept) / static_cast<double>(visible);
  return summary;
}

// On one line, whatever it holds.
std::string one_line(std::string text) {
  for (char& c : text) {
    if (c == '\n' || c == '\t' || c == '\r') c = ' ';
  }
  const std::size_t first = text.find_first_not_of(' ');
  return first == std::string::npos ? "" : text.substr(first);
}

int run_compare(const CLI::App& app, CompareOptions options) {
  options.sources.has_prompt = app.count("--prompt") > 0;
  const std::string model = options.model.model;
  (void)model_config_of(model);  // a folder that holds no model is told before its tokenizer is
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(model);
  CompareRequest request;
  request.prompt = tokenizer->encode_prompt(read_prompts(options.sources).at(0));
  request.decode_last = options.decode_last;
  request.max_tokens = options.max_tokens;
  request.stop = options.stop;

  EngineOptions settings = engine_options(options.model, 1);
  settings.other_attention = options.others;
  Engine engine = load_engine(model, settings);
  ProgressLine progress("prefill", ProgressUnit::kTokens);
  const int arms = static_cast<int>(options.others.size()) + 1;
  const std::vector<CompareResult> results =
      compare_attention(engine, arms, *tokenizer, request, [&](int done, int total) { progress.update(done, total); });
  progress.finish();

  nlohmann::json document = nlohmann::json::array();
  for (int arm = 0; arm < arms; ++arm) {
    const CompareResult& result = results[static_cast<std::size_t>(arm)];
    const std::string& name = arm == 0 ? options.model.attention : options.others[static_cast<std::size_t>(arm) - 1];
    const Summary summary = summary_of(result.totals);
    if (options.json) {
      engine.use_attention(arm);
      document.push_back({{"attention", name},
                          {"text", result.text},
                          {"ids", result.ids},
                          {"kept_share", summary.kept_share},
                          {"read_bytes", summary.read_bytes},
                          {"dense_bytes", summary.dense_bytes},
                          {"step_ms", result.step_seconds * 1e3},
                          {"layers", attention_report_json(engine.attention_config(), result.totals)}});
      continue;
    }
    if (arm == 0) {
      fmt::print("{:<44} {:>7} {:>16} {:>9}  {}\n", "attention", "kept", "KV bytes read", "step ms", "answer");
    }
    fmt::print("{:<44} {:>6.1f}% {:>9} {:>5.0f}% {:>9.2f}  {}\n", name, 100.0 * summary.kept_share,
               format_bytes(summary.read_bytes),
               100.0 * static_cast<double>(summary.read_bytes) / static_cast<double>(summary.dense_bytes),
               result.step_seconds * 1e3, one_line(result.text));
  }
  if (options.json) fmt::print("{}\n", document.dump(2));
  return 0;
}

}  // namespace

Command make_compare(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "compare",
      "One prompt, one prefill, several attentions: the greedy answer of each from the same cache, the share of tokens "
      "that its sparse layers kept, the KV bytes that all layers read against dense, and the median step.");
  app->footer(
      "Example:\n"
      "  vesper compare --model configs/demo --prompt-file configs/demo/needle-4k.txt --with quest:token_budget=256 "
      "\\\n"
      "    --with twilight --with vattention:epsilon=0.1,delta=0.1");
  auto options = std::make_shared<CompareOptions>();
  add_model_flag(*app, options->model.model);
  auto* prompt =
      app->add_option("--prompt", options->sources.prompt, "The prompt")->type_name("TEXT")->group(kPromptFlags);
  app->add_option("--prompt-file", options->sources.prompt_file, "A file that holds it; without either, stdin is read")
      ->check(some_text())
      ->type_name("FILE")
      ->group(kPromptFlags)
      ->excludes(prompt);
  app->add_option("--with", options->others, "A further attention, as --attention; may be given several times")
      ->check(some_text())
      ->allow_extra_args(false)
      ->type_name("FILE|SPEC")
      ->group(kRunFlags);
  app->add_option("--max-tokens", options->max_tokens, "Tokens to generate at most, under each attention")
      ->check(whole_number(1, kMaxTokens))
      ->capture_default_str()
      ->type_name("N")
      ->group(kAnswerFlags);
  app->add_option("--stop", options->stop, "End before this text; may be given several times")
      ->check(some_text())
      ->allow_extra_args(false)
      ->type_name("TEXT")
      ->group(kAnswerFlags);
  app->add_option("--decode-last", options->decode_last,
                  "The prompt's last N tokens go through decode, under each attention; the others are prefilled once")
      ->check(whole_number(1, kMaxTokens))
      ->capture_default_str()
      ->type_name("N")
      ->group(kRunFlags);
  app->add_flag("--json", options->json, "Print one JSON document")->group(kAnswerFlags);
  add_engine_flags(*app, options->model);
  return Command{app, [app, options] { return run_compare(*app, *options); }};
}

}  // namespace vesper
