#include "tokenizer/tiktoken_file.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "tokenizer/bpe_tokenizer.h"
#include "tokenizer/vocab_and_merges.h"

namespace vesper {
namespace {

constexpr std::string_view kBase64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
constexpr int kLlama3Pieces = 128000;
constexpr int kLlama3SpecialTokens = 256;

// The bytes; nothing where the text is not whole base64 with its padding.
std::optional<std::string> from_base64(std::string_view text) {
  if (text.empty() || text.size() % 4 != 0) return std::nullopt;
  const std::size_t padding = text.ends_with("==") ? 2 : (text.ends_with('=') ? 1 : 0);
  std::string bytes;
  std::uint32_t bits = 0;
  unsigned held = 0;
  for (const char c : text.substr(0, text.size() - padding)) {
    const std::size_t digit = kBase64.find(c);
    if (digit == std::string_view::npos) return std::nullopt;
    bits = bits << 6U | static_cast<std::uint32_t>(digit);
    held += 6;
    if (held < 8) continue;
    held -= 8;
    bytes += static_cast<char>(bits >> held);
    bits &= (1U << held) - 1U;
  }
  return bits == 0 ? std::optional(bytes) : std::nullopt;  // what is left is padding
}

// meta-llama/llama3, llama/tokenizer.py: ten with names and reserved ones between and behind them.
std::vector<AddedToken> llama3_special_tokens() {
  std::vector<std::string> names = {"<|begin_of_text|>",
                                    "<|end_of_text|>",
                                    "<|reserved_special_token_0|>",
                                    "<|reserved_special_token_1|>",
                                    "<|reserved_special_token_2|>",
                                    "<|reserved_special_token_3|>",
                                    "<|start_header_id|>",
                                    "<|end_header_id|>",
                                    "<|reserved_special_token_4|>",
                                    "<|eot_id|>"};
  for (int i = 5; static_cast<int>(names.size()) < kLlama3SpecialTokens; ++i) {
    names.push_back("<|reserved_special_token_" + std::to_string(i) + "|>");
  }
  std::vector<AddedToken> tokens;
  for (const std::string& name : names) {
    AddedToken token;
    token.id = kLlama3Pieces + static_cast<int>(tokens.size());
    token.content = name;
    token.special = true;
    tokens.push_back(std::move(token));
  }
  return tokens;
}

}  // namespace

bool is_tiktoken_text(std::string_view bytes) {
  const std::size_t piece = std::min(bytes.find_first_not_of(kBase64), bytes.size());
  const std::size_t space = std::min(bytes.find_first_not_of('=', piece), bytes.size());
  return piece > 0 && space + 1 < bytes.size() && bytes[space] == ' ' && bytes[space + 1] >= '0' &&
         bytes[space + 1] <= '9';
}

Vocabulary read_tiktoken_ranks(std::string_view text, const std::string& source) {
  std::vector<std::string> pieces;
  int number = 0;
  while (!text.empty()) {
    ++number;
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    if (line.empty()) continue;
    const std::size_t space = std::min(line.find(' '), line.size());
    const std::optional<std::string> piece = from_base64(line.substr(0, space));
    const std::string_view digits = line.substr(std::min(space + 1, line.size()));
    int rank = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    if (!piece || error != std::errc() || end != digits.data() + digits.size()) {
      refuse({"reading " + source + ", line " + std::to_string(number), in_quotes(line),
              "a piece in base64, a space and its rank", "copy or download the file again"});
    }
    place_piece(pieces, rank, *piece, source);
  }
  return {std::move(pieces), source};
}

std::unique_ptr<Tokenizer> load_tiktoken(const std::string& path, const TokenizerFolder& folder) {
  Vocabulary vocabulary = read_tiktoken_ranks(read_tokenizer_file(path), path);
  if (vocabulary.size() != kLlama3Pieces) {
    refuse({"reading " + path, "a tiktoken vocabulary of " + std::to_string(vocabulary.size()) + " pieces",
            std::to_string(kLlama3Pieces) + ", those of Llama 3: how others split texts is not in the file",
            "put the model's tokenizer.json into the folder"});
  }
  BpeTokenizerParts parts;
  parts.format = "tiktoken BPE";
  parts.path = path;
  parts.unread = folder.unread;
  parts.splits.emplace_back(kLlama3Pattern, path);
  const bool listed =
      std::any_of(folder.added.begin(), folder.added.end(), [](const auto& token) { return token.id >= 0; });
  parts.added =
      place_added_tokens(listed ? std::vector<AddedToken>() : llama3_special_tokens(), vocabulary, folder, path);
  const auto name = [](const std::string& named, const char* otherwise) { return named.empty() ? otherwise : named; };
  parts.bos_id = named_token(name(folder.bos, "<|begin_of_text|>"), "bos_token", vocabulary, parts.added, folder);
  parts.eos_id = named_token(name(folder.eos, "<|end_of_text|>"), "eos_token", vocabulary, parts.added, folder);
  parts.adds_bos = folder.adds_bos.value_or(true);
  const std::vector<Merge> merges = merges_of_ranks(vocabulary);
  BpeOptions options;
  options.bytes = true;
  options.ignore_merges = true;
  return make_bpe_tokenizer(Bpe(std::move(vocabulary), merges, options), std::move(parts));
}

}  // namespace vesper
