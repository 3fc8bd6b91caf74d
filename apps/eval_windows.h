// What the kinds of vesper eval share: their flags, the windows they cut from a text, the head of their documents.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "apps/options.h"
#include "engine/eval.h"

namespace vesper {

// Flags of all kinds.
struct EvalOptions {
  ModelOptions model;
  int context = 0;
  bool json = false;
  std::string text;
  std::string ids;
};
void add_eval_flags(CLI::App& app, EvalOptions& options);

// What needs no file is checked first.
void check_source(const EvalOptions& options);

// Sequences hold --context tokens, where --max-context does not ask for more.
EngineOptions eval_engine_options(const EvalOptions& options);

// What sparse layers read goes to stderr; with --json into the document.
void print_report(const Engine& engine);
nlohmann::json head_of(const char* kind, const EvalOptions& options, const Engine& engine);

// Windows of a text.
struct WindowOptions {
  EvalOptions common;
  int last = 256;
  WindowCut cut;
};
// `options.last` is the default of --last.
void add_window_flags(CLI::App& app, WindowOptions& options);
std::vector<TokenIds> read_windows(const WindowOptions& options);
// What was measured, behind the figures of a line.
std::string describe(const WindowOptions& options, std::size_t windows);

// Kinds in files of their own.
Command make_fidelity(CLI::App& eval);
Command make_guarantee(CLI::App& eval);

}  // namespace vesper
