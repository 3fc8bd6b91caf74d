// What operators and subscripts do with values: Python's rules.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "tokenizer/jinja_ast.h"
#include "tokenizer/jinja_rendering.h"

namespace vesper::jinja {

// "a text", "none", ...: as messages name it.
std::string kind_of(const Value& value);
[[noreturn]] void refuse_undefined(const Rendering& rendering, const Undefined& undefined);
// An input error "found {kind_of(value)} as {role}, expected {expected}"; names an undefined value.
[[noreturn]] void refuse_kind(const Rendering& rendering, const Value& value, const std::string& role,
                              const std::string& expected);

bool is_true(const Value& value);
// The text of a value that must be one.
const ChatText& text_of(const Rendering& rendering, const Value& value, const std::string& role);
std::int64_t integer_of(const Rendering& rendering, const Value& value, const std::string& role);
// Integers and booleans, which count as 0 and 1.
std::optional<std::int64_t> as_integer(const Value& value);

// str(value); nothing for an undefined one. Lists, mappings and the like are refused: no chat prints them.
const ChatText& printed(Rendering& rendering, const Value& value);
// repr of a float: the shortest digits that give the number back.
std::string real_text(double value);

// What `for` goes through: items, keys, characters; nothing for an undefined value.
List items_of(Rendering& rendering, const Value& value);
std::int64_t length_of(Rendering& rendering, const Value& value);

bool equal(Rendering& rendering, const Value& a, const Value& b);
bool compare(Rendering& rendering, Operator op, const Value& a, const Value& b);
Value arithmetic(Rendering& rendering, Operator op, const Value& a, const Value& b);

// value.name and value[key]; what is absent is Undefined{name}. `name` outlives the rendering.
Value attribute(Rendering& rendering, const Value& value, std::string_view name);
Value item(Rendering& rendering, const Value& value, const Value& key);
// value[first:last:step], of which each may be none.
Value slice(Rendering& rendering, const Value& value, const Value& first, const Value& last, const Value& step);

}  // namespace vesper::jinja
