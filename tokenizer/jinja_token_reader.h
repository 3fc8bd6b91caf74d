// Walks over the tokens of a chat template.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/jinja_lexer.h"

namespace vesper::jinja {

// Reading past the end gives the end again. `name` is the template's in messages and outlives this.
class TokenReader {
 public:
  // Real templates nest some ten levels; recursion is as deep as the nesting here and when it runs.
  static constexpr int kMaxDepth = 100;

  // One more level of nesting for as long as it lives. Throws an input error beyond kMaxDepth.
  class Level {
   public:
    explicit Level(TokenReader& reader) : reader_(reader) {
      if (++reader_.depth_ > kMaxDepth) reader_.too_deep();
    }
    ~Level() { --reader_.depth_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;
    Level(Level&&) = delete;
    Level& operator=(Level&&) = delete;

   private:
    TokenReader& reader_;
  };

  TokenReader(std::vector<Token> tokens, const std::string& name) : tokens_(std::move(tokens)), name_(name) {}

  [[nodiscard]] const Token& token(std::size_t ahead = 0) const;
  Token next();
  [[nodiscard]] bool is_operator(std::string_view text, std::size_t ahead = 0) const;
  [[nodiscard]] bool is_name(std::string_view text, std::size_t ahead = 0) const;
  // Whether the token was the one wanted, which is then behind us.
  bool skip_operator(std::string_view text) { return is_operator(text) && (next(), true); }
  bool skip_name(std::string_view text) { return is_name(text) && (next(), true); }
  // The same for what must be there.
  void expect_operator(std::string_view text);
  void expect_name(std::string_view text);
  void expect(TokenKind kind, const std::string& expected);
  // A name that is no word of the language.
  std::string variable_name();

  // Input errors at the line of the token that comes next.
  [[noreturn]] void stop(const std::string& found, const std::string& expected) const;
  [[noreturn]] void unexpected(const std::string& expected) const;  // found: that token
  [[noreturn]] void too_deep() const;

 private:
  std::vector<Token> tokens_;
  const std::string& name_;
  std::size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace vesper::jinja
