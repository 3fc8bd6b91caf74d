// vesper generate: stream text for one or many prompts.
#include "engine/generate.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "apps/answer_report.h"
#include "apps/attention_report.h"
#include "apps/options.h"
#include "apps/progress.h"
#include "apps/prompts.h"
#include "apps/sampling_flags.h"
#include "engine/core/error.h"
#include "tokenizer/chat_tokens.h"

namespace vesper {
namespace {

struct GenerateOptions {
  ModelOptions model;
  PromptSources sources;
  bool has_ids = false;  // --ids was given
  std::string ids;       // a prompt of token ids
  int random_ids = 0;    // a prompt of this many random ids
  int max_tokens = 128;
  int decode_last = 0;
  SamplingParams sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool chat = false;   // the prompt is a user's turn
  std::string system;  // with chat: the system's turn before it; empty: none
  bool json = false;

  // Also of one prompt: what a script reads must not depend on the file's length.
  [[nodiscard]] bool is_batch() const { return !sources.prompts_jsonl.empty(); }
};

// Set by Ctrl-C; a second one ends the program at once.
volatile std::sig_atomic_t interrupt_count = 0;

void on_interrupt(int /*signal*/) {
  interrupt_count = interrupt_count + 1;
  (void)std::signal(SIGINT, SIG_DFL);
}

void print_statistics(const GenerateResult& result, std::int64_t peak_memory_bytes) {
  const Timings timings = timings_of(result);
  fmt::print(stderr, "prompt {}", count_of(static_cast<std::size_t>(result.prompt_tokens)));
  if (!result.ids.empty()) fmt::print(stderr, " | TTFT {:.1f} ms", timings.ttft_ms);
  if (result.prefill_seconds > 0) fmt::print(stderr, " | prefill {:.0f} tokens/s", timings.prefill_tokens_per_s);
  fmt::print(stderr, "\n{} ({})", count_of(result.ids.size()), finish_reason_name(result.finish));
  if (!result.token_seconds.empty()) {
    fmt::print(stderr, " | TPOT {:.2f} ms (p50 {:.2f}, p99 {:.2f}) | {} read a token, {:.1f} GB/s",
               timings.tpot_mean_ms, timings.tpot_p50_ms, timings.tpot_p99_ms,
               format_bytes(static_cast<std::int64_t>(timings.bytes_per_token)), timings.gbytes_per_s);
  }
  fmt::print(stderr, " | peak memory {}\n", format_bytes(peak_memory_bytes));
}

// For a batch whose JSON lines hold each prompt's own figures.
void print_batch_statistics(const std::vector<GenerateResult>& results, double seconds,
                            std::int64_t peak_memory_bytes) {
  std::size_t tokens = 0;
  for (const GenerateResult& result : results) tokens += result.ids.size();
  fmt::print(stderr, "{} | {} in {:.2f} s, {:.1f} tokens/s | peak memory {}\n", count_of(results.size(), "prompt"),
             count_of(tokens), seconds, static_cast<double>(tokens) / seconds, format_bytes(peak_memory_bytes));
}

// The prompt as a user's turn, up to where the answer begins.
std::vector<std::int32_t> encode_turn(const ChatTokens& chat, const std::string& system, const std::string& prompt) {
  std::vector<ChatMessage> messages;
  if (!system.empty()) messages.push_back({"system", system});
  messages.push_back({"user", prompt});
  return chat.encode(messages);
}

// The prompts as token ids: text through the template, where there is one, or through the tokenizer, with BOS where it
// adds one; ids as they are.
std::vector<std::vector<std::int32_t>> encode_prompts(const GenerateOptions& options, const ModelConfig& config,
                                                      const Tokenizer* tokenizer,
                                                      const std::optional<ChatTokens>& chat) {
  if (options.random_ids > 0) return {random_ids(options.random_ids, options.model.seed, config.vocab)};
  if (options.has_ids) {
    std::vector<std::int32_t> ids = parse_ids(options.ids, "--ids");
    if (ids.empty()) refuse({"reading --ids", "nothing", "at least one token id", ""});
    return {ids};
  }
  std::vector<std::vector<std::int32_t>> prompts;
  for (const std::string& text : read_prompts(options.sources)) {
    if (chat) {
      prompts.push_back(encode_turn(*chat, options.system, text));
      continue;
    }
    std::vector<std::int32_t> ids = tokenizer->encode_prompt(text);
    // Some tokenizers add no BOS to texts; an empty one has nothing else to start from.
    const int bos_id = tokenizer->bos_id() >= 0 ? tokenizer->bos_id() : config.bos_id;
    if (ids.empty() && bos_id >= 0) ids.push_back(bos_id);
    if (ids.empty()) {
      refuse({"encoding the prompt", "nothing, and the model has no BOS token to start from", "some text", ""});
    }
    prompts.push_back(std::move(ids));
  }
  return prompts;
}

std::vector<GenerateRequest> make_requests(const GenerateOptions& options,
                                           std::vector<std::vector<std::int32_t>> prompts) {
  std::vector<GenerateRequest> requests;
  for (std::vector<std::int32_t>& prompt : prompts) {
    GenerateRequest request;
    request.prompt = std::move(prompt);
    request.max_tokens = options.max_tokens;
    request.sampling = options.sampling;
    request.sampling.seed = options.model.seed;
    request.sampling.request = static_cast<std::uint32_t>(requests.size());
    request.stop = options.stop;
    request.ignore_eos = options.ignore_eos;
    request.decode_last = options.decode_last;
    requests.push_back(std::move(request));
  }
  return requests;
}

// Tells the three ways of printing apart: one prompt streams text, those of --prompts-jsonl print a JSON line each as
// they finish, --json prints one document at the end.
GenerateHooks make_hooks(const GenerateOptions& options, const Engine& engine, ProgressLine& progress) {
  GenerateHooks hooks;
  hooks.interrupted = [] { return interrupt_count > 0; };
  hooks.on_prefill = [&progress](int /*request*/, int done, int total) {
    progress.update(done, total);
    if (done == total) progress.finish();
  };
  if (options.json) return hooks;
  if (!options.is_batch()) {
    hooks.on_text = [](int /*request*/, std::string_view text) {
      fmt::print("{}", text);
      std::fflush(stdout);
    };
  } else {
    hooks.on_finish = [&engine](int request, const GenerateResult& result) {
      nlohmann::json line = to_json(result, engine.peak_memory_bytes());
      line["prompt"] = request;
      fmt::print("{}\n", line.dump());
      std::fflush(stdout);
    };
  }
  return hooks;
}

int run_generate(const CLI::App& app, GenerateOptions options) {
  options.sources.has_prompt = app.count("--prompt") > 0;
  options.has_ids = app.count("--ids") > 0;
  const bool from_ids = options.has_ids || options.random_ids > 0;
  // What needs no weights is checked before they are loaded.
  const ModelConfig config = model_config_of(options.model.model);
  if (!from_ids && is_synthetic(options.model.model)) {
    refuse({"reading the prompt", "a text for " + options.model.model + ", which has no tokenizer", "token ids",
            "use --random-ids or --ids"});
  }
  apply_generation_config(app, options.model.model, config, options.sampling);
  const std::unique_ptr<Tokenizer> tokenizer = from_ids ? nullptr : load_tokenizer(options.model.model);
  std::optional<ChatTokens> chat;
  if (options.chat) {
    check_utf8(options.system, "--system");
    chat.emplace(load_chat_template(options.model.model), *tokenizer, today());
  } else if (!from_ids && has_chat_template(options.model.model)) {
    spdlog::info("this model has a chat template: with --chat, or in vesper chat, it is asked in its own format");
  }
  std::vector<GenerateRequest> requests =
      make_requests(options, encode_prompts(options, config, tokenizer.get(), chat));
  if (chat) {
    for (GenerateRequest& request : requests) request.end_ids = chat->end_ids();
  }

  const EngineOptions engine_settings = engine_options(options.model, static_cast<int>(requests.size()));
  check_requests(config, plan_engine_memory(options.model.model, config, engine_settings), requests);

  Engine engine = load_engine(options.model.model, engine_settings);
  (void)std::signal(SIGINT, on_interrupt);
  const auto start = std::chrono::steady_clock::now();
  ProgressLine prefilling("prefill", ProgressUnit::kTokens);
  const std::vector<GenerateResult> results =
      generate(engine, tokenizer.get(), requests, make_hooks(options, engine, prefilling));
  prefilling.finish();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  const std::int64_t peak = engine.peak_memory_bytes();
  if (options.json) {
    nlohmann::json all = nlohmann::json::array();
    const nlohmann::json attention = attention_report_json(engine.attention_config(), engine.attention_totals());
    for (const GenerateResult& result : results) {
      all.push_back(to_json(result, peak));
      all.back()["attention"] = attention;  // of the whole run
    }
    fmt::print("{}\n", (options.is_batch() ? all : all[0]).dump(2));
    return 0;
  }
  if (!options.is_batch()) {
    if (from_ids) fmt::print("{}", fmt::join(results[0].ids, " "));
    fmt::print("\n");
    std::fflush(stdout);
    print_statistics(results[0], peak);
  } else {
    print_batch_statistics(results, seconds, peak);
  }
  for (const std::string& line : attention_report(engine.attention_config(), engine.attention_totals())) {
    fmt::print(stderr, "{}\n", line);
  }
  return 0;
}

void add_prompt_flags(CLI::App& app, GenerateOptions& options) {
  std::vector<CLI::Option*> sources = {
      app.add_option("--prompt", options.sources.prompt, "The prompt; an empty one starts from BOS")->type_name("TEXT"),
      app.add_option("--prompt-file", options.sources.prompt_file, "A file that holds one prompt")
          ->check(some_text())
          ->type_name("FILE"),
      app.add_option(
             "--prompts-jsonl", options.sources.prompts_jsonl,
             "A file with one prompt a line, each a JSON string or {\"prompt\": \"...\"}; they run as one batch")
          ->check(some_text())
          ->type_name("FILE"),
      app.add_option("--ids", options.ids,
                     "A prompt of token ids separated by spaces; the answer is ids too, and no tokenizer is needed")
          ->type_name("IDS"),
      app.add_option("--random-ids", options.random_ids,
                     "A prompt of N token ids drawn from --seed, for synthetic models; the answer is ids too")
          ->check(whole_number(1, kMaxTokens))
          ->type_name("N"),
  };
  for (std::size_t i = 0; i < sources.size(); ++i) {
    sources[i]->group(kPromptFlags);
    for (std::size_t j = 0; j < i; ++j) sources[i]->excludes(sources[j]);
  }
}

void add_answer_flags(CLI::App& app, GenerateOptions& options) {
  app.add_option("--max-tokens", options.max_tokens, "Tokens to generate at most")
      ->check(whole_number(1, kMaxTokens))
      ->capture_default_str()
      ->type_name("N")
      ->group(kAnswerFlags);
  add_sampling_flags(app, options.sampling);
  add_seed_flag(app, options.model, "Of the draws, of --random-ids and of synthetic weights", kAnswerFlags);
  app.add_option("--stop", options.stop, "End before this text; may be given several times")
      ->check(some_text())
      ->allow_extra_args(false)
      ->type_name("TEXT")
      ->group(kAnswerFlags)
      ->excludes("--ids")
      ->excludes("--random-ids");
  app.add_flag("--chat", options.chat, "The prompt is a user's turn: put it into the model's chat template")
      ->group(kAnswerFlags)
      ->excludes("--ids")
      ->excludes("--random-ids");
  app.add_option("--system", options.system, "With --chat: the system's turn before it")
      ->check(some_text())
      ->type_name("TEXT")
      ->group(kAnswerFlags)
      ->needs("--chat");
  app.add_flag("--ignore-eos", options.ignore_eos, "Go on after an end-of-sequence token")->group(kAnswerFlags);
  app.add_flag("--json", options.json, "Print one JSON document, text and figures, an array for several prompts")
      ->group(kAnswerFlags);
}

}  // namespace

Command make_generate(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "generate",
      "Continue a prompt: the text streams to stdout, its figures follow on stderr. Several prompts print a JSON line "
      "each as they finish.");
  app->footer(
      "Examples:\n"
      "  vesper generate --model configs/demo --prompt \"It was a dark and stormy night\"\n"
      "  vesper generate --model configs/demo --prompt \"A ghost\" --temperature 0.7 --seed 7\n"
      "  vesper generate --model DIR --chat --system \"Be brief.\" --prompt \"Who was Lovelace?\"\n"
      "  vesper generate --model synthetic:llama-3.1-8b --random-ids 1024 --ignore-eos\n"
      "Ctrl-C ends after the current token and still prints the figures.");
  auto options = std::make_shared<GenerateOptions>();
  add_model_flag(*app, options->model.model);
  add_prompt_flags(*app, *options);
  add_answer_flags(*app, *options);
  add_engine_flags(*app, options->model);
  app->add_option("--decode-last", options->decode_last,
                  "Feed the prompt's last N tokens one by one through decode, where each layer's own attention runs")
      ->check(whole_number(0, kMaxTokens))
      ->capture_default_str()
      ->type_name("N")
      ->group(kRunFlags);
  return Command{app, [app, options] { return run_generate(*app, *options); }};
}

}  // namespace vesper
