// A chat template as a program.
#pragma once

#include <string>
#include <string_view>

#include "tokenizer/jinja_ast.h"

namespace vesper::jinja {

// Parses the part of Jinja that chat templates use: set (also of a block), for, if, macro, generation, break, continue;
// expressions as in jinja2 3.1. Anything else is an input error that names it and the line. `name` is the source's name
// in messages. Nesting is limited to 100 levels.
Program parse(std::string_view source, const std::string& name);

}  // namespace vesper::jinja
