// Where prompts come from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vesper {

struct PromptSources {
  bool has_prompt = false;  // --prompt was given; it may be empty
  std::string prompt;
  std::string prompt_file;    // one prompt: the whole file
  std::string prompts_jsonl;  // one prompt a line: a JSON string, or an object with "prompt"
};

// The prompts, from the one source that was given, or all of stdin where none was and stdin is no terminal. Throws
// input errors for none or several sources, and for files that cannot be read.
std::vector<std::string> read_prompts(const PromptSources& sources);

// `count` ids drawn from `seed`, for models without a tokenizer: uniform over the vocabulary.
std::vector<std::int32_t> random_ids(int count, std::uint64_t seed, int vocab);

// A whole text file, or stdin where `path` is "-". Throws an input error where it cannot be read or is not UTF-8.
std::string read_text(const std::string& path);

// Throws an input error that names `source` and the first byte that is not UTF-8.
void check_utf8(const std::string& text, const std::string& source);

}  // namespace vesper
