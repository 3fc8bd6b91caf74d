// vesper eval: quality through the decode path, one kind a subcommand.
#include "engine/eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "apps/attention_report.h"
#include "apps/options.h"
#include "apps/progress.h"
#include "apps/prompts.h"
#include "engine/core/error.h"
#include "engine/eval_needle.h"
#include "engine/needle_prompts.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

constexpr int kDefaultQuestions = 8;  // of a text: four of words, four of numbers

// Flags of all kinds.
struct EvalOptions {
  ModelOptions model;
  int context = 0;
  bool json = false;
  std::string text;
  std::string ids;
};

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

// What needs no file is checked first.
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

// Sequences hold --context tokens, where --max-context does not ask for more.
EngineOptions eval_engine_options(const EvalOptions& options) {
  EngineOptions engine = engine_options(options.model, 1);
  if (engine.limits.max_context == 0) engine.limits.max_context = options.context;
  return engine;
}

// What sparse layers read goes to stderr; with --json into the document.
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

// Windows of a text, for ppl and fidelity.
struct WindowOptions {
  EvalOptions common;
  int last = 256;
  WindowCut cut;
};

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
  cut.bos_id = common.ids.empty() ? config.bos_id : -1;
  const std::string& source = common.ids.empty() ? common.text : common.ids;
  const TokenIds ids = common.ids.empty() ? load_tokenizer(common.model.model)->encode(read_text(common.text))
                                          : read_u16_ids(common.ids);
  check_token_ids(config, ids, "reading " + source);
  return cut_windows(ids, cut, source);
}

// What was measured, behind the figures of a line.
std::string describe(const WindowOptions& options, std::size_t windows) {
  return fmt::format("{} window{} of {} tokens, the last {} of each through decode", windows, windows == 1 ? "" : "s",
                     options.common.context, options.last);
}

int run_perplexity(const WindowOptions& options) {
  const std::vector<TokenIds> windows = read_windows(options);
  Engine engine = load_engine(options.common.model.model, eval_engine_options(options.common));
  ProgressLine line("perplexity", ProgressUnit::kTokens);
  const Perplexity result =
      eval_perplexity(engine, windows, options.last, [&](auto done, auto total) { line.update(done, total); });
  line.finish();
  if (options.common.json) {
    nlohmann::json document = head_of("ppl", options.common, engine);
    document.update({{"last", options.last},
                     {"windows", windows.size()},
                     {"perplexity", result.perplexity()},
                     {"nll", result.nll()},
                     {"window_nll", result.window_nll}});
    fmt::print("{}\n", document.dump(2));
    return 0;
  }
  fmt::print("{}: perplexity {:.3f}, nll {:.4f} ({})\n", options.common.model.attention, result.perplexity(),
             result.nll(), describe(options, windows.size()));
  print_report(engine);
  return 0;
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
    document.update(
        {{"last", options.last},
         {"windows", windows.size()},
         {"kl", {{"mean", result.kl_mean}, {"p99", result.kl_p99}, {"max", result.kl_max}}},
         {"top1_agreement", result.top1_agreement},
         {"perplexity", {{"dense", result.reference.perplexity()}, {"engine", result.engine.perplexity()}}}});
    fmt::print("{}\n", document.dump(2));
    return 0;
  }
  fmt::print("{} against dense ({})\n", attention, describe(options, windows.size()));
  fmt::print("KL of next tokens: mean {:.3g}, p99 {:.3g}, max {:.3g} nats\n", result.kl_mean, result.kl_p99,
             result.kl_max);
  fmt::print("top-1 agreement: {:.2f} %\n", 100.0 * result.top1_agreement);
  fmt::print("perplexity: {:.3f}, dense {:.3f}\n", result.engine.perplexity(), result.reference.perplexity());
  print_report(engine);
  return 0;
}

struct NeedleOptions {
  EvalOptions common;
  std::string index;
  int questions = 0;  // 0: all of --ids, kDefaultQuestions of --text
};

void print_score(const NeedleOptions& options, const Engine& engine, const NeedleScore& score, nlohmann::json details) {
  if (options.common.json) {
    nlohmann::json document = head_of("needle", options.common, engine);
    for (const NeedleKind kind : kNeedleKinds) {
      document[std::string(needle_kind_name(kind))] = {{"right", score[kind].right}, {"total", score[kind].total}};
    }
    if (!details.is_null()) document["answers"] = std::move(details);
    fmt::print("{}\n", document.dump(2));
    return;
  }
  std::string line = fmt::format("{} at {} tokens:", options.common.model.attention, options.common.context);
  for (const NeedleKind kind : kNeedleKinds) {
    if (score[kind].total == 0) continue;
    line += fmt::format(" {} {} of {} ({:.1f} %)", needle_kind_name(kind), score[kind].right, score[kind].total,
                        100.0 * score[kind].right / score[kind].total);
  }
  fmt::print("{}\n", line);
  print_report(engine);
}

int run_needle_rows(const NeedleOptions& options) {
  if (options.index.empty()) refuse({"reading needle rows", "--ids without --index", "both", ""});
  std::vector<NeedleRow> rows = read_needle_rows(options.common.ids, options.index, options.common.context);
  const auto wanted = static_cast<std::size_t>((options.questions + kQuestionsARow - 1) / kQuestionsARow);
  if (wanted > 0 && wanted < rows.size()) rows.resize(wanted);
  const ModelConfig config = model_config_of(options.common.model.model);
  for (const NeedleRow& row : rows) check_token_ids(config, row.ids, "reading " + options.common.ids);
  Engine engine = load_engine(options.common.model.model, eval_engine_options(options.common));
  ProgressLine line("needles", ProgressUnit::kTokens);
  const NeedleScore score = eval_needle_rows(engine, rows, [&](auto done, auto total) { line.update(done, total); });
  line.finish();
  print_score(options, engine, score, nullptr);
  return 0;
}

int run_needle_text(const NeedleOptions& options) {
  if (!options.index.empty()) refuse({"reading --index", "--index without --ids", "both, or --text alone", ""});
  const EvalOptions& common = options.common;
  const ModelConfig config = model_config_of(common.model.model);
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(common.model.model);
  const Haystack haystack = make_haystack(*tokenizer, read_text(common.text), common.text);
  const std::vector<NeedlePrompt> prompts =
      make_needle_prompts(*tokenizer, haystack,
                          {.context = common.context,
                           .questions = options.questions == 0 ? kDefaultQuestions : options.questions,
                           .bos_id = config.bos_id,
                           .seed = common.model.seed});
  Engine engine = load_engine(common.model.model, eval_engine_options(common));
  ProgressLine line("needles", ProgressUnit::kTokens);
  const NeedleAnswers result =
      eval_needle_prompts(engine, *tokenizer, prompts, [&](auto done, auto total) { line.update(done, total); });
  line.finish();
  nlohmann::json details = nlohmann::json::array();
  for (const NeedleAnswer& answer : result.answers) {
    details.push_back({{"kind", needle_kind_name(answer.kind)},
                       {"key", answer.question.key},
                       {"value", answer.question.value},
                       {"depth", answer.question.depth},
                       {"answer", answer.answer},
                       {"right", answer.right}});
  }
  print_score(options, engine, result.score, std::move(details));
  return 0;
}

int run_needle(const NeedleOptions& options) {
  check_source(options.common);
  return options.common.ids.empty() ? run_needle_text(options) : run_needle_rows(options);
}

Command make_perplexity(CLI::App& eval) {
  CLI::App* app = eval.add_subcommand("ppl", "Perplexity of the last tokens of windows of a text.");
  app->footer(
      "Examples:\n"
      "  vesper eval ppl --model configs/demo --text book.txt --context 4096 --last 256\n"
      "  vesper eval ppl --model configs/demo --ids ids.u16 --offsets \"0 9000\" --context 4096");
  auto options = std::make_shared<WindowOptions>();
  add_window_flags(*app, *options);
  return Command{app, [options] { return run_perplexity(*options); }};
}

Command make_needle(CLI::App& eval) {
  CLI::App* app = eval.add_subcommand(
      "needle", "Questions about values hidden in a text: teacher-forced with --ids, greedy with --text.");
  app->footer(
      "Examples:\n"
      "  vesper eval needle --model configs/demo --context 4096 --text book.txt\n"
      "  vesper eval needle --model configs/demo --context 4096 \\\n"
      "    --ids configs/demo/questions/ids_4096.u16 \\\n"
      "    --index configs/demo/questions/index.json");
  auto options = std::make_shared<NeedleOptions>();
  add_eval_flags(*app, options->common);
  app->add_option("--index", options->index, "The JSON file that tells kind and answers of each row of --ids")
      ->check(some_text())
      ->type_name("FILE")
      ->group(kInputFlags);
  app->add_option("--questions", options->questions,
                  fmt::format("Questions to ask: {} of a text by default, all of --ids (whole rows of {})",
                              kDefaultQuestions, kQuestionsARow))
      ->check(whole_number(1, 1 << 20))
      ->type_name("Q")
      ->group(kInputFlags);
  return Command{app, [options] { return run_needle(*options); }};
}

Command make_fidelity(CLI::App& eval) {
  CLI::App* app = eval.add_subcommand(
      "fidelity", "How far next-token distributions under --attention are from dense ones, on the same tokens.");
  app->footer(
      "Example:\n"
      "  vesper eval fidelity --model configs/demo --text book.txt --context 4096 \\\n"
      "    --attention quest:token_budget=512");
  auto options = std::make_shared<WindowOptions>();
  add_window_flags(*app, *options);
  return Command{app, [options] { return run_fidelity(*options); }};
}

constexpr std::array kKinds = {&make_perplexity, &make_needle, &make_fidelity};

}  // namespace

Command make_eval(CLI::App& root) {
  CLI::App* app = root.add_subcommand("eval",
                                      "Quality through the decode path: the last tokens of a context are fed one by "
                                      "one, each layer attending with its own backend.");
  app->require_subcommand(1);
  app->footer("`vesper eval KIND --help` tells a kind's flags.");
  std::vector<Command> kinds;
  kinds.reserve(kKinds.size());
  for (const auto make : kKinds) {
    kinds.push_back(make(*app));
  }
  return Command{app, [kinds] {
                   const auto chosen =
                       std::find_if(kinds.begin(), kinds.end(), [](const Command& kind) { return kind.app->parsed(); });
                   return chosen->run();
                 }};
}

}  // namespace vesper
