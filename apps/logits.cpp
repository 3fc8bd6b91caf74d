// vesper logits: the logits of given ids, for checking a model against anybody's reference.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "apps/options.h"
#include "apps/progress.h"
#include "engine/core/error.h"
#include "models/safetensors.h"

namespace vesper {
namespace {

struct LogitsOptions {
  ModelOptions model;
  std::string ids;
  std::string output;
  int decode_last = 0;
};

// Logits of the step's `count` query tokens, from row `first` of `out` on.
void read_step(Engine& engine, int first, int count, std::vector<float>& out) {
  const int vocab = engine.config().vocab;
  const int block = logit_rows(engine.memory().limits.max_seqs);
  for (int done = 0; done < count; done += block) {
    std::vector<std::int32_t> rows(static_cast<std::size_t>(std::min(block, count - done)));
    std::iota(rows.begin(), rows.end(), done);
    const std::size_t offset = static_cast<std::size_t>(first + done) * static_cast<std::size_t>(vocab);
    engine.read_logits(rows, std::span(out).subspan(offset, rows.size() * static_cast<std::size_t>(vocab)));
  }
}

int run_logits(const LogitsOptions& options) {
  const std::vector<std::int32_t> ids = parse_ids(options.ids, "--ids");
  const int tokens = static_cast<int>(ids.size());
  if (tokens == 0) refuse({"reading --ids", "nothing", "at least one token id", ""});
  check_output_path(options.output);

  // What needs no weights is checked before they are loaded.
  const ModelConfig config = model_config_of(options.model.model);
  check_token_ids(config, ids, "reading --ids");
  const EngineOptions engine_settings = engine_options(options.model, 1);
  const int max_context = plan_engine_memory(options.model.model, config, engine_settings).limits.max_context;
  if (tokens > max_context) {
    refuse({"admitting --ids", std::to_string(tokens) + " tokens",
            "at most " + std::to_string(max_context) + " (--max-context)", "pass fewer ids or raise --max-context"});
  }

  Engine engine = load_engine(options.model.model, engine_settings);
  CachedSequence sequence;
  if (!engine.reserve(sequence, tokens)) fail({"reserving KV pages", "too few", "one context of them", ""});
  std::vector<float> logits(static_cast<std::size_t>(tokens) * static_cast<std::size_t>(engine.config().vocab));
  const int prefilled = tokens - std::min(tokens, options.decode_last);
  sequence.prompt_length = prefilled;
  ProgressLine progress("logits", ProgressUnit::kTokens);
  for (int at = 0; at < tokens;) {
    const int count = at < prefilled ? std::min(options.model.prefill_chunk, prefilled - at) : 1;
    const auto step = std::span(ids).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count));
    if (at < prefilled) {
      engine.prefill(sequence, step);
    } else {
      const std::array<CachedSequence*, 1> sequences = {&sequence};
      engine.decode(sequences, step);
    }
    read_step(engine, at, count, logits);
    at += count;
    progress.update(at, tokens);
  }
  progress.finish();
  const NamedTensor tensor{
      .name = "logits", .dtype = DType::kF32, .shape = {tokens, engine.config().vocab}, .data = logits.data()};
  write_safetensors(options.output, {&tensor, 1});
  return 0;
}

}  // namespace

Command make_logits(CLI::App& root) {
  CLI::App* app = root.add_subcommand(
      "logits",
      "Write the logits of token ids to a safetensors file, to check a model against a reference. Needs no tokenizer.");
  app->footer(
      "Writes one tensor: logits [tokens, vocab] f32; row t holds what follows ids 0 ... t.\n\n"
      "Example:\n"
      "  vesper logits --model configs/demo --ids \"1 2 3\" --output logits.safetensors");
  auto options = std::make_shared<LogitsOptions>();
  add_model_flag(*app, options->model.model);
  app->add_option("--ids", options->ids, "Token ids, separated by spaces")
      ->required()
      ->type_name("IDS")
      ->group(kInputFlags);
  app->add_option("--output", options->output, "The safetensors file to write")
      ->required()
      ->type_name("FILE")
      ->group(kOutputFlags);
  add_engine_flags(*app, options->model);
  app->add_option("--decode-last", options->decode_last,
                  "Feed the last N ids one by one through decode, where each layer's own attention runs")
      ->check(whole_number(0, kMaxTokens))
      ->capture_default_str()
      ->type_name("N")
      ->group(kRunFlags);
  add_seed_flag(*app, options->model, "Of synthetic weights", kRunFlags);
  return Command{app, [options] { return run_logits(*options); }};
}

}  // namespace vesper
