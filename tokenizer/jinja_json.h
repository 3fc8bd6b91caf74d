// tojson, as transformers gives it to chat templates.
#pragma once

#include "tokenizer/jinja_rendering.h"

namespace vesper::jinja {

// json.dumps(value, ensure_ascii=False, indent=indent): no HTML escapes, keys in their order, ", " and ": " between
// (with an indent "," and new lines). `indent` is none or the spaces of a level.
Value to_json(Rendering& rendering, const Value& value, const Value& indent);

}  // namespace vesper::jinja
