#include "apps/help.h"

#include <fmt/format.h>

#include <algorithm>
#include <sstream>
#include <vector>

namespace vesper {
namespace {

constexpr std::size_t kColumns = 80;
constexpr std::size_t kIndent = 26;  // where the second column begins
constexpr char kGlue = '\x1f';       // a space that no line may break at

// `text` in lines that begin at column `indent`; the first line is already there.
std::string wrap(const std::string& text, std::size_t indent) {
  std::istringstream words(text);
  std::string out;
  std::size_t column = indent;
  for (std::string word; words >> word;) {
    const bool first = column == indent;
    if (!first && column + 1 + word.size() > kColumns) {
      out += '\n' + std::string(indent, ' ');
      column = indent;
    } else if (!first) {
      out += ' ';
      ++column;
    }
    out += word;
    column += word.size();
  }
  std::replace(out.begin(), out.end(), kGlue, ' ');
  return out;
}

std::string row(const std::string& left, const std::string& right) {
  const std::string gap =
      left.size() + 4 > kIndent ? '\n' + std::string(kIndent, ' ') : std::string(kIndent - 2 - left.size(), ' ');
  return "  " + left + gap + wrap(right, kIndent) + '\n';
}

// "--model DIR", or "NAME" of what has no flag; CLI11 appends validators to the type's name, after a colon.
std::string flag_with_type(const CLI::Option& option) {
  std::string text = option.get_name();
  if (option.get_type_size() == 0) return text;
  const std::string type = option.get_type_name().substr(0, option.get_type_name().find(':'));
  return option.get_positional() ? type : text + ' ' + type;
}

std::string flag_row(const CLI::Option& option) {
  std::string text = option.get_description();
  if (option.get_required()) text += " (required)";
  if (!option.get_default_str().empty()) text += fmt::format(" (default{}{})", kGlue, option.get_default_str());
  return row(flag_with_type(option), text);
}

std::vector<const CLI::App*> commands_of(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

std::string names_of(const std::vector<const CLI::App*>& commands) {
  std::string names;
  for (const CLI::App* command : commands) names += (names.empty() ? "" : ", ") + command->get_name();
  return names;
}

std::string flags_of(const CLI::App& app) {
  std::string names;
  for (const CLI::Option* option : app.get_options()) names += (names.empty() ? "" : ", ") + option->get_name();
  return names;
}

// "--prompt" of "--prompt excludes --prompt-file" and of "--prompt: ...".
std::string first_flag(const std::string& text) {
  return text.substr(0, text.find_first_of(" :"));
}

// "vesper eval ppl": the words that lead to a command.
std::string words_of(const CLI::App& app) {
  return app.get_parent() == nullptr ? "vesper" : words_of(*app.get_parent()) + ' ' + app.get_name();
}

std::string refused_by(const CLI::App& command, const CLI::ParseError& error) {
  const std::string what = error.what();
  const std::string flag = first_flag(what);
  const std::string doing = "reading the command line of " + words_of(command);
  const CLI::Option* option = command.get_option_no_throw(flag);
  // A flag that is missing may be there misspelt.
  const bool missing = dynamic_cast<const CLI::RequiredError*>(&error) != nullptr;
  const std::vector<std::string> extras = command.remaining();
  if (!extras.empty() && (missing || dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr)) {
    return fmt::format("{}: found \"{}\", expected one of its flags: {}", doing, extras[0], flags_of(command));
  }
  if (missing && option != nullptr) {
    return fmt::format("{}: found no {}, expected {}; `{} --help` tells all flags", doing, flag,
                       flag_with_type(*option), words_of(command));
  }
  if (dynamic_cast<const CLI::ArgumentMismatch*>(&error) != nullptr && option != nullptr) {
    return fmt::format("{}: found {} {}, expected {} once", doing, flag,
                       option->count() == 0 ? "without a value" : "twice", flag_with_type(*option));
  }
  if (dynamic_cast<const CLI::ExcludesError*>(&error) != nullptr) {
    return fmt::format("{}: found {} together with {}, expected only one of them", doing, flag,
                       what.substr(what.rfind(' ') + 1));
  }
  if (dynamic_cast<const CLI::ValidationError*>(&error) != nullptr) return "reading " + what;
  return fmt::format("{}: {}", doing, what);
}

}  // namespace

std::string HelpFormatter::make_help(const CLI::App* app, std::string name, CLI::AppFormatMode /*mode*/) const {
  const std::vector<const CLI::App*> commands = commands_of(*app);
  std::string out = wrap(app->get_description(), 0) + "\n\nUsage: " + name;
  for (const CLI::Option* option : app->get_options()) {
    if (option->get_required()) out += ' ' + flag_with_type(*option);
  }
  out += commands.empty() ? " [FLAGS]\n" : " COMMAND [FLAGS]\n";
  if (!commands.empty()) out += "\nCommands:\n";
  for (const CLI::App* command : commands) out += row(command->get_name(), command->get_description());
  for (const char* group :
       {kModelFlags, kPromptFlags, kInputFlags, kAnswerFlags, kOutputFlags, kRunFlags, kOtherFlags}) {
    std::string rows;
    for (const CLI::Option* option : app->get_options()) {
      if (option->get_group() == group) rows += flag_row(*option);
    }
    if (!rows.empty()) out += fmt::format("\n{}:\n{}", group, rows);
  }
  return out + '\n' + app->get_footer() + '\n';
}

std::string parse_refusal(const CLI::App& root, const CLI::ParseError& error, const std::string& first_word) {
  const std::string doing =
      "reading the command line" + (root.get_parent() == nullptr ? "" : " of " + words_of(root)) + ": ";
  const auto chosen = root.get_subcommands();
  const std::vector<std::string> before = root.remaining();
  if (!chosen.empty() && before.empty()) {
    const CLI::App& command = *chosen[0];
    if (commands_of(command).empty()) return refused_by(command, error);
    const std::vector<std::string> left = command.remaining();
    return parse_refusal(command, error, left.empty() ? "" : left[0]);
  }
  if (!chosen.empty()) {
    return fmt::format("{}found \"{}\" outside of a command, expected {} and then its flags", doing, before[0],
                       words_of(*chosen[0]));
  }
  return fmt::format("{}found {}, expected one of the commands {}; `{} --help` tells more", doing,
                     first_word.empty() ? "nothing" : '"' + first_word + '"', names_of(commands_of(root)),
                     words_of(root));
}

}  // namespace vesper
