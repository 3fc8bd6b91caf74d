#include "apps/eval_windows.h"

#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "apps/attention_report.h"
#include "apps/prompts.h"
#include "engine/core/error.h"
#include "tokenizer/tokenizer.h"

namespace vesper {

void add_eval_flags(CLI::App& app, EvalOptions& options) {
  add_model_flag(app, options.model.model);
  auto* text = app.add_option("--text", options.text, "A text file, or - for stdin; the model's tokenizer reads it");
  text->check(some_text())->type_name("FILE")->group(kInputFlags);
  app.add_option("--ids", options.ids,
                 "A file of token ids instead, little-endian 16-bit numbers; no tokenizer is needed")
      ->check(some_text())
      ->type_name("FILE")
      ->group(kInputFlags)
      ->excludes(text);
  app.add_option("--context", options.context, "Tokens of context")
      ->required()
      ->check(whole_number(2, kMaxTokens))
      ->type_name("L")
      ->group(kInputFlags);
  app.add_flag("--json", options.json, "Print one JSON document")->group(kOutputFlags);
  add_engine_flags(app, options.model);
  add_seed_flag(app, options.model, "Of random draws and of synthetic weights", kRunFlags);
}

void check_source(const EvalOptions& options) {
  if (options.text.empty() && options.ids.empty()) {
    refuse({"choosing what to evaluate on", "neither --text nor --ids", "one of them", ""});
  }
  if (options.ids.empty() && is_synthetic(options.model.model)) {
    refuse(
        {"reading --text", "a text for " + options.model.model + ", which has no tokenizer", "token ids", "use --ids"});
  }
  if (options.model.max_context != 0 && options.model.max_context < options.context) {
    refuse({"admitting --context", std::to_string(options.context) + " tokens",
            fmt::format("at most {} (--max-context)", options.model.max_context),
            "lower --context or raise --max-context"});
  }
}

EngineOptions eval_engine_options(const EvalOptions& options) {
  EngineOptions engine = engine_options(options.model, 1);
  if (engine.limits.max_context == 0) engine.limits.max_context = options.context;
  return engine;
}

void print_report(const Engine& engine) {
  for (const std::string& line : attention_report(engine.attention_config(), engine.attention_totals())) {
    fmt::print(stderr, "{}\n", line);
  }
}

nlohmann::json head_of(const char* kind, const EvalOptions& options, const Engine& engine) {
  return {{"kind", kind},
          {"model", options.model.model},
          {"attention", options.model.attention},
          {"context", options.context},
          {"layers", attention_report_json(engine.attention_config(), engine.attention_totals())}};
}

void add_window_flags(CLI::App& app, WindowOptions& options) {
  add_eval_flags(app, options.common);
  app.add_option("--last", options.last, "Tokens of each window that go through decode, one by one, and are scored")
      ->check(whole_number(1, kMaxTokens))
      ->capture_default_str()
      ->type_name("N")
      ->group(kInputFlags);
  auto* windows = app.add_option("--windows", options.cut.windows, "Windows, one after the other from the start");
  windows->check(whole_number(1, 1 << 20))->capture_default_str()->type_name("W")->group(kInputFlags);
  app.add_option("--offsets", options.cut.offsets,
                 "Token numbers at which windows begin, in quotes and separated by spaces, instead of --windows")
      ->delimiter(' ')
      ->allow_extra_args(false)
      ->check(whole_number(0, INT64_MAX))
      ->type_name("NUMBERS")
      ->group(kInputFlags)
      ->excludes(windows);
}

std::vector<TokenIds> read_windows(const WindowOptions& options) {
  const EvalOptions& common = options.common;
  check_source(common);
  if (options.last > common.context) {
    refuse({"reading --last", std::to_string(options.last), fmt::format("at most --context, {}", common.context), ""});
  }
  const ModelConfig config = model_config_of(common.model.model);
  WindowCut cut = options.cut;
  cut.context = common.context;
  const std::string& source = common.ids.empty() ? common.text : common.ids;
  TokenIds ids;
  if (common.ids.empty()) {
    const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(common.model.model);
    cut.bos_id = tokenizer->adds_bos() ? tokenizer->bos_id() : -1;
    ids = tokenizer->encode(read_text(common.text));
  } else {
    ids = read_u16_ids(common.ids);
  }
  check_token_ids(config, ids, "reading " + source);
  return cut_windows(ids, cut, source);
}

std::string describe(const WindowOptions& options, std::size_t windows) {
  return fmt::format("{} window{} of {} tokens, the last {} of each through decode", windows, windows == 1 ? "" : "s",
                     options.common.context, options.last);
}

}  // namespace vesper
