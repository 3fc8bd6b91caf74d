#include "tokenizer/jinja_lexer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "tokenizer/jinja_text.h"
#include "tokenizer/utf8.h"

namespace vesper::jinja {
namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

bool begins_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

// Longest first.
constexpr std::array<std::string_view, 25> kOperators = {"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                                         "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                                         ">",  "<",  "=",  ".",  ":",  "|",  ","};

// "\r\n" and "\r" become "\n"; one newline at the end goes.
std::string with_plain_newlines(std::string_view source) {
  std::string text;
  text.reserve(source.size());
  for (std::size_t at = 0; at < source.size(); ++at) {
    if (source[at] == '\r') {
      text += '\n';
      if (at + 1 < source.size() && source[at + 1] == '\n') ++at;
    } else {
      text += source[at];
    }
  }
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

class Lexer {
 public:
  Lexer(std::string_view source, const std::string& name) : source_(with_plain_newlines(source)), name_(name) {}

  std::vector<Token> run() {
    while (at_ < source_.size()) {
      const std::size_t tag = next_tag();
      const bool more = tag < source_.size();
      data(tag, more && source_[tag + 1] != '{');
      if (!more) break;
      const char type = source_[tag + 1];
      advance(tag + 2);
      if (at_ < source_.size() && (source_[at_] == '-' || source_[at_] == '+')) advance(at_ + 1);
      if (type == '#') {
        comment();
      } else {
        put(type == '{' ? TokenKind::kVariableBegin : TokenKind::kBlockBegin);
        inside(type == '{' ? "}}" : "%}", type == '{' ? TokenKind::kVariableEnd : TokenKind::kBlockEnd);
      }
    }
    put(TokenKind::kEnd);
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void stop(const std::string& found, const std::string& expected) const {
    refuse({"reading " + name_ + ", line " + std::to_string(line_), found, expected, ""});
  }

  Token& put(TokenKind kind, std::string text = "") {
    tokens_.push_back({kind, line_, std::move(text)});
    return tokens_.back();
  }

  // Moves to `to`, counting lines.
  void advance(std::size_t to) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<std::ptrdiff_t>(at_),
                                         source_.begin() + static_cast<std::ptrdiff_t>(to), '\n'));
    at_ = to;
  }

  [[nodiscard]] std::size_t next_tag() const {
    for (std::size_t at = at_; (at = source_.find('{', at)) != std::string::npos; ++at) {
      const char next = at + 1 < source_.size() ? source_[at + 1] : '\0';
      if (next == '{' || next == '%' || next == '#') return at;
    }
    return source_.size();
  }

  // The text before the tag at `tag`, less what the tag strips.
  void data(std::size_t tag, bool tag_strips_its_line) {
    std::string_view text = std::string_view(source_).substr(at_, tag - at_);
    const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
    if (tag < source_.size() && sign == '-') {
      text = text.substr(0, text.size() - trailing_space(text));
    } else if (tag_strips_its_line && sign != '+') {
      const std::size_t line_begin = text.rfind('\n') + 1;  // npos + 1 is 0
      const bool at_line_begin = line_begin > 0 || line_starting_;
      if (at_line_begin && trailing_space(text.substr(line_begin)) == text.size() - line_begin) {
        text = text.substr(0, line_begin);
      }
    }
    if (!text.empty()) put(TokenKind::kData, std::string(text));
    advance(tag);
  }

  void comment() {
    const std::size_t end = source_.find("#}", at_);
    if (end == std::string::npos) stop("a comment without an end", "\"#}\"");
    const char sign = end > at_ ? source_[end - 1] : '\0';
    close(end + 2, sign, /*trims_newline=*/true);
  }

  // Behind the end of a tag or comment: eats what its sign says.
  void close(std::size_t end, char sign, bool trims_newline) {
    std::size_t to = end;
    if (sign == '-') {
      to += leading_space(std::string_view(source_).substr(to));
    } else if (sign != '+' && trims_newline && to < source_.size() && source_[to] == '\n') {
      ++to;
    }
    line_starting_ = source_[to - 1] == '\n';
    advance(to);
  }

  // The tokens of one tag, up to and with its end.
  void inside(std::string_view end, TokenKind end_kind) {
    std::string brackets;  // the closing ones that are due
    while (true) {
      advance(at_ + leading_space(rest()));
      if (at_ >= source_.size()) stop("a tag without an end", in_quotes(end));
      const bool block = end_kind == TokenKind::kBlockEnd;
      const char sign = source_[at_] == '-' || (block && source_[at_] == '+') ? source_[at_] : '\0';
      const std::size_t signs = sign == '\0' ? 0 : 1;
      if (brackets.empty() && rest().substr(signs).starts_with(end)) {
        put(end_kind);
        return close(at_ + signs + end.size(), sign, block);
      }
      token(brackets);
    }
  }

  void token(std::string& brackets) {
    const char c = source_[at_];
    if (is_digit(c)) return number();
    if (begins_name(c)) {
      std::size_t end = at_ + 1;
      while (end < source_.size() && (begins_name(source_[end]) || is_digit(source_[end]))) ++end;
      put(TokenKind::kName, source_.substr(at_, end - at_));
      return advance(end);
    }
    if (c == '\'' || c == '"') return string(c);
    for (const std::string_view symbol : kOperators) {
      if (!rest().starts_with(symbol)) continue;
      balance(symbol[0], brackets);
      put(TokenKind::kOperator, std::string(symbol));
      return advance(at_ + symbol.size());
    }
    const std::size_t bytes = utf8_step(source_, at_).bytes;
    stop("the character " + in_quotes(rest().substr(0, bytes)) + " in a tag", "a part of an expression");
  }

  void balance(char c, std::string& brackets) const {
    if (c == '(') brackets += ')';
    if (c == '[') brackets += ']';
    if (c == '{') brackets += '}';
    if (c != ')' && c != ']' && c != '}') return;
    if (brackets.empty() || brackets.back() != c) {
      stop(std::string("a \"") + c + "\" that nothing opened", "matching brackets");
    }
    brackets.pop_back();
  }

  void number() {
    std::size_t end = at_;
    const auto digits = [&] {
      while (end < source_.size() && is_digit(source_[end])) ++end;
    };
    const auto digit_at = [&](std::size_t at) { return at < source_.size() && is_digit(source_[at]); };
    digits();
    bool real = false;
    if (end < source_.size() && source_[end] == '.' && digit_at(end + 1)) {
      real = true;
      ++end;
      digits();
    }
    if (end < source_.size() && (source_[end] == 'e' || source_[end] == 'E')) {
      const bool sign = end + 1 < source_.size() && (source_[end + 1] == '-' || source_[end + 1] == '+');
      if (digit_at(end + (sign ? 2 : 1))) {
        real = true;
        end += sign ? 2 : 1;
        digits();
      }
    }
    const char* first = source_.data() + at_;
    const char* last = source_.data() + end;
    Token& token = put(real ? TokenKind::kReal : TokenKind::kInteger);
    const std::errc error =
        real ? std::from_chars(first, last, token.real).ec : std::from_chars(first, last, token.integer).ec;
    const bool octal = !real && *first == '0' && std::any_of(first, last, [](char c) { return c != '0'; });
    const bool glued = end < source_.size() && begins_name(source_[end]);  // 0x10, 1_000, 2nd
    if (error != std::errc() || octal || glued) {
      stop("the number " + in_quotes({first, last + (glued ? 1 : 0)}), "a decimal number that 64 bits hold");
    }
    advance(end);
  }

  void string(char quote) {
    std::size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) stop("a string without an end", std::string("a closing ") + quote);
    put(TokenKind::kString, unescaped(std::string_view(source_).substr(at_ + 1, end - at_ - 1)));
    advance(end + 1);
  }

  // Python's escapes (unicode-escape); one that it does not know stands for itself.
  std::string unescaped(std::string_view text) {
    constexpr std::string_view kLetters = "\\'\"abfnrtv";
    constexpr std::string_view kMeanings = "\\'\"\a\b\f\n\r\t\v";
    std::string out;
    for (std::size_t at = 0; at < text.size(); ++at) {
      if (text[at] != '\\') {
        out += text[at];
        continue;
      }
      const char c = text[++at];  // string() has seen to it that one follows
      const std::size_t letter = kLetters.find(c);
      if (letter != std::string_view::npos) {
        out += kMeanings[letter];
      } else if (c == 'x' || c == 'u' || c == 'U') {
        const std::size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        out += code_point(text.substr(at + 1, digits), digits, 16);
        at += digits;
      } else if (c >= '0' && c <= '7') {
        std::size_t digits = 1;
        while (digits < 3 && at + digits < text.size() && text[at + digits] >= '0' && text[at + digits] <= '7') {
          ++digits;
        }
        out += code_point(text.substr(at, digits), digits, 8);
        at += digits - 1;
      } else if (c == 'N') {
        stop("the escape \"\\N\" in a string", "characters by number (\\u) or as they are");
      } else if (c != '\n') {
        out += '\\';
        out += c;
      }
    }
    return out;
  }

  std::string code_point(std::string_view digits, std::size_t expected, int base) {
    std::uint32_t code = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, base);
    const bool whole = error == std::errc() && end == digits.data() + digits.size() && digits.size() == expected;
    std::string text = whole ? utf8_of(code) : "";
    if (text.empty()) stop("the escape of " + in_quotes(digits) + " in a string", "a character's number");
    return text;
  }

  [[nodiscard]] std::string_view rest() const { return std::string_view(source_).substr(at_); }

  std::string source_;
  const std::string& name_;
  std::size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // the tag before ended with a newline that it ate
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source, const std::string& name) {
  return Lexer(source, name).run();
}

}  // namespace vesper::jinja
