// The vesper command: a table of subcommands, and the one place where errors become exit codes.
#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>

#include "apps/help.h"
#include "apps/options.h"
#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr int kFailed = 1;
constexpr int kWrongRequest = 2;

constexpr std::array kCommands = {&make_generate, &make_chat,    &make_tokenize, &make_logits, &make_attend,
                                  &make_info,     &make_compare, &make_eval,     &make_bench,  &make_repro};

void set_up_logging(const std::string& level) {
  auto logger = spdlog::stderr_color_mt("vesper");
  logger->set_pattern("%^%l%$: %v");
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(std::move(logger));
}

// A standard descriptor that is closed would be that of the first file to be opened, and text would go into it. One
// that may not be used in the needed direction fails as a closed one does; messages alone have leave to get lost.
void occupy_standard_descriptors() {
  for (const int descriptor : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(descriptor, F_GETFD) >= 0) continue;
    (void)open("/dev/null", descriptor == STDOUT_FILENO ? O_RDONLY : O_WRONLY);
  }
}

// Not by fmt::print, which throws where stderr takes no more.
void tell_error(const std::string& text) {
  (void)std::fputs(("error: " + text + '\n').c_str(), stderr);
}

// Text that stdout did not take (a full disk) must not pass for done.
void check_stdout() {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return;
  fail({"writing to stdout", std::strerror(errno), "", "make room, or send the text elsewhere"});
}

// The flags of every command, and of each of its kinds where it has some.
void add_other_flags(CLI::App& app, std::string& log_level) {
  app.set_help_flag("--help,-h", "Show this text")->group(kOtherFlags);
  const auto kinds = app.get_subcommands([](const CLI::App*) { return true; });
  for (CLI::App* kind : kinds) add_other_flags(*kind, log_level);
  if (!kinds.empty()) return;
  app.add_option("--log-level", log_level, "What to tell on stderr beside errors: debug, info, warn, error or off")
      ->check(one_of({"debug", "info", "warn", "error", "off"}))
      ->capture_default_str()
      ->type_name("LEVEL")
      ->group(kOtherFlags);
}

int run(int argc, char** argv) {
  CLI::App root("vesper: an LLM decode engine that measures. Text goes to stdout, everything else to stderr.",
                "vesper");
  root.formatter(std::make_shared<HelpFormatter>());
  root.require_subcommand(1);
  root.set_help_flag("--help,-h", "Show this text")->group(kOtherFlags);
  root.set_version_flag("--version", "vesper " VESPER_VERSION, "Show the version")->group(kOtherFlags);
  root.footer(
      "First steps:\n"
      "  vesper generate --model configs/demo --prompt \"It was a dark and stormy night\"\n"
      "  vesper generate --help      what a command does and all its flags\n\n"
      "Exit codes: 0 done, 1 failed while running, 2 the request or the input was wrong.");
  std::string log_level = "info";
  std::vector<Command> commands;
  for (const auto make : kCommands) {
    commands.push_back(make(root));
    add_other_flags(*commands.back().app, log_level);
  }
  try {
    root.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return root.exit(error);  // --help, --version
    tell_error(parse_refusal(root, error, argc > 1 ? argv[1] : ""));
    return kWrongRequest;
  }
  set_up_logging(log_level);
  for (const Command& command : commands) {
    if (!command.app->parsed()) continue;
    const int code = command.run();
    check_stdout();
    return code;
  }
  return kFailed;
}

}  // namespace
}  // namespace vesper

int main(int argc, char** argv) {
  vesper::occupy_standard_descriptors();
  (void)std::signal(SIGXFSZ, SIG_IGN);  // a file beyond `ulimit -f` is a write that fails, not a death
  try {
    return vesper::run(argc, argv);
  } catch (const vesper::Error& error) {
    vesper::tell_error(error.what());
    return error.fault() == vesper::Fault::kInput ? vesper::kWrongRequest : vesper::kFailed;
  } catch (const std::bad_alloc&) {
    vesper::tell_error("found no host memory left; lower --max-context or free memory");
    return vesper::kFailed;
  } catch (const std::exception& error) {
    vesper::tell_error(error.what());
    return vesper::kFailed;
  }
}
