// The regular expressions that cut a text into words before byte pair encoding, through PCRE2 in its UTF and UCP modes.
//
// Published patterns are written for Oniguruma (Hugging Face's `tokenizers`) and Rust's fancy-regex (tiktoken). Taken
// is the part of their syntax that means the same in PCRE2. Two things are rewritten: \s to White_Space, because
// PCRE2's also holds U+180E, and \p{...} to the category as Unicode 16.0 has it. Anything else is refused by name.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace vesper {

// Move-only; const calls may run side by side.
class SplitPattern {
 public:
  // `source` names the file in messages. Throws an input error for a construct that is not taken.
  SplitPattern(const std::string& pattern, const std::string& source);
  // The pattern that matches `text` and nothing else.
  static SplitPattern literal(const std::string& text, const std::string& source);
  ~SplitPattern();
  SplitPattern(SplitPattern&&) noexcept;
  SplitPattern& operator=(SplitPattern&&) noexcept;
  SplitPattern(const SplitPattern&) = delete;
  SplitPattern& operator=(const SplitPattern&) = delete;

  // Cuts each of `texts`, valid UTF-8, into the matches and what lies between them, in order. Throws an input error
  // where the pattern needs more steps or memory than any sane one does.
  [[nodiscard]] std::vector<std::string_view> split(const std::vector<std::string_view>& texts) const;

 private:
  struct Compiled;
  SplitPattern();
  std::unique_ptr<Compiled> compiled_;
};

// Of GPT-2 (openai/gpt-2, encoder.py), which a ByteLevel pre-tokenizer with use_regex means.
inline constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// Of Llama 3 (meta-llama/llama3, llama/tokenizer.py).
inline constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// Of Qwen2 (transformers, models/qwen2/tokenization_qwen2.py): digits stand alone.
inline constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

}  // namespace vesper
