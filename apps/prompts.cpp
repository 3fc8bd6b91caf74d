#include "apps/prompts.h"

#include <unistd.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "engine/core/philox.h"

namespace vesper {
namespace {

std::vector<std::string> read_jsonl(const std::string& path) {
  std::istringstream lines(read_text(path));
  std::vector<std::string> prompts;
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = path + ", line " + std::to_string(number);
    const nlohmann::json entry = parse_json(line, where);
    const nlohmann::json prompt = entry.is_object() ? entry.value("prompt", nlohmann::json()) : entry;
    if (!prompt.is_string() || (entry.is_object() && entry.size() != 1)) {
      refuse({"reading " + where, "another shape", R"(a JSON string, or {"prompt": "..."})", ""});
    }
    prompts.push_back(prompt.get<std::string>());
  }
  if (prompts.empty()) refuse({"reading " + path, "no prompts", "one a line", ""});
  return prompts;
}

}  // namespace

std::string read_text(const std::string& path) {
  if (path == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  std::ifstream file(path, std::ios::binary);
  std::string text(std::istreambuf_iterator<char>(file), {});
  if (!file) refuse({"reading " + path, "a file that cannot be read", "a readable text file", "check the path"});
  return text;
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
  if (sources.has_prompt) return {sources.prompt};
  if (!sources.prompt_file.empty()) return {read_text(sources.prompt_file)};
  if (!sources.prompts_jsonl.empty()) return read_jsonl(sources.prompts_jsonl);
  if (isatty(STDIN_FILENO) != 0) {
    refuse({"reading the prompt", "none", "one of --prompt, --prompt-file, --prompts-jsonl, stdin", ""});
  }
  return {read_text("-")};
}

}  // namespace vesper
