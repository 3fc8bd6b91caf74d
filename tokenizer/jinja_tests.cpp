// Semantics: jinja2 3.1, tests.py.
#include "tokenizer/jinja_tests.h"

#include <algorithm>
#include <array>

#include "tokenizer/jinja_operations.h"

namespace vesper::jinja {
namespace {

template <typename... Types>
bool holds(const Value& value) {
  return (std::holds_alternative<Types>(value) || ...);
}

using Ask = bool (*)(Rendering& rendering, const Value& value);

struct Test {
  std::string_view name;
  Ask ask;
};

constexpr std::array<Test, 16> kTests = {{
    {"boolean", [](Rendering&, const Value& v) { return holds<bool>(v); }},
    {"defined", [](Rendering&, const Value& v) { return !holds<Undefined>(v); }},
    {"even", [](Rendering& r, const Value& v) { return integer_of(r, v, "what is even") % 2 == 0; }},
    {"false", [](Rendering&, const Value& v) { return holds<bool>(v) && !std::get<bool>(v); }},
    {"float", [](Rendering&, const Value& v) { return holds<double>(v); }},
    {"integer", [](Rendering&, const Value& v) { return holds<std::int64_t>(v); }},
    {"iterable",
     [](Rendering&, const Value& v) { return holds<Undefined, const ChatText*, const List*, const Dict*>(v); }},
    {"mapping", [](Rendering&, const Value& v) { return holds<const Dict*>(v); }},
    {"none", [](Rendering&, const Value& v) { return holds<None>(v); }},
    {"number", [](Rendering&, const Value& v) { return holds<bool, std::int64_t, double>(v); }},
    {"odd", [](Rendering& r, const Value& v) { return integer_of(r, v, "what is odd") % 2 != 0; }},
    {"sequence",
     [](Rendering&, const Value& v) { return holds<Undefined, const ChatText*, const List*, const Dict*>(v); }},
    {"string", [](Rendering&, const Value& v) { return holds<const ChatText*>(v); }},
    {"true", [](Rendering&, const Value& v) { return holds<bool>(v) && std::get<bool>(v); }},
    {"undefined", [](Rendering&, const Value& v) { return holds<Undefined>(v); }},
    {"callable", [](Rendering&, const Value& v) { return holds<const Statement*, Builtin>(v); }},
}};

struct Comparison {
  std::string_view name;
  Operator op;
};

constexpr std::array<Comparison, 16> kComparisons = {{{"==", Operator::kEqual},
                                                      {"eq", Operator::kEqual},
                                                      {"equalto", Operator::kEqual},
                                                      {"!=", Operator::kNotEqual},
                                                      {"ne", Operator::kNotEqual},
                                                      {"<", Operator::kLess},
                                                      {"lt", Operator::kLess},
                                                      {"lessthan", Operator::kLess},
                                                      {"<=", Operator::kLessEqual},
                                                      {"le", Operator::kLessEqual},
                                                      {">", Operator::kGreater},
                                                      {"gt", Operator::kGreater},
                                                      {"greaterthan", Operator::kGreater},
                                                      {">=", Operator::kGreaterEqual},
                                                      {"ge", Operator::kGreaterEqual},
                                                      {"in", Operator::kIn}}};

}  // namespace

bool run_test(Rendering& rendering, std::string_view name, const Value& value, const Arguments& arguments) {
  const auto same_name = [name](const auto& row) { return row.name == name; };
  const std::string what = "the test " + std::string(name);
  if (const auto* test = std::find_if(kTests.begin(), kTests.end(), same_name); test != kTests.end()) {
    (void)bound_arguments(rendering, what, arguments, {});
    return test->ask(rendering, value);
  }
  const auto* comparison = std::find_if(kComparisons.begin(), kComparisons.end(), same_name);
  if (comparison == kComparisons.end()) {
    std::vector<std::string_view> known;
    known.reserve(kTests.size() + kComparisons.size());
    for (const Test& test : kTests) known.push_back(test.name);
    for (const Comparison& one : kComparisons) known.push_back(one.name);
    refuse_unknown(rendering, "test", name, known);
  }
  const Bound bound = bound_arguments(rendering, what, arguments, {"other"});
  if (bound[0] == nullptr) rendering.stop(what + " without its argument", "one");
  return compare(rendering, comparison->op, value, *bound[0]);
}

}  // namespace vesper::jinja
