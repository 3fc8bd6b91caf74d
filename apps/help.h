// How --help and a refused command line read.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace vesper {

// Headings of the flags, in the order of help texts.
inline constexpr const char* kModelFlags = "Model";
inline constexpr const char* kInputFlags = "Input";
inline constexpr const char* kPromptFlags = "Prompt (one of these; without any, stdin is read)";
inline constexpr const char* kAnswerFlags = "Answer";
inline constexpr const char* kOutputFlags = "Output";
inline constexpr const char* kRunFlags = "Device and memory";
inline constexpr const char* kOtherFlags = "Other";

// Two columns within 80 characters: a flag with its type, what it does with its default. The footer holds examples.
class HelpFormatter : public CLI::FormatterBase {
 public:
  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode mode) const override;
};

// One sentence for a command line that CLI11 refused: what was found, what was expected, without "error: ".
std::string parse_refusal(const CLI::App& root, const CLI::ParseError& error, const std::string& first_word);

}  // namespace vesper
