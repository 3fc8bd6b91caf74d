#include "apps/prompts.h"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sstream>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "engine/core/philox.h"
#include "tokenizer/tokenizer.h"

namespace vesper {
namespace {

// Far above any context, and below what a machine can hold: an endless file ends here, not in all of its memory.
constexpr std::size_t kMostTextBytes = std::size_t{1} << 28;

std::vector<std::string> read_jsonl(const std::string& path) {
  std::istringstream lines(read_text(path));
  std::vector<std::string> prompts;
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = path + ", line " + std::to_string(number);
    const nlohmann::json entry = parse_json(line, where);
    if (entry.is_object()) {
      for (const auto& [key, value] : entry.items()) {
        if (key != "prompt") refuse({"reading " + where, "the key " + in_quotes(key), "only the key \"prompt\"", ""});
      }
    }
    const nlohmann::json prompt = entry.is_object() ? entry.value("prompt", nlohmann::json()) : entry;
    if (!prompt.is_string()) {
      refuse({"reading " + where, in_quotes(line), R"(a JSON string, or {"prompt": "..."})", ""});
    }
    prompts.push_back(prompt.get<std::string>());
  }
  if (prompts.empty()) refuse({"reading " + path, "no prompts", "one a line", ""});
  return prompts;
}

}  // namespace

std::string read_text(const std::string& path) {
  const bool from_stdin = path == "-";
  const std::string source = from_stdin ? "stdin" : path;
  const auto close = [&](std::FILE* file) { return from_stdin ? 0 : std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(from_stdin ? stdin : std::fopen(path.c_str(), "rb"), close);
  std::string text;
  std::array<char, 1 << 16> buffer;
  for (std::size_t count = 1; file && count > 0;) {
    count = std::fread(buffer.data(), 1, buffer.size(), file.get());
    text.append(buffer.data(), count);
    if (text.size() > kMostTextBytes) {
      refuse({"reading " + source, "more than 256 MiB", "a text of at most that", "take a part of it"});
    }
  }
  if (!file || std::ferror(file.get()) != 0) {
    refuse({"reading " + source, std::strerror(errno), "a readable text file", "check the path"});
  }
  check_utf8(text, source);
  return text;
}

void check_utf8(const std::string& text, const std::string& source) {
  const std::int64_t at = find_invalid_utf8(text);
  if (at < 0) return;
  refuse({"reading " + source,
          fmt::format("the byte 0x{:02x} at byte offset {}",
                      static_cast<unsigned char>(text[static_cast<std::size_t>(at)]), at),
          "valid UTF-8", "convert the text to UTF-8"});
}

std::vector<std::int32_t> random_ids(int count, std::uint64_t seed, int vocab) {
  const PhiloxKey key{{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}};
  std::vector<std::int32_t> ids;
  for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(count); ++i) {
    const std::uint64_t word = philox({{i, 0, 0, 0}}, key).word[0];
    ids.push_back(static_cast<std::int32_t>(word * static_cast<std::uint64_t>(vocab) >> 32));
  }
  return ids;
}

std::vector<std::string> read_prompts(const PromptSources& sources) {
  if (sources.has_prompt) {
    check_utf8(sources.prompt, "--prompt");
    return {sources.prompt};
  }
  if (!sources.prompt_file.empty()) return {read_text(sources.prompt_file)};
  if (!sources.prompts_jsonl.empty()) return read_jsonl(sources.prompts_jsonl);
  if (isatty(STDIN_FILENO) != 0) {
    refuse({"reading the prompt", "none",
            "one of --prompt, --prompt-file, --prompts-jsonl, --ids, --random-ids, or stdin", ""});
  }
  return {read_text("-")};
}

}  // namespace vesper
