// The arguments of a filter, a test, a method or a function, bound to its parameters.
#pragma once

#include <array>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/jinja_rendering.h"

namespace vesper::jinja {

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string_view, Value>> named;
};

// Names of parameters, in their order; empty names at the end stand for none.
using Parameters = std::array<std::string_view, 3>;

// The arguments by parameter; nullptr where one was not given. Valid as long as the Arguments.
using Bound = std::array<const Value*, 3>;

// Throws an input error for an argument too many, one unknown, or one given twice. `what` is "the filter join", say.
Bound bound_arguments(const Rendering& rendering, const std::string& what, const Arguments& arguments,
                      const Parameters& parameters);

// Refuses what no table knows: "the filter "x"", expected "one of: ...".
[[noreturn]] void refuse_unknown(const Rendering& rendering, const std::string& kind, std::string_view name,
                                 const std::vector<std::string_view>& known);

}  // namespace vesper::jinja
