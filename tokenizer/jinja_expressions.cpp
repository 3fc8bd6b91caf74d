// Recursive descent; the grammar and its precedences are those of jinja2 3.1, parser.py.
#include "tokenizer/jinja_expressions.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <utility>

namespace vesper::jinja {
namespace {

struct OperatorName {
  std::string_view text;
  Operator op;
};
constexpr std::array<OperatorName, 7> kArithmetic = {{{"+", Operator::kAdd},
                                                      {"-", Operator::kSubtract},
                                                      {"*", Operator::kMultiply},
                                                      {"/", Operator::kDivide},
                                                      {"//", Operator::kFloorDivide},
                                                      {"%", Operator::kModulo},
                                                      {"**", Operator::kPower}}};
constexpr std::array<OperatorName, 6> kComparisons = {{{"==", Operator::kEqual},
                                                       {"!=", Operator::kNotEqual},
                                                       {"<", Operator::kLess},
                                                       {"<=", Operator::kLessEqual},
                                                       {">", Operator::kGreater},
                                                       {">=", Operator::kGreaterEqual}}};

using Level = TokenReader::Level;

class ExpressionParser {
 public:
  ExpressionParser(TokenReader& reader, Program& program) : reader_(reader), program_(program) {}

  const Expr* choice() {
    const Level level(reader_);
    const Expr* value = disjunction();
    while (reader_.is_name("if")) {
      const int line = reader_.next().line;
      const Expr* condition = disjunction();
      const Expr* otherwise = reader_.skip_name("else") ? choice() : nullptr;
      value = &make(ExprKind::kChoice, line, {value, condition, otherwise});
    }
    return value;
  }

  const Expr* tuple(bool with_choice) {
    const int line = reader_.token().line;
    const auto item = [&] { return with_choice ? choice() : disjunction(); };
    std::vector<const Expr*> items = {item()};
    bool is_tuple = false;
    while (reader_.skip_operator(",")) {
      is_tuple = true;
      if (reader_.is_operator(")") || reader_.token().kind == TokenKind::kBlockEnd ||
          reader_.token().kind == TokenKind::kVariableEnd)
        break;
      items.push_back(item());
    }
    return is_tuple ? &make(ExprKind::kList, line, std::move(items)) : items[0];
  }

 private:
  Expr& make(ExprKind kind, int line, std::vector<const Expr*> parts = {}) {
    Expr& expr = program_.expressions.emplace_back();
    expr.kind = kind;
    expr.line = line;
    expr.parts = std::move(parts);
    for (const Expr* part : expr.parts) count_depth(expr, part);
    return expr;
  }
  void count_depth(Expr& expr, const Expr* part) const {
    if (part == nullptr) return;
    expr.depth = std::max(expr.depth, part->depth + 1);
    if (expr.depth > TokenReader::kMaxDepth) reader_.too_deep();  // a long chain of operators nests too
  }
  const Expr* constant(Value value, int line) {
    Expr& expr = make(ExprKind::kConstant, line);
    expr.constant = value;
    return &expr;
  }
  const ChatText* text(const std::string& bytes) { return &program_.texts.emplace_back(ChatText::of_template(bytes)); }

  const Expr* disjunction() {
    const Expr* left = conjunction();
    while (reader_.is_name("or")) {
      const int line = reader_.next().line;
      left = &make(ExprKind::kOr, line, {left, conjunction()});
    }
    return left;
  }

  const Expr* conjunction() {
    const Expr* left = negation();
    while (reader_.is_name("and")) {
      const int line = reader_.next().line;
      left = &make(ExprKind::kAnd, line, {left, negation()});
    }
    return left;
  }

  const Expr* negation() {
    if (!reader_.is_name("not")) return comparison();
    const Level level(reader_);
    const int line = reader_.next().line;
    return &make(ExprKind::kNot, line, {negation()});
  }

  std::optional<Operator> comparison_operator() {
    for (const auto& [text, op] : kComparisons) {
      if (reader_.skip_operator(text)) return op;
    }
    if (reader_.skip_name("in")) return Operator::kIn;
    if (reader_.is_name("not") && reader_.is_name("in", 1)) {
      reader_.next();
      reader_.next();
      return Operator::kNotIn;
    }
    return std::nullopt;
  }

  const Expr* comparison() {
    const int line = reader_.token().line;
    std::vector<const Expr*> parts = {sum()};
    std::vector<Operator> operators;
    for (std::optional<Operator> op; (op = comparison_operator());) {
      operators.push_back(*op);
      parts.push_back(sum());
    }
    if (operators.empty()) return parts[0];
    Expr& expr = make(ExprKind::kCompare, line, std::move(parts));
    expr.operators = std::move(operators);
    return &expr;
  }

  // left (op right)*, for the arithmetic operators named.
  template <typename Operand>
  const Expr* arithmetic(std::initializer_list<std::string_view> names, const Operand& operand) {
    const Expr* left = operand();
    while (true) {
      const auto known = std::find_if(kArithmetic.begin(), kArithmetic.end(), [&](const OperatorName& name) {
        return reader_.is_operator(name.text) && std::find(names.begin(), names.end(), name.text) != names.end();
      });
      if (known == kArithmetic.end()) return left;
      const int line = reader_.next().line;
      Expr& expr = make(ExprKind::kBinary, line, {left, operand()});
      expr.operators = {known->op};
      left = &expr;
    }
  }

  const Expr* sum() {
    return arithmetic({"+", "-"}, [this] { return concatenation(); });
  }

  const Expr* concatenation() {
    const int line = reader_.token().line;
    std::vector<const Expr*> parts = {product()};
    while (reader_.skip_operator("~")) parts.push_back(product());
    return parts.size() == 1 ? parts[0] : &make(ExprKind::kConcat, line, std::move(parts));
  }

  const Expr* product() {
    return arithmetic({"*", "/", "//", "%"}, [this] { return power(); });
  }
  const Expr* power() {
    return arithmetic({"**"}, [this] { return signed_value(true); });
  }

  const Expr* signed_value(bool with_filters) {
    const Level level(reader_);
    const int line = reader_.token().line;
    const Expr* value = nullptr;
    if (reader_.skip_operator("-")) {
      value = &make(ExprKind::kNegate, line, {signed_value(false)});
    } else if (reader_.skip_operator("+")) {
      value = &make(ExprKind::kPlus, line, {signed_value(false)});
    } else {
      value = primary();
    }
    value = postfix(value);
    return with_filters ? filters(value) : value;
  }

  const Expr* primary() {
    const int line = reader_.token().line;
    switch (reader_.token().kind) {
      case TokenKind::kName: {
        const std::string name = reader_.variable_name();
        if (name == "true" || name == "True") return constant(true, line);
        if (name == "false" || name == "False") return constant(false, line);
        if (name == "none" || name == "None") return constant(None{}, line);
        Expr& expr = make(ExprKind::kName, line);
        expr.name = name;
        return &expr;
      }
      case TokenKind::kString: {
        std::string bytes;
        while (reader_.token().kind == TokenKind::kString) bytes += reader_.next().text;
        return constant(text(bytes), line);
      }
      case TokenKind::kInteger:
        return constant(reader_.next().integer, line);
      case TokenKind::kReal:
        return constant(reader_.next().real, line);
      default:
        break;
    }
    if (reader_.skip_operator("(")) {
      if (reader_.skip_operator(")")) return &make(ExprKind::kList, line);
      const Expr* inner = tuple(/*with_choice=*/true);
      reader_.expect_operator(")");
      return inner;
    }
    if (reader_.skip_operator("[")) return &make(ExprKind::kList, line, expressions_until("]"));
    if (reader_.skip_operator("{")) return dict(line);
    reader_.unexpected("an expression");
  }

  std::vector<const Expr*> expressions_until(std::string_view end) {
    std::vector<const Expr*> items;
    while (!reader_.skip_operator(end)) {
      if (!items.empty()) reader_.expect_operator(",");
      if (reader_.skip_operator(end)) break;
      items.push_back(choice());
    }
    return items;
  }

  const Expr* dict(int line) {
    std::vector<const Expr*> parts;
    while (!reader_.skip_operator("}")) {
      if (!parts.empty()) reader_.expect_operator(",");
      if (reader_.skip_operator("}")) break;
      parts.push_back(choice());
      reader_.expect_operator(":");
      parts.push_back(choice());
    }
    return &make(ExprKind::kDict, line, std::move(parts));
  }

  const Expr* postfix(const Expr* value) {
    while (true) {
      const int line = reader_.token().line;
      if (reader_.skip_operator(".")) {
        if (reader_.token().kind != TokenKind::kName) reader_.unexpected("an attribute's name");
        Expr& expr = make(ExprKind::kAttribute, line, {value});
        expr.name = reader_.next().text;
        value = &expr;
      } else if (reader_.skip_operator("[")) {
        value = subscript(value, line);
      } else if (reader_.is_operator("(")) {
        value = call(value);
      } else {
        return value;
      }
    }
  }

  const Expr* subscript(const Expr* value, int line) {
    const auto bound = [&]() -> const Expr* {
      return reader_.is_operator(":") || reader_.is_operator("]") ? nullptr : choice();
    };
    const Expr* first = bound();
    if (first != nullptr && reader_.skip_operator("]")) return &make(ExprKind::kItem, line, {value, first});
    reader_.expect_operator(":");
    const Expr* last = bound();
    const Expr* step = reader_.skip_operator(":") ? bound() : nullptr;
    reader_.expect_operator("]");
    return &make(ExprKind::kSlice, line, {value, first, last, step});
  }

  void arguments(Expr& expr) {
    reader_.expect_operator("(");
    bool first = true;
    while (!reader_.skip_operator(")")) {
      if (!first) reader_.expect_operator(",");
      first = false;
      if (reader_.skip_operator(")")) break;
      if (reader_.token().kind == TokenKind::kName && reader_.is_operator("=", 1)) {
        const std::string name = reader_.variable_name();
        reader_.next();
        expr.named.emplace_back(name, choice());
        count_depth(expr, expr.named.back().second);
      } else {
        if (!expr.named.empty()) reader_.unexpected("a named argument");
        expr.parts.push_back(choice());  // "*" and "**" are no expressions
        count_depth(expr, expr.parts.back());
      }
    }
  }

  const Expr* call(const Expr* callee) {
    Expr& expr = make(ExprKind::kCall, reader_.token().line, {callee});
    arguments(expr);
    return &expr;
  }

  const Expr* filters(const Expr* value) {
    while (true) {
      const int line = reader_.token().line;
      if (reader_.skip_operator("|")) {
        Expr& expr = make(ExprKind::kFilter, line, {value});
        expr.name = reader_.variable_name();
        if (reader_.is_operator("(")) arguments(expr);
        value = &expr;
      } else if (reader_.skip_name("is")) {
        value = test(value, line);
      } else if (reader_.is_operator("(")) {
        value = call(value);
      } else {
        return value;
      }
    }
  }

  const Expr* test(const Expr* value, int line) {
    const bool negated = reader_.skip_name("not");
    Expr& expr = make(ExprKind::kTest, line, {value});
    if (reader_.is_name("in")) {
      expr.name = reader_.next().text;  // the one reserved word that is a test as well
    } else {
      expr.name = reader_.variable_name();
    }
    const TokenKind kind = reader_.token().kind;
    const bool names_argument = kind == TokenKind::kName && !reader_.is_name("else") && !reader_.is_name("or") &&
                                !reader_.is_name("and") && !reader_.is_name("is") && !reader_.is_name("if") &&
                                !reader_.is_name("not") && !reader_.is_name("in");
    if (reader_.is_operator("(")) {
      arguments(expr);
    } else if (names_argument || kind == TokenKind::kString || kind == TokenKind::kInteger ||
               kind == TokenKind::kReal || reader_.is_operator("[") || reader_.is_operator("{")) {
      const Level level(reader_);
      expr.parts.push_back(postfix(primary()));
      count_depth(expr, expr.parts.back());
    }
    return negated ? &make(ExprKind::kNot, line, {&expr}) : &expr;
  }

  TokenReader& reader_;
  Program& program_;
};

}  // namespace

const Expr* parse_expression(TokenReader& reader, Program& program) {
  return ExpressionParser(reader, program).choice();
}

const Expr* parse_tuple(TokenReader& reader, Program& program, bool with_choice) {
  return ExpressionParser(reader, program).tuple(with_choice);
}

}  // namespace vesper::jinja
