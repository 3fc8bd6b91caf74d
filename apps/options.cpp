#include "apps/options.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <charconv>
#include <filesystem>

#include "engine/core/error.h"

namespace vesper {

void add_model_flag(CLI::App& app, std::string& model) {
  app.add_option(
         "--model", model,
         "Folder of a Hugging Face Llama checkpoint, or synthetic:NAME for a shape of configs/models with random "
         "weights (llama-2-7b, llama-3.1-8b, llama-3.2-1b, tiny)")
      ->required()
      ->type_name("DIR");
}

void add_device_flags(CLI::App& app, ModelOptions& options) {
  app.add_option("--device", options.device, "auto, cpu or cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str()
      ->type_name("DEVICE");
  app.add_option("--attention", options.attention, "Attention of the layers: a backend's name (dense) or a JSON file")
      ->capture_default_str()
      ->type_name("FILE|NAME");
  app.add_option("--page-tokens", options.page_tokens, "Tokens a page of the KV cache")
      ->check(CLI::IsMember({16, 32, 64}))
      ->capture_default_str()
      ->type_name("N");
  app.add_option("--seed", options.seed, "Seed of sampling and of synthetic weights")
      ->capture_default_str()
      ->type_name("N");
}

void add_engine_flags(CLI::App& app, ModelOptions& options) {
  add_model_flag(app, options.model);
  add_device_flags(app, options);
  app.add_option(
         "--max-context", options.max_context,
         "Tokens a sequence may hold, prompt and answer together; by default the model's maximum or what fits in "
         "90 % of free memory")
      ->check(CLI::Range(1, 1 << 24))
      ->type_name("N");
  app.add_option("--prefill-chunk", options.prefill_chunk, "Prompt tokens that one prefill step takes")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str()
      ->type_name("N");
}

DeviceKind choose_device(const std::string& name) {
  if (name == "cpu") return DeviceKind::kCpu;
  const std::string reason = cuda_unavailable_reason();
  if (reason.empty()) return DeviceKind::kCuda;
  if (name == "cuda") refuse({"choosing --device cuda", reason, "a usable GPU", "use --device cpu"});
  spdlog::info("running on the CPU: {}", reason);
  return DeviceKind::kCpu;
}

EngineOptions engine_options(const ModelOptions& options, int max_seqs) {
  return EngineOptions{.limits = {.device = choose_device(options.device),
                                  .max_context = options.max_context,
                                  .max_seqs = max_seqs,
                                  .prefill_chunk = options.prefill_chunk,
                                  .page_tokens = options.page_tokens},
                       .attention = options.attention,
                       .seed = options.seed};
}

std::vector<std::int32_t> parse_ids(const std::string& text, const std::string& flag) {
  std::vector<std::int32_t> ids;
  const char* at = text.data();
  const char* end = at + text.size();
  while (at != end) {
    if (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r') {
      ++at;
      continue;
    }
    std::int32_t id = 0;
    const auto [stop, error] = std::from_chars(at, end, id);
    if (error != std::errc() || (stop != end && *stop != ' ' && *stop != '\n' && *stop != '\t' && *stop != '\r')) {
      const std::string word(at, std::find(at, end, ' '));
      refuse({"reading " + flag, "\"" + word + "\"", "token ids separated by spaces", ""});
    }
    ids.push_back(id);
    at = stop;
  }
  return ids;
}

void check_output_path(const std::string& path) {
  namespace fs = std::filesystem;
  const fs::path parent = fs::path(path).parent_path();
  const std::string folder = parent.empty() ? "." : parent.string();
  if (fs::is_directory(path)) refuse({"writing " + path, "a folder", "a path for a file", "change --output"});
  if (!fs::is_directory(folder)) {
    refuse({"writing " + path, "no folder " + folder, "an existing folder", "make it or change --output"});
  }
  if (access(folder.c_str(), W_OK) != 0) {
    refuse({"writing " + path, "a folder that cannot be written", "a writable one", "change --output"});
  }
}

}  // namespace vesper
