#include "tokenizer/jinja_eval.h"

#include <string_view>

#include "engine/core/json.h"
#include "tokenizer/jinja_filters.h"
#include "tokenizer/jinja_methods.h"
#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_tests.h"

namespace vesper::jinja {
namespace {

// Variables of the template, of one round of a loop, or of one call of a macro. Reading looks outwards, setting stays.
class Scope {
 public:
  explicit Scope(const Scope* outer) : outer_(outer) {}

  // nullptr where no scope has the name.
  [[nodiscard]] const Value* find(Rendering& rendering, std::string_view name) const {
    for (const Scope* scope = this; scope != nullptr; scope = scope->outer_) {
      rendering.work(scope->variables_.size());
      for (const auto& [known, value] : scope->variables_) {
        if (known == name) return &value;
      }
    }
    return nullptr;
  }

  // `name` outlives the scope.
  void set(Rendering& rendering, std::string_view name, Value value) {
    rendering.work(variables_.size());
    for (auto& [known, old] : variables_) {
      if (known != name) continue;
      old = value;
      return;
    }
    variables_.emplace_back(name, value);
  }

  [[nodiscard]] bool is_global() const { return outer_ == nullptr; }

 private:
  const Scope* outer_;
  std::vector<std::pair<std::string_view, Value>> variables_;
};

enum class Flow : std::uint8_t { kOn, kBreak, kContinue };

class Evaluator {
 public:
  Evaluator(Rendering& rendering, const Variables& variables) : rendering_(rendering), global_(nullptr) {
    for (const auto& [name, value] : variables) global_.set(rendering, name, value);
  }

  ChatText run(const std::vector<Statement>& statements) {
    (void)execute(statements, global_);
    return std::move(out_);
  }

 private:
  // One more thing inside of others, at its line.
  class Inside {
   public:
    Inside(Rendering& rendering, int line) : rendering_(rendering) {
      rendering.at_line(line);
      rendering.enter();
      rendering.work(Rendering::kStep);
    }
    ~Inside() { rendering_.leave(); }
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;
    Inside(Inside&&) = delete;
    Inside& operator=(Inside&&) = delete;

   private:
    Rendering& rendering_;
  };

  // --- statements

  Flow execute(const std::vector<Statement>& statements, Scope& scope) {
    for (const Statement& statement : statements) {
      const Flow flow = execute(statement, scope);
      if (flow != Flow::kOn) return flow;
    }
    return Flow::kOn;
  }

  Flow execute(const Statement& statement, Scope& scope) {
    const Inside inside(rendering_, statement.line);
    switch (statement.kind) {
      case StatementKind::kText:
        rendering_.append(out_, statement.text);
        return Flow::kOn;
      case StatementKind::kPrint:
        rendering_.append(out_, printed(rendering_, evaluate(*statement.value, scope)));
        return Flow::kOn;
      case StatementKind::kSet:
        assign(statement, evaluate(*statement.value, scope), scope);
        return Flow::kOn;
      case StatementKind::kSetBlock:
        assign(statement, captured(statement.body, scope), scope);
        return Flow::kOn;
      case StatementKind::kFor:
        return loop(statement, scope);
      case StatementKind::kIf:
        for (const auto& [condition, body] : statement.branches) {
          if (is_true(evaluate(*condition, scope))) return execute(body, scope);
        }
        return execute(statement.otherwise, scope);
      case StatementKind::kMacro:
        // Its free names are those of the template: inside of a loop they would be others.
        if (!scope.is_global()) rendering_.stop("a macro inside of a loop or a macro", "one outside of both");
        scope.set(rendering_, statement.text.bytes(), &statement);
        return Flow::kOn;
      case StatementKind::kBlock: {
        Scope inner(&scope);
        return execute(statement.body, inner);
      }
      case StatementKind::kBreak:
        return Flow::kBreak;
      case StatementKind::kContinue:
        break;
    }
    return Flow::kContinue;
  }

  // What the statements print, as a text.
  Value captured(const std::vector<Statement>& body, const Scope& scope) {
    ChatText outer = std::exchange(out_, {});
    Scope inner(&scope);
    (void)execute(body, inner);
    return rendering_.keep(std::exchange(out_, std::move(outer)));
  }

  void assign(const Statement& statement, const Value& value, Scope& scope) {
    rendering_.at_line(statement.line);
    if (!statement.unpacks) return assign(statement.targets[0], value, scope);
    const List values = items_of(rendering_, value);
    if (values.items.size() != statement.targets.size()) {
      rendering_.stop(
          std::to_string(values.items.size()) + " values for " + std::to_string(statement.targets.size()) + " names",
          "as many of one as of the other");
    }
    for (std::size_t i = 0; i < values.items.size(); ++i) assign(statement.targets[i], values.items[i], scope);
  }

  void assign(const Target& target, const Value& value, Scope& scope) {
    if (target.attribute.empty()) return scope.set(rendering_, target.name, value);
    const Value* space = scope.find(rendering_, target.name);
    const auto* attributes = space == nullptr ? nullptr : std::get_if<Namespace*>(space);
    if (attributes == nullptr) {
      rendering_.stop("the attribute " + in_quotes(target.attribute) + " set on " + in_quotes(target.name),
                      "a namespace there");
    }
    rendering_.take(sizeof(ChatText) + sizeof(Value));
    rendering_.work((*attributes)->attributes.entries.size());
    (*attributes)->attributes.set(ChatText::of_template(target.attribute), value);
  }

  Flow loop(const Statement& statement, Scope& scope) {
    List items = items_of(rendering_, evaluate(*statement.value, scope));
    if (statement.condition != nullptr) {
      List kept;
      for (const Value& item : items.items) {
        Scope round(&scope);
        assign(statement, item, round);
        if (is_true(evaluate(*statement.condition, round))) kept.items.push_back(item);
      }
      items = std::move(kept);
    }
    if (items.items.empty()) return execute(statement.otherwise, scope);
    const List& all = *std::get<const List*>(rendering_.list(std::move(items)));
    Loop* state = rendering_.make_loop(all);
    for (; state->index0 < all.items.size(); ++state->index0) {
      Scope round(&scope);
      round.set(rendering_, "loop", static_cast<const Loop*>(state));
      assign(statement, all.items[state->index0], round);
      if (execute(statement.body, round) == Flow::kBreak) break;
    }
    return Flow::kOn;
  }

  // --- expressions

  Value evaluate(const Expr& expr, const Scope& scope) {
    const Inside inside(rendering_, expr.line);
    const Value value = value_of(expr, scope);
    rendering_.at_line(expr.line);
    return value;
  }

  Value part(const Expr& expr, std::size_t i, const Scope& scope) { return evaluate(*expr.parts[i], scope); }
  // The same, with none for a part that was left out.
  Value part_or_none(const Expr& expr, std::size_t i, const Scope& scope) {
    return expr.parts[i] == nullptr ? Value(None{}) : part(expr, i, scope);
  }

  Value value_of(const Expr& expr, const Scope& scope) {
    switch (expr.kind) {
      case ExprKind::kConstant:
        return expr.constant;
      case ExprKind::kName: {
        const Value* found = scope.find(rendering_, expr.name);
        return found != nullptr ? *found : builtin_named(expr.name);
      }
      case ExprKind::kList:
        return list(expr, scope);
      case ExprKind::kDict:
        return dict(expr, scope);
      case ExprKind::kAttribute:
        return attribute_of(expr, scope);
      case ExprKind::kItem: {
        const Value value = part(expr, 0, scope);
        return item(rendering_, value, part(expr, 1, scope));
      }
      case ExprKind::kSlice: {
        const Value value = part(expr, 0, scope);
        const Value first = part_or_none(expr, 1, scope);
        const Value last = part_or_none(expr, 2, scope);
        return slice(rendering_, value, first, last, part_or_none(expr, 3, scope));
      }
      case ExprKind::kCall:
        return call(expr, scope);
      case ExprKind::kFilter: {
        const Value value = part(expr, 0, scope);
        return run_filter(rendering_, expr.name, value, arguments(expr, scope));
      }
      case ExprKind::kTest: {
        const Value value = part(expr, 0, scope);
        return run_test(rendering_, expr.name, value, arguments(expr, scope));
      }
      case ExprKind::kChoice:
        if (is_true(part(expr, 1, scope))) return part(expr, 0, scope);
        return expr.parts[2] == nullptr ? Value(Undefined{"an if without else"}) : part(expr, 2, scope);
      default:
        return operation(expr, scope);
    }
  }

  Value operation(const Expr& expr, const Scope& scope) {
    switch (expr.kind) {
      case ExprKind::kNot:
        return !is_true(part(expr, 0, scope));
      case ExprKind::kNegate:
        return arithmetic(rendering_, Operator::kSubtract, std::int64_t{0}, part(expr, 0, scope));
      case ExprKind::kPlus:
        return arithmetic(rendering_, Operator::kAdd, std::int64_t{0}, part(expr, 0, scope));
      case ExprKind::kBinary: {
        const Value left = part(expr, 0, scope);
        const Value right = part(expr, 1, scope);
        rendering_.at_line(expr.line);
        return arithmetic(rendering_, expr.operators[0], left, right);
      }
      case ExprKind::kConcat: {
        ChatText text;
        for (std::size_t i = 0; i < expr.parts.size(); ++i) {
          rendering_.append(text, printed(rendering_, part(expr, i, scope)));
        }
        return rendering_.keep(std::move(text));
      }
      case ExprKind::kCompare:
        return comparison(expr, scope);
      case ExprKind::kAnd: {
        const Value left = part(expr, 0, scope);
        return is_true(left) ? part(expr, 1, scope) : left;
      }
      default: {  // or
        const Value left = part(expr, 0, scope);
        return is_true(left) ? left : part(expr, 1, scope);
      }
    }
  }

  Value comparison(const Expr& expr, const Scope& scope) {
    Value left = part(expr, 0, scope);
    for (std::size_t i = 0; i < expr.operators.size(); ++i) {
      const Value right = part(expr, i + 1, scope);
      rendering_.at_line(expr.line);
      if (!compare(rendering_, expr.operators[i], left, right)) return false;
      left = right;
    }
    return true;
  }

  Value list(const Expr& expr, const Scope& scope) {
    List items;
    for (std::size_t i = 0; i < expr.parts.size(); ++i) items.items.push_back(part(expr, i, scope));
    return rendering_.list(std::move(items));
  }

  Value dict(const Expr& expr, const Scope& scope) {
    Dict made;
    for (std::size_t i = 0; i < expr.parts.size(); i += 2) {
      const ChatText& key = text_of(rendering_, part(expr, i, scope), "a key");
      const Value value = part(expr, i + 1, scope);
      rendering_.take(key.size());
      rendering_.work(made.entries.size());
      made.set(key, value);
    }
    return rendering_.dict(std::move(made));
  }

  Value attribute_of(const Expr& expr, const Scope& scope) {
    const Value value = part(expr, 0, scope);
    rendering_.at_line(expr.line);
    if (has_method(value, expr.name)) {
      rendering_.stop("the method " + in_quotes(expr.name) + " without a call", "\"(\" after it");
    }
    return attribute(rendering_, value, expr.name);
  }

  Arguments arguments(const Expr& expr, const Scope& scope) {
    Arguments given;
    for (std::size_t i = 1; i < expr.parts.size(); ++i) given.positional.push_back(part(expr, i, scope));
    for (const auto& [name, value] : expr.named) given.named.emplace_back(name, evaluate(*value, scope));
    rendering_.at_line(expr.line);
    return given;
  }

  Value call(const Expr& expr, const Scope& scope) {
    const Expr& callee = *expr.parts[0];
    if (callee.kind == ExprKind::kAttribute) {
      const Value object = part(callee, 0, scope);
      if (has_method(object, callee.name)) {
        return run_method(rendering_, object, callee.name, arguments(expr, scope));
      }
      const Value found = attribute(rendering_, object, callee.name);
      if (std::holds_alternative<Undefined>(found)) {
        rendering_.stop("the method " + in_quotes(callee.name) + " of " + kind_of(object), "a method that is known");
      }
      return call(found, expr, scope);
    }
    return call(evaluate(callee, scope), expr, scope);
  }

  Value call(const Value& callee, const Expr& expr, const Scope& scope) {
    if (const auto* function = std::get_if<Builtin>(&callee)) {
      return run_builtin(rendering_, *function, arguments(expr, scope));
    }
    const auto* macro = std::get_if<const Statement*>(&callee);
    if (macro == nullptr) refuse_kind(rendering_, callee, "what is called", "a function or a macro");
    return call_macro(**macro, arguments(expr, scope));
  }

  Value call_macro(const Statement& macro, const Arguments& given) {
    if (given.positional.size() > macro.parameters.size()) {
      rendering_.stop(std::to_string(given.positional.size()) + " arguments to the macro " + macro.text.bytes(),
                      "at most " + std::to_string(macro.parameters.size()));
    }
    Scope inner(&global_);
    for (const auto& [name, value] : given.named) {
      bool known = false;
      for (std::size_t i = given.positional.size(); i < macro.parameters.size(); ++i) {
        known = known || macro.parameters[i].first == name;
      }
      if (!known) {
        rendering_.stop("the argument " + in_quotes(name) + " to the macro " + macro.text.bytes(),
                        "arguments that it knows, each once");
      }
      inner.set(rendering_, name, value);
    }
    for (std::size_t i = 0; i < macro.parameters.size(); ++i) {
      const auto& [name, fallback] = macro.parameters[i];
      if (i < given.positional.size()) {
        inner.set(rendering_, name, given.positional[i]);
      } else if (!has_named(given, name)) {
        inner.set(rendering_, name, fallback == nullptr ? Value(Undefined{name}) : evaluate(*fallback, inner));
      }
    }
    return captured(macro.body, inner);
  }

  static bool has_named(const Arguments& given, std::string_view name) {
    for (const auto& [known, value] : given.named) {
      if (known == name) return true;
    }
    return false;
  }

  Rendering& rendering_;
  Scope global_;
  ChatText out_;
};

}  // namespace

ChatText run(const Program& program, Rendering& rendering, const Variables& variables) {
  return Evaluator(rendering, variables).run(program.statements);
}

}  // namespace vesper::jinja
