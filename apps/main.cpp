// The vesper command: a table of subcommands, and the one place where errors become exit codes.
#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <array>
#include <exception>

#include "apps/options.h"
#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr int kFailed = 1;
constexpr int kWrongRequest = 2;

constexpr std::array kCommands = {&make_generate, &make_tokenize, &make_logits, &make_attend, &make_info};

void set_up_logging(const std::string& level) {
  auto logger = spdlog::stderr_color_mt("vesper");
  logger->set_pattern("%^%l%$: %v");
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(std::move(logger));
}

std::string known_flags(const CLI::App& app) {
  std::string names;
  for (const CLI::Option* option : app.get_options()) {
    names += (names.empty() ? "" : ", ") + option->get_name();
  }
  return names;
}

// One sentence for a command line that CLI11 refused.
std::string parse_refusal(const CLI::App& root, const CLI::ParseError& error, const std::string& first_word) {
  const auto chosen = root.get_subcommands();
  if (chosen.empty()) {
    std::string names;
    for (const CLI::App* command : root.get_subcommands([](const CLI::App*) { return true; })) {
      names += (names.empty() ? "" : ", ") + command->get_name();
    }
    return fmt::format("reading the command line: found {}, expected one of the commands {}",
                       first_word.empty() ? "nothing" : '"' + first_word + '"', names);
  }
  std::string text = fmt::format("vesper {}: {}", chosen[0]->get_name(), error.what());
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    text += "; its flags are " + known_flags(*chosen[0]);
  }
  return text;
}

int run(int argc, char** argv) {
  CLI::App root("vesper: an LLM decode engine that measures. Text goes to stdout, everything else to stderr.");
  root.require_subcommand(1);
  root.set_version_flag("--version", "vesper " VESPER_VERSION);
  root.footer(
      "`vesper COMMAND --help` tells a command's flags. Exit codes: 0 done, 1 failed while running, 2 the request or "
      "the input was wrong.");
  std::string log_level = "info";
  std::vector<Command> commands;
  for (const auto make : kCommands) {
    commands.push_back(make(root));
    commands.back()
        .app->add_option("--log-level", log_level, "debug, info, warn, error or off")
        ->check(CLI::IsMember({"debug", "info", "warn", "error", "off"}))
        ->capture_default_str()
        ->type_name("LEVEL");
  }
  try {
    root.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return root.exit(error);  // --help, --version
    fmt::print(stderr, "error: {}\n", parse_refusal(root, error, argc > 1 ? argv[1] : ""));
    return kWrongRequest;
  }
  set_up_logging(log_level);
  for (const Command& command : commands) {
    if (command.app->parsed()) return command.run();
  }
  return kFailed;
}

}  // namespace
}  // namespace vesper

int main(int argc, char** argv) {
  try {
    return vesper::run(argc, argv);
  } catch (const vesper::Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return error.fault() == vesper::Fault::kInput ? vesper::kWrongRequest : vesper::kFailed;
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return vesper::kFailed;
  }
}
