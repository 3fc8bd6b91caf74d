// value | filter(arguments), in chat templates.
#pragma once

#include <string_view>

#include "tokenizer/jinja_call.h"

namespace vesper::jinja {

// Throws an input error for a filter or an argument that is not known.
Value run_filter(Rendering& rendering, std::string_view name, const Value& value, const Arguments& arguments);

// Refuses a change of case where a text has letters beyond ASCII, whose cases need Unicode's tables.
const ChatText& ascii_text(const Rendering& rendering, const ChatText& text, std::string_view what);

// text.replace(old, by, most): most -1 is all.
Value replaced(Rendering& rendering, const ChatText& text, const ChatText& old, const ChatText& by, std::int64_t most);
// by.join(items)
Value joined(Rendering& rendering, const List& items, const ChatText& by);

}  // namespace vesper::jinja
