// text.method(...), mapping.method(...), and the functions that templates find.
#pragma once

#include <string_view>

#include "tokenizer/jinja_call.h"

namespace vesper::jinja {

// Whether a call of value.name is a method's: of a text or a mapping, for which Python prefers methods to keys.
bool has_method(const Value& value, std::string_view name);

// Throws an input error for an unknown argument. has_method(value, name) must hold.
Value run_method(Rendering& rendering, const Value& value, std::string_view name, const Arguments& arguments);

// The function of this name, or Undefined{name}.
Value builtin_named(std::string_view name);
Value run_builtin(Rendering& rendering, Builtin function, const Arguments& arguments);

}  // namespace vesper::jinja
