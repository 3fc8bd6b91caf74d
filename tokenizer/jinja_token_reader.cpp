#include "tokenizer/jinja_token_reader.h"

#include <algorithm>
#include <array>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper::jinja {
namespace {

constexpr std::array<std::string_view, 8> kReserved = {"and", "or", "not", "is", "in", "if", "else", "elif"};

std::string described(const Token& token) {
  switch (token.kind) {
    case TokenKind::kEnd:
      return "the end of the template";
    case TokenKind::kData:
      return "text";
    case TokenKind::kVariableBegin:
      return "\"{{\"";
    case TokenKind::kVariableEnd:
      return "\"}}\"";
    case TokenKind::kBlockBegin:
      return "\"{%\"";
    case TokenKind::kBlockEnd:
      return "\"%}\"";
    case TokenKind::kInteger:
    case TokenKind::kReal:
      return "a number";
    case TokenKind::kString:
      return "the string " + in_quotes(token.text);
    case TokenKind::kName:
    case TokenKind::kOperator:
      break;
  }
  return in_quotes(token.text);
}

}  // namespace

const Token& TokenReader::token(std::size_t ahead) const {
  return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
}

Token TokenReader::next() {
  return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_];
}

bool TokenReader::is_operator(std::string_view text, std::size_t ahead) const {
  return token(ahead).kind == TokenKind::kOperator && token(ahead).text == text;
}

bool TokenReader::is_name(std::string_view text, std::size_t ahead) const {
  return token(ahead).kind == TokenKind::kName && token(ahead).text == text;
}

void TokenReader::expect_operator(std::string_view text) {
  if (!skip_operator(text)) unexpected(in_quotes(text));
}

void TokenReader::expect_name(std::string_view text) {
  if (!skip_name(text)) unexpected(in_quotes(text));
}

void TokenReader::expect(TokenKind kind, const std::string& expected) {
  if (token().kind != kind) unexpected(expected);
  next();
}

std::string TokenReader::variable_name() {
  const bool reserved = std::find(kReserved.begin(), kReserved.end(), token().text) != kReserved.end();
  if (token().kind != TokenKind::kName || reserved) unexpected("a name");
  return next().text;
}

void TokenReader::stop(const std::string& found, const std::string& expected) const {
  refuse({"reading " + name_ + ", line " + std::to_string(token().line), found, expected, ""});
}

void TokenReader::unexpected(const std::string& expected) const {
  stop(described(token()), expected);
}

void TokenReader::too_deep() const {
  stop("nesting deeper than " + std::to_string(kMaxDepth) + " levels", "a flatter template");
}

}  // namespace vesper::jinja
