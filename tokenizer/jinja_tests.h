// value is test(argument), in chat templates.
#pragma once

#include <string_view>

#include "tokenizer/jinja_call.h"

namespace vesper::jinja {

// Throws an input error for a test or an argument that is not known.
bool run_test(Rendering& rendering, std::string_view name, const Value& value, const Arguments& arguments);

}  // namespace vesper::jinja
