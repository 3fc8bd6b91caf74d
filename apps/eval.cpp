// vesper eval: quality through the decode path, one kind a subcommand.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <nlohmann/json.hpp>

#include "apps/eval_windows.h"
#include "apps/progress.h"
#include "apps/prompts.h"
#include "engine/core/error.h"
#include "engine/eval.h"
#include "engine/eval_needle.h"
#include "engine/needle_prompts.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

constexpr int kDefaultQuestions = 8;  // of a text: four of words, four of numbers

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
  if (wanted > rows.size()) {
    refuse({"reading --questions", std::to_string(options.questions),
            fmt::format("at most {}, {} for each of the {} rows of --ids", rows.size() * kQuestionsARow, kQuestionsARow,
                        rows.size()),
            ""});
  }
  if (wanted > 0) rows.resize(wanted);
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
  (void)model_config_of(common.model.model);  // a folder that holds no model is told before its tokenizer is
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(common.model.model);
  const Haystack haystack = make_haystack(*tokenizer, read_text(common.text), common.text);
  const std::vector<NeedlePrompt> prompts =
      make_needle_prompts(*tokenizer, haystack,
                          {.context = common.context,
                           .questions = options.questions == 0 ? kDefaultQuestions : options.questions,
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

constexpr std::array kKinds = {&make_perplexity, &make_needle, &make_fidelity, &make_guarantee};

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
