// vesper chat: a conversation in the model's own format, turn by turn, over one cache.
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "apps/answer_report.h"
#include "apps/attention_report.h"
#include "apps/interrupts.h"
#include "apps/options.h"
#include "apps/progress.h"
#include "apps/prompts.h"
#include "apps/sampling_flags.h"
#include "apps/turn_reader.h"
#include "engine/core/error.h"
#include "engine/generate.h"
#include "tokenizer/chat_tokens.h"

namespace vesper {
namespace {

constexpr const char* kHelp =
    "/reset  forget the conversation (the system's turn stays)\n"
    "/exit   end, as Ctrl-D and Ctrl-C at the prompt do\n"
    "/help   this text\n"
    "Ctrl-C during an answer ends the answer.\n";

struct ChatOptions {
  ModelOptions model;
  std::string system;
  int max_tokens = 1024;
  SamplingParams sampling;
  bool json = false;
};

class Conversation {
 public:
  Conversation(const ChatOptions& options, Engine& engine, const Tokenizer& tokenizer, const ChatTokens& chat,
               Interrupts& interrupts)
      : options_(options), engine_(engine), tokenizer_(tokenizer), chat_(chat), interrupts_(interrupts) {
    reset();
  }

  void reset() {
    messages_.clear();
    if (!options_.system.empty()) messages_.push_back({"system", options_.system});
  }

  // Asks and prints the answer. What cannot be asked is said, and the conversation stays as it was.
  void ask(const std::string& question) {
    ++turn_;
    if (const std::int64_t at = find_invalid_utf8(question); at >= 0) {
      return decline(fmt::format("the turn: found no valid UTF-8 at byte offset {}, expected UTF-8 text", at));
    }
    messages_.push_back({"user", question});
    GenerateRequest request;
    request.prompt = chat_.encode(messages_);
    const int max_context = engine_.memory().limits.max_context;
    const int room = max_context - static_cast<int>(request.prompt.size());
    if (room < 1) {
      messages_.pop_back();
      return decline(fmt::format(
          "the context is full: found {} with this turn, expected fewer than {} (--max-context); /reset begins anew",
          count_of(request.prompt.size()), max_context));
    }
    request.max_tokens = std::min(options_.max_tokens, room);
    request.sampling = options_.sampling;
    request.sampling.seed = options_.model.seed;
    request.sampling.request = turn_;  // so that turns draw apart
    request.end_ids = chat_.end_ids();
    request.kept = &kept_;
    answer(request);
  }

 private:
  void answer(const GenerateRequest& request) {
    ProgressLine prefilling("prefill", ProgressUnit::kTokens);
    GenerateHooks hooks;
    hooks.interrupted = [this] { return interrupts_.pending(); };
    hooks.on_prefill = [&](int /*request*/, int done, int total) {
      prefilling.update(done, total);
      if (done == total) prefilling.finish();
    };
    if (!options_.json) {
      hooks.on_text = [](int /*request*/, std::string_view text) {
        fmt::print("{}", text);
        std::fflush(stdout);
      };
    }
    engine_.reset_attention_totals();
    const GenerateResult result = generate(engine_, &tokenizer_, {&request, 1}, hooks)[0];
    prefilling.finish();
    interrupts_.clear();
    if (result.ids.empty()) {
      messages_.pop_back();  // interrupted before the answer began
    } else {
      messages_.push_back({"assistant", result.text});
    }
    report(result);
    const bool filled = result.finish == FinishReason::kLength && request.max_tokens < options_.max_tokens;
    if (filled) fmt::print(stderr, "the context is full: the answer ends here; /reset begins anew\n");
  }

  void report(const GenerateResult& result) const {
    const std::vector<AttentionTotals> totals = engine_.attention_totals();
    if (options_.json) {
      nlohmann::json line = to_json(result, engine_.peak_memory_bytes());
      line["turn"] = turn_;
      line["reused_tokens"] = result.reused_tokens;
      line["prefilled_tokens"] = result.prefill_tokens;
      line["attention"] = attention_report_json(engine_.attention_config(), totals);
      fmt::print("{}\n", line.dump());
    } else {
      fmt::print("\n");
    }
    std::fflush(stdout);
    const Timings timings = timings_of(result);
    fmt::print(stderr, "turn {} | {}, {} of them from the cache", turn_,
               count_of(static_cast<std::size_t>(result.prompt_tokens)), result.reused_tokens);
    if (!result.ids.empty()) fmt::print(stderr, " | TTFT {:.1f} ms", timings.ttft_ms);
    fmt::print(stderr, " | {} ({})", count_of(result.ids.size()), finish_reason_name(result.finish));
    if (!result.token_seconds.empty()) fmt::print(stderr, " | TPOT {:.2f} ms", timings.tpot_mean_ms);
    fmt::print(stderr, "\n");
    for (const std::string& line : attention_report(engine_.attention_config(), totals)) {
      fmt::print(stderr, "{}\n", line);
    }
  }

  void decline(const std::string& sentence) const {
    fmt::print(stderr, "{}\n", sentence);
    if (!options_.json) return;
    fmt::print("{}\n", nlohmann::json{{"turn", turn_}, {"error", sentence}}.dump());
    std::fflush(stdout);
  }

  const ChatOptions& options_;
  Engine& engine_;
  const Tokenizer& tokenizer_;
  const ChatTokens& chat_;
  Interrupts& interrupts_;
  std::vector<ChatMessage> messages_;
  KeptContext kept_;
  std::uint32_t turn_ = 0;
};

// "/word": a command, known or not. A path or a longer text that begins with a slash is a turn.
bool is_command(const std::string& line) {
  return line.size() > 1 && line[0] == '/' &&
         std::all_of(line.begin() + 1, line.end(), [](char c) { return c >= 'a' && c <= 'z'; });
}

void converse(Conversation& conversation, Interrupts& interrupts) {
  const bool on_terminal = isatty(STDIN_FILENO) != 0;
  TurnReader reader(interrupts);
  if (on_terminal) fmt::print(stderr, "{}", kHelp);
  while (true) {
    if (on_terminal) fmt::print(stderr, "> ");
    const std::optional<std::string> line = reader.next();
    if (!line) {
      if (on_terminal) fmt::print(stderr, "\n");
      return;
    }
    if (line->find_first_not_of(" \t") == std::string::npos) continue;
    if (!is_command(*line)) {
      conversation.ask(*line);
    } else if (*line == "/exit") {
      return;
    } else if (*line == "/reset") {
      conversation.reset();
    } else if (*line == "/help") {
      fmt::print(stderr, "{}", kHelp);
    } else {
      fmt::print(stderr, "found the command {}, expected /reset, /exit or /help\n", *line);
    }
  }
}

int run_chat(const CLI::App& app, ChatOptions options) {
  // What needs no weights is checked before they are loaded.
  if (is_synthetic(options.model.model)) {
    refuse({"opening a chat with " + options.model.model, "a model without a tokenizer", "a model's folder", ""});
  }
  check_utf8(options.system, "--system");
  const ModelConfig config = model_config_of(options.model.model);
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(options.model.model);
  const ChatTokens chat(load_chat_template(options.model.model), *tokenizer, today());
  if (!options.system.empty()) {
    const std::vector<ChatMessage> begun = {{"system", options.system}, {"user", "question"}};
    (void)chat.encode(begun);  // some templates have no system's turn
  }
  apply_generation_config(app, options.model.model, config, options.sampling);

  Engine engine = load_engine(options.model.model, engine_options(options.model, /*max_seqs=*/1));
  Interrupts interrupts;
  Conversation conversation(options, engine, *tokenizer, chat, interrupts);
  converse(conversation, interrupts);
  return 0;
}

}  // namespace

Command make_chat(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "chat",
      "Talk with an instruct model in its own format, a line a turn: answers stream to stdout, everything else goes to "
      "stderr. The cache is kept between turns, and only what is new is prefilled.");
  app->footer(
      fmt::format("Lines that are commands:\n{}\n"
                  "Examples:\n"
                  "  vesper chat --model DIR --system \"You are brief.\"\n"
                  "  printf 'Hello\\nAnd now?\\n' | vesper chat --model DIR --json",
                  kHelp));
  auto options = std::make_shared<ChatOptions>();
  add_model_flag(*app, options->model.model);
  app->add_option("--system", options->system, "The system's turn, before the first one")
      ->check(some_text())
      ->type_name("TEXT")
      ->group(kAnswerFlags);
  app->add_option("--max-tokens", options->max_tokens, "Tokens an answer may have at most")
      ->check(whole_number(1, kMaxTokens))
      ->capture_default_str()
      ->type_name("N")
      ->group(kAnswerFlags);
  add_sampling_flags(*app, options->sampling);
  add_seed_flag(*app, options->model, "Of the draws", kAnswerFlags);
  app->add_flag("--json", options->json, "Print one JSON line a turn: text, ids and figures")->group(kAnswerFlags);
  add_engine_flags(*app, options->model);
  return Command{app, [app, options] { return run_chat(*app, *options); }};
}

}  // namespace vesper
