// Runs a parsed chat template.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tokenizer/jinja_ast.h"
#include "tokenizer/jinja_rendering.h"

namespace vesper::jinja {

// What the template finds defined, by name.
using Variables = std::vector<std::pair<std::string, Value>>;

// The text that `program` gives for `variables`, whose values belong to `rendering`. Semantics of jinja2's sandbox as
// transformers sets it up; what differs is refused, never rendered otherwise. Throws input errors with the line.
ChatText run(const Program& program, Rendering& rendering, const Variables& variables);

}  // namespace vesper::jinja
