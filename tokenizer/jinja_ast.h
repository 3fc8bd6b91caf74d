// A parsed chat template.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/jinja_value.h"

namespace vesper::jinja {

enum class ExprKind : std::uint8_t {
  kConstant,   // constant
  kName,       // name
  kList,       // parts; tuples too
  kDict,       // parts: key, value, key, value, ...
  kAttribute,  // parts[0].name
  kItem,       // parts[0][parts[1]]
  kSlice,      // parts[0][parts[1]:parts[2]:parts[3]], of which the last three may be null
  kCall,       // parts[0](parts[1], ..., named)
  kFilter,     // parts[0] | name(parts[1], ..., named)
  kTest,       // parts[0] is name(parts[1], ..., named)
  kNot,        // not parts[0]
  kNegate,     // -parts[0]
  kPlus,       // +parts[0]
  kBinary,     // parts[0] operators[0] parts[1]: arithmetic
  kConcat,     // parts joined by ~
  kCompare,    // parts[0] operators[0] parts[1] operators[1] parts[2] ..., as Python chains them
  kAnd,        // parts[0] and parts[1]
  kOr,         // parts[0] or parts[1]
  kChoice,     // parts[0] if parts[1] else parts[2], which may be null
};

enum class Operator : std::uint8_t {
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kFloorDivide,
  kModulo,
  kPower,
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kIn,
  kNotIn,
};

struct Expr {
  ExprKind kind = ExprKind::kConstant;
  int line = 0;
  int depth = 1;  // of the tree below, itself included
  std::string name;
  Value constant;
  std::vector<const Expr*> parts;
  std::vector<std::pair<std::string, const Expr*>> named;
  std::vector<Operator> operators;
};

enum class StatementKind : std::uint8_t {
  kText,      // text
  kPrint,     // {{ value }}
  kSet,       // {% set targets = value %}
  kSetBlock,  // {% set targets[0] %}body{% endset %}
  kFor,       // {% for targets in value if condition %}body{% else %}otherwise{% endfor %}
  kIf,        // branches, then otherwise
  kMacro,     // {% macro text(parameters) %}body{% endmacro %}
  kBlock,     // body: {% generation %}, which only marks training data
  kBreak,
  kContinue,
};

// What set and for assign to: a variable, or a namespace's attribute.
struct Target {
  std::string name;
  std::string attribute;  // empty: the variable itself
};

struct Statement {
  StatementKind kind = StatementKind::kText;
  int line = 0;
  ChatText text;
  bool unpacks = false;  // "a, b = pair", even where it is "a, = one"
  std::vector<Target> targets;
  const Expr* value = nullptr;
  const Expr* condition = nullptr;
  std::vector<Statement> body;
  std::vector<Statement> otherwise;
  std::vector<std::pair<const Expr*, std::vector<Statement>>> branches;
  std::vector<std::pair<std::string, const Expr*>> parameters;  // with their defaults, null for none
};

// Owns what the statements point to. Flat, so that no depth of a hostile template is too deep to destroy.
struct Program {
  std::vector<Statement> statements;
  std::deque<Expr> expressions;
  std::deque<ChatText> texts;
};

}  // namespace vesper::jinja
