#include "apps/options.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <optional>
#include <type_traits>

#include "apps/progress.h"
#include "engine/core/error.h"
#include "engine/core/json.h"
#include "engine/memory_plan.h"

namespace vesper {
namespace {

// Loading fewer bytes of weights tells no rate.
constexpr std::int64_t kTellRateFrom = 1'000'000'000;

bool is_space(char c) {
  return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

template <typename Number>
CLI::Validator between(Number least, Number most, const std::string& what) {
  const auto check = [=](const std::string& text) -> std::string {
    Number value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool whole = error == std::errc() && end == text.data() + text.size();
    const bool octal = std::is_integral_v<Number> && text.size() > 1 && text[0] == '0';  // to CLI11
    if (whole && !octal && value >= least && value <= most) return "";
    return fmt::format("found {}, expected {} from {} to {}", in_quotes(text), what, least, most);
  };
  return {check, ""};
}

}  // namespace

CLI::Validator whole_number(std::int64_t least, std::int64_t most) {
  return between(least, most, "a whole number");
}

CLI::Validator number(double least, double most) {
  return between(least, most, "a number");
}

CLI::Validator one_of(const std::vector<std::string>& values) {
  const auto check = [values](const std::string& text) -> std::string {
    if (std::find(values.begin(), values.end(), text) != values.end()) return "";
    return fmt::format("found {}, expected one of {}", in_quotes(text), fmt::join(values, ", "));
  };
  return {check, ""};
}

CLI::Validator some_text() {
  const auto check = [](const std::string& text) -> std::string {
    return text.empty() ? "found an empty text, expected one of at least one character" : "";
  };
  return {check, ""};
}

void add_model_flag(CLI::App& app, std::string& model) {
  app.add_option("--model", model,
                 "Folder of a Hugging Face Llama checkpoint (config.json, safetensors, a tokenizer), or "
                 "synthetic:NAME for a shape of configs/models with random weights, as in synthetic:llama-3.1-8b")
      ->required()
      ->type_name("DIR")
      ->group(kModelFlags);
}

void add_hardware_flags(CLI::App& app, ModelOptions& options) {
  app.add_option("--device", options.device, "auto, cpu or cuda; auto is the GPU where one is usable")
      ->check(one_of({"auto", "cpu", "cuda"}))
      ->capture_default_str()
      ->type_name("DEVICE")
      ->group(kRunFlags);
  app.add_option("--page-tokens", options.page_tokens, "Tokens a page of the KV cache: 16, 32 or 64")
      ->check(one_of({"16", "32", "64"}))
      ->capture_default_str()
      ->type_name("N")
      ->group(kRunFlags);
}

void add_device_flags(CLI::App& app, ModelOptions& options) {
  add_hardware_flags(app, options);
  app.add_option("--attention", options.attention,
                 "What the layers attend with: dense, quest, twilight or vattention, with settings as in "
                 "quest:token_budget=1024 (layers 0 and 1 stay dense), or a .json file with a rule for each layer")
      ->capture_default_str()
      ->type_name("FILE|SPEC")
      ->group(kRunFlags);
}

void add_seed_flag(CLI::App& app, ModelOptions& options, const std::string& what, const char* group) {
  app.add_option("--seed", options.seed, what)
      ->check(whole_number(0, UINT32_MAX))
      ->capture_default_str()
      ->type_name("N")
      ->group(group);
}

void add_engine_flags(CLI::App& app, ModelOptions& options) {
  add_device_flags(app, options);
  app.add_option("--weights", options.weights,
                 "What the matrices are held in: stored (the checkpoint's own type), int4 (those of the layers are "
                 "quantised to 4 bits while loading), or int4,head (the head too)")
      ->capture_default_str()
      ->type_name("FORMAT")
      ->group(kRunFlags);
  app.add_option("--max-context", options.max_context,
                 "Tokens a sequence may hold, prompt and answer together; by default the model's maximum, or what "
                 "fits in 90 % of free memory")
      ->check(whole_number(1, kMaxTokens))
      ->type_name("N")
      ->group(kRunFlags);
  add_prefill_chunk_flag(app, options);
}

void add_prefill_chunk_flag(CLI::App& app, ModelOptions& options) {
  app.add_option("--prefill-chunk", options.prefill_chunk, "Prompt tokens that one prefill step takes")
      ->check(whole_number(1, 1 << 16))
      ->capture_default_str()
      ->type_name("N")
      ->group(kRunFlags);
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
                       .seed = options.seed,
                       .weights = weight_format_of(options.weights)};
}

Engine load_engine(const std::string& model, const EngineOptions& options) {
  // The clock starts with the first bytes, not with the driver.
  struct Loading {
    ProgressLine line{"loading weights", ProgressUnit::kBytes};
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
  };
  std::optional<Loading> loading;
  return {model, options, [&](std::int64_t done, std::int64_t total) {
            if (!loading) loading.emplace();
            loading->line.update(done, total);
            if (done < total) return;
            const double seconds =
                std::chrono::duration<double>(std::chrono::steady_clock::now() - loading->begin).count();
            loading->line.finish();
            if (total < kTellRateFrom) return;
            spdlog::info("read {} of weights in {:.2f} s, {}/s", format_bytes(total), seconds,
                         format_bytes(static_cast<std::int64_t>(static_cast<double>(total) / seconds)));
          }};
}

std::vector<std::int32_t> parse_ids(const std::string& text, const std::string& flag) {
  std::vector<std::int32_t> ids;
  const char* end = text.data() + text.size();
  for (const char* at = text.data(); (at = std::find_if_not(at, end, is_space)) != end;) {
    const char* word_end = std::find_if(at, end, is_space);
    std::int32_t id = 0;
    const auto [stop, error] = std::from_chars(at, word_end, id);
    if (error != std::errc() || stop != word_end) {
      refuse({"reading " + flag, in_quotes({at, static_cast<std::size_t>(word_end - at)}),
              "token ids separated by spaces", ""});
    }
    ids.push_back(id);
    at = word_end;
  }
  return ids;
}

void check_output_path(const std::string& path, const std::string& flag) {
  namespace fs = std::filesystem;
  const auto refuse_path = [&](const std::string& found, const std::string& expected) {
    refuse({"writing " + (path.empty() ? flag : path), found, expected, "change " + flag});
  };
  std::error_code ignored;  // what cannot be looked at is not there
  const fs::path parent = fs::path(path).parent_path();
  const fs::path folder = parent.empty() ? "." : parent;
  if (path.empty()) refuse_path("an empty name", "a path for a file");
  if (fs::is_directory(path, ignored)) refuse_path("a folder", "a path for a file");
  if (fs::exists(path, ignored) && !fs::is_regular_file(path, ignored))
    refuse_path("no regular file", "a path for a file");
  if (!fs::is_directory(folder, ignored)) refuse_path("no folder " + folder.string(), "an existing folder");
  if (access(folder.c_str(), W_OK) != 0) refuse_path("a folder that cannot be written", "a writable one");
}

}  // namespace vesper
