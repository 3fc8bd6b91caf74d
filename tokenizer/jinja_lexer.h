// A chat template as tokens.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace vesper::jinja {

enum class TokenKind : std::uint8_t {
  kData,  // text outside of tags
  kVariableBegin,
  kVariableEnd,
  kBlockBegin,
  kBlockEnd,
  kName,
  kString,
  kInteger,
  kReal,
  kOperator,
  kEnd,
};

struct Token {
  TokenKind kind = TokenKind::kEnd;
  int line = 0;
  std::string text;  // data, a name, a string without quotes and escapes, an operator
  std::int64_t integer = 0;
  double real = 0.0;
};

// The tokens of `source`, the last of kind kEnd. Whitespace control as transformers sets it for chat templates:
// trim_blocks (the newline after a block or a comment goes), lstrip_blocks (so do spaces between the start of a line
// and a block or comment), "-" and "+" beside the delimiters; one newline at the end of the source goes too. Rules:
// jinja2 3.1, lexer.py; settings: transformers, utils/chat_template_utils.py. Throws input errors that name `name` and
// the line.
std::vector<Token> tokenize(std::string_view source, const std::string& name);

}  // namespace vesper::jinja
