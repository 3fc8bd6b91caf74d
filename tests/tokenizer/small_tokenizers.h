// Tokenizers of a few pieces, and a folder to load them from.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "engine/core/error.h"

namespace vesper {

// The message of the input error that `call` throws; "" where it throws none.
inline std::string refusal_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput) << error.what();
    return error.what();
  }
  return "";
}

// A folder of its own for each test; gone with this.
class ScratchFolder {
 public:
  ScratchFolder() {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    path_ = std::filesystem::path(testing::TempDir()) /
            ("vesper_" + std::string(test->test_suite_name()) + "_" + test->name());
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~ScratchFolder() { std::filesystem::remove_all(path_); }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  [[nodiscard]] std::string path() const { return path_.string(); }
  void write(const std::string& name, std::string_view content) const {
    std::ofstream(path_ / name, std::ios::binary | std::ios::trunc) << content;
  }

 private:
  std::filesystem::path path_;
};

// The character that stands for a byte in byte-level vocabularies.
inline std::string byte_character(int byte) {
  const auto printable = [](int b) { return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE; };
  int code = byte;
  if (!printable(byte)) {
    code = 0x100;
    for (int b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
  }
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

// Byte-level, split as GPT-2 splits. Ids 0 to 255 are the bytes; then "ab", "abc", " a", " ab", "bc", "a ", "  ".
inline nlohmann::json byte_level_json() {
  nlohmann::json vocab;
  for (int byte = 0; byte < 256; ++byte) vocab[byte_character(byte)] = byte;
  int id = 256;
  for (const char* piece : {"ab", "abc", "\u0120a", "\u0120ab", "bc", "a\u0120", "\u0120\u0120"}) vocab[piece] = id++;
  nlohmann::json document;
  document["added_tokens"] = nlohmann::json::array();
  document["normalizer"] = nullptr;
  document["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  document["post_processor"] = nullptr;
  document["decoder"] = {{"type", "ByteLevel"}};
  document["model"] = {{"type", "BPE"}, {"vocab", vocab}};
  document["model"]["merges"] = {"a b", "ab c", "\u0120 a", "\u0120a b", "b c", "a \u0120", "\u0120 \u0120"};
  return document;
}

// As Llama 2's: marks for spaces, byte fallback for three bytes (those of U+20AC), BOS in front. Ids: <unk> <s> </s>
// <0xE2> <0x82> <0xAC>, then "▁" "a" "b" "▁a" "ab" "▁ab" "c" "d".
inline nlohmann::json marked_json() {
  nlohmann::json vocab;
  int id = 0;
  for (const char* piece : {"<unk>", "<s>", "</s>", "<0xE2>", "<0x82>", "<0xAC>", "\u2581", "a", "b", "\u2581a", "ab",
                            "\u2581ab", "c", "d"}) {
    vocab[piece] = id++;
  }
  nlohmann::json document;
  document["added_tokens"] = nlohmann::json::array();
  for (const char* content : {"<unk>", "<s>", "</s>"}) {
    document["added_tokens"].push_back({{"id", vocab[content]}, {"content", content}, {"special", true}});
  }
  const nlohmann::json prepend = {{"type", "Prepend"}, {"prepend", "\u2581"}};
  const nlohmann::json replace = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}};
  document["normalizer"] = {{"type", "Sequence"}, {"normalizers", {prepend, replace}}};
  document["pre_tokenizer"] = nullptr;
  document["post_processor"]["type"] = "TemplateProcessing";
  document["post_processor"]["single"] = {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
                                          {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}};
  document["post_processor"]["special_tokens"]["<s>"] = {{"id", "<s>"}, {"ids", {1}}, {"tokens", {"<s>"}}};
  const nlohmann::json back = {{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}};
  const nlohmann::json strip = {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}};
  document["decoder"]["type"] = "Sequence";
  document["decoder"]["decoders"] = {back, {{"type", "ByteFallback"}}, {{"type", "Fuse"}}, strip};
  document["model"] = {
      {"type", "BPE"}, {"unk_token", "<unk>"}, {"byte_fallback", true}, {"fuse_unk", true}, {"vocab", vocab}};
  document["model"]["merges"] = {"a b", "\u2581 a", "\u2581 ab", "\u2581a b"};
  return document;
}

// 128000 pieces in tiktoken's text: the bytes, "ab", and numbers.
inline std::string tiktoken_text() {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  auto add = [&, rank = 0](const std::string& piece) mutable {
    for (std::size_t at = 0; at < piece.size(); at += 3) {
      std::uint32_t bits = 0;
      for (std::size_t i = 0; i < 3; ++i) {
        bits = bits << 8U | (at + i < piece.size() ? static_cast<unsigned char>(piece[at + i]) : 0U);
      }
      for (std::size_t i = 0; i < 4; ++i) text += at + i > piece.size() ? '=' : kDigits[bits >> (18 - 6 * i) & 63U];
    }
    text.append(" ").append(std::to_string(rank++)).append("\n");
  };
  for (int byte = 0; byte < 256; ++byte) add(std::string(1, static_cast<char>(byte)));
  add("ab");
  for (int i = 257; i < 128000; ++i) add(std::to_string(i));
  return text;
}

}  // namespace vesper
