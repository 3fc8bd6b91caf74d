// How answers are drawn: flags, and what the model's folder asks for where no flag does.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "engine/sampling.h"
#include "models/model_config.h"

namespace vesper {

// --temperature, --top-k, --top-p.
void add_sampling_flags(CLI::App& app, SamplingParams& sampling);

// Where generation_config.json draws answers (do_sample), its values take the place of those that no flag gave, which
// is said in one line. What it asks for and is not supported is said too.
void apply_generation_config(const CLI::App& app, const std::string& model, const ModelConfig& config,
                             SamplingParams& sampling);

}  // namespace vesper
