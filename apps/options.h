// Flags that several commands share, and how they become what the engine wants.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "apps/help.h"
#include "engine/engine.h"

namespace vesper {

// One subcommand: its flags are declared on `app`; `run` returns the exit code.
struct Command {
  CLI::App* app = nullptr;
  std::function<int()> run;
};

// The table of commands is in main.cpp; each is defined in the file of its name.
Command make_generate(CLI::App& root);
Command make_chat(CLI::App& root);
Command make_tokenize(CLI::App& root);
Command make_logits(CLI::App& root);
Command make_attend(CLI::App& root);
Command make_eval(CLI::App& root);
Command make_info(CLI::App& root);
Command make_compare(CLI::App& root);
Command make_bench(CLI::App& root);
Command make_repro(CLI::App& root);

// Most tokens that a flag may ask for; far more than memory holds, far less than 32 bits do.
inline constexpr std::int64_t kMaxTokens = 1 << 24;

// What the flags below fill.
struct ModelOptions {
  std::string model;
  std::string device = "auto";
  std::string attention = "dense";
  std::string weights = "stored";
  int max_context = 0;
  int prefill_chunk = 2048;
  int page_tokens = 16;
  std::uint32_t seed = 0;
};
void add_model_flag(CLI::App& app, std::string& model);
// --device, --page-tokens.
void add_hardware_flags(CLI::App& app, ModelOptions& options);
void add_prefill_chunk_flag(CLI::App& app, ModelOptions& options);
// --device, --attention, --page-tokens.
void add_device_flags(CLI::App& app, ModelOptions& options);
// These and --weights, --max-context, --prefill-chunk.
void add_engine_flags(CLI::App& app, ModelOptions& options);
// --seed; `what` it is of differs from command to command.
void add_seed_flag(CLI::App& app, ModelOptions& options, const std::string& what, const char* group);

// --device auto: the GPU where one can be used, else the CPU with one line that says why. An input error for "cuda"
// without a usable GPU.
DeviceKind choose_device(const std::string& name);

EngineOptions engine_options(const ModelOptions& options, int max_seqs);

// The engine with its weights, a progress line showing how far it is.
Engine load_engine(const std::string& model, const EngineOptions& options);

// What a flag's value must be; the refusal names the flag, what was found and what was expected.
CLI::Validator whole_number(std::int64_t least, std::int64_t most);
CLI::Validator number(double least, double most);  // a finite one
CLI::Validator one_of(const std::vector<std::string>& values);
CLI::Validator some_text();  // not empty

// "1 2 3" -> numbers; an input error names what is no token id. `flag` is where the text came from.
std::vector<std::int32_t> parse_ids(const std::string& text, const std::string& flag);

// Refuses an output path that cannot be written, as far as can be told before any work is done. `flag` gave it.
void check_output_path(const std::string& path, const std::string& flag = "--output");

}  // namespace vesper
