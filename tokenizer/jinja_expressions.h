// Expressions of a chat template.
#pragma once

#include "tokenizer/jinja_ast.h"
#include "tokenizer/jinja_token_reader.h"

namespace vesper::jinja {

// One expression; its nodes belong to `program`. Throws input errors.
const Expr* parse_expression(TokenReader& reader, Program& program);

// An expression, or several with commas between them: then a list. `with_choice` is false where an "if" after it
// belongs to the statement.
const Expr* parse_tuple(TokenReader& reader, Program& program, bool with_choice = true);

}  // namespace vesper::jinja
