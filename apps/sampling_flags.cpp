#include "apps/sampling_flags.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <vector>

#include "apps/options.h"
#include "models/generation_config.h"

namespace vesper {

void add_sampling_flags(CLI::App& app, SamplingParams& sampling) {
  app.add_option("--temperature", sampling.temperature,
                 "0 is greedy: always the likeliest token; above it tokens are drawn")
      ->check(number(0.0, 100.0))
      ->capture_default_str()
      ->type_name("T")
      ->group(kAnswerFlags);
  app.add_option("--top-k", sampling.top_k, "Draw among the k likeliest tokens; 0 is all")
      ->check(whole_number(0, INT32_MAX))
      ->capture_default_str()
      ->type_name("K")
      ->group(kAnswerFlags);
  app.add_option("--top-p", sampling.top_p, "Draw among the likeliest tokens that together reach this probability")
      ->check(number(1e-6, 1.0))
      ->capture_default_str()
      ->type_name("P")
      ->group(kAnswerFlags);
}

void apply_generation_config(const CLI::App& app, const std::string& model, const ModelConfig& config,
                             SamplingParams& sampling) {
  if (!is_synthetic(model)) {
    const GenerationConfig file = load_generation_config(model, config.vocab);
    if (!file.ignored.empty()) {
      spdlog::warn("generation_config.json asks for {}, which is not supported and changes nothing",
                   fmt::join(file.ignored, ", "));
    }
    std::vector<std::string> taken;
    const auto take = [&](const std::string& flag, auto& value, const auto& wanted) {
      if (!file.do_sample || app.count(flag) > 0 || value == wanted) return;
      value = wanted;
      taken.push_back(fmt::format("{} {}", flag, wanted));
    };
    take("--temperature", sampling.temperature, file.temperature);
    if (sampling.temperature > 0.0F) {  // a greedy flag leaves nothing to draw
      take("--top-k", sampling.top_k, file.top_k);
      take("--top-p", sampling.top_p, file.top_p);
    }
    if (!taken.empty()) {
      spdlog::info("generation_config.json sets {}; --temperature 0 is greedy", fmt::join(taken, ", "));
    }
  }
  if (sampling.temperature == 0.0F && (app.count("--top-k") > 0 || app.count("--top-p") > 0)) {
    spdlog::warn("--temperature 0 is greedy: --top-k and --top-p change nothing");
  }
}

}  // namespace vesper
