// Semantics: jinja2 3.1, filters.py, and tojson as transformers replaces it.
#include "tokenizer/jinja_filters.h"

#include <algorithm>

#include "tokenizer/jinja_json.h"
#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_tests.h"
#include "tokenizer/jinja_text.h"

namespace vesper::jinja {
namespace {

using Run = Value (*)(Rendering& rendering, const Value& value, const Bound& arguments);

struct Filter {
  std::string_view name;
  Parameters parameters;
  Run run;
};

bool is_undefined(const Value& value) {
  return std::holds_alternative<Undefined>(value);
}

Value default_filter(Rendering& rendering, const Value& value, const Bound& arguments) {
  const bool of_false = arguments[1] != nullptr && is_true(*arguments[1]);
  if (!is_undefined(value) && (!of_false || is_true(value))) return value;
  return arguments[0] != nullptr ? *arguments[0] : rendering.text("");
}

Value trim_filter(Rendering& rendering, const Value& value, const Bound& arguments) {
  const std::string* set = nullptr;
  if (arguments[0] != nullptr && !std::holds_alternative<None>(*arguments[0])) {
    set = &text_of(rendering, *arguments[0], "what trim strips").bytes();
  }
  const ChatText& text = printed(rendering, value);
  rendering.take(text.size());
  return rendering.keep(stripped(text, set, Ends::kBoth));
}

// Of texts whose other case has as many bytes: those in ASCII.
Value with_case(Rendering& rendering, const Value& value, std::string_view what, std::string (*change)(std::string)) {
  const ChatText& text = ascii_text(rendering, printed(rendering, value), what);
  rendering.take(text.size());
  return rendering.keep(text.with_bytes(change(text.bytes())));
}

std::string title(std::string text) {
  return titled(std::move(text), [](char c) {
    return std::string_view("-([{<").find(c) != std::string_view::npos || leading_space({&c, 1}) == 1;
  });
}

Value tojson_filter(Rendering& rendering, const Value& value, const Bound& arguments) {
  if (arguments[1] != nullptr && is_true(*arguments[1])) {
    rendering.stop("tojson with ensure_ascii", "characters as they are (ensure_ascii=false, the default)");
  }
  return to_json(rendering, value, arguments[0] != nullptr ? *arguments[0] : Value(None{}));
}

Value join_filter(Rendering& rendering, const Value& value, const Bound& arguments) {
  const ChatText nothing;
  return joined(rendering, items_of(rendering, value),
                arguments[0] != nullptr ? text_of(rendering, *arguments[0], "what join puts between") : nothing);
}

Value items_filter(Rendering& rendering, const Value& value, const Bound& /*arguments*/) {
  if (is_undefined(value)) return rendering.list({});
  const auto* dict = std::get_if<const Dict*>(&value);
  if (dict == nullptr) refuse_kind(rendering, value, "what items lists", "a mapping");
  List pairs;
  for (const auto& [key, item] : (*dict)->entries) {
    pairs.items.push_back(rendering.list({{rendering.part(key, 0, key.size()), item}}));
  }
  return rendering.list(std::move(pairs));
}

Value edge(Rendering& rendering, const Value& value, bool first) {
  const List items = items_of(rendering, value);
  if (items.items.empty()) return Undefined{first ? "the first item of nothing" : "the last item of nothing"};
  return first ? items.items.front() : items.items.back();
}

Value reverse_filter(Rendering& rendering, const Value& value, const Bound& /*arguments*/) {
  List items = items_of(rendering, value);
  std::reverse(items.items.begin(), items.items.end());
  if (std::holds_alternative<const ChatText*>(value)) return joined(rendering, items, {});
  return rendering.list(std::move(items));
}

Value replace_filter(Rendering& rendering, const Value& value, const Bound& arguments) {
  if (arguments[0] == nullptr || arguments[1] == nullptr) {
    rendering.stop("the filter replace with too few arguments", "the old text and the new one");
  }
  const bool all = arguments[2] == nullptr || std::holds_alternative<None>(*arguments[2]);
  return replaced(rendering, printed(rendering, value), printed(rendering, *arguments[0]),
                  printed(rendering, *arguments[1]),
                  all ? -1 : integer_of(rendering, *arguments[2], "how often replace replaces"));
}

// "a.b" of a value.
Value path(Rendering& rendering, Value value, const ChatText& names) {
  const std::string dot = ".";
  for (const ChatText& name : split(names, &dot, -1)) {
    value = item(rendering, value, rendering.part(name, 0, name.size()));
  }
  return value;
}

// The items that a test says `wanted` of; `attribute` null: of the items themselves.
Value selected(Rendering& rendering, const Value& value, const ChatText* attribute, const Value* test,
               const Value* argument, bool wanted) {
  Arguments arguments;
  if (argument != nullptr) arguments.positional.push_back(*argument);
  List kept;
  for (const Value& one : items_of(rendering, value).items) {
    rendering.work(Rendering::kStep);
    const Value asked = attribute == nullptr ? one : path(rendering, one, *attribute);
    const bool answer = test == nullptr
                            ? is_true(asked)
                            : run_test(rendering, text_of(rendering, *test, "a test's name").bytes(), asked, arguments);
    if (answer == wanted) kept.items.push_back(one);
  }
  return rendering.list(std::move(kept));
}

Value selected_by_attribute(Rendering& rendering, const Value& value, const Bound& arguments, bool wanted) {
  if (arguments[0] == nullptr) rendering.stop("selectattr or rejectattr without an attribute", "its name");
  return selected(rendering, value, &text_of(rendering, *arguments[0], "an attribute's name"), arguments[1],
                  arguments[2], wanted);
}

Value map_filter(Rendering& rendering, const Value& value, const Bound& arguments) {
  if ((arguments[0] == nullptr) == (arguments[1] == nullptr)) {
    rendering.stop("map with neither or both of a filter and an attribute", "one of the two");
  }
  List mapped;
  for (const Value& one : items_of(rendering, value).items) {
    rendering.work(Rendering::kStep);
    mapped.items.push_back(
        arguments[1] != nullptr
            ? path(rendering, one, text_of(rendering, *arguments[1], "an attribute's name"))
            : run_filter(rendering, text_of(rendering, *arguments[0], "a filter's name").bytes(), one, {}));
  }
  return rendering.list(std::move(mapped));
}

Value length_filter(Rendering& rendering, const Value& value, const Bound& /*arguments*/) {
  return length_of(rendering, value);
}

Value unchanged(Rendering& /*rendering*/, const Value& value, const Bound& /*arguments*/) {
  return value;
}

constexpr std::array<Filter, 24> kFilters = {{
    {"capitalize",
     {},
     [](Rendering& r, const Value& v, const Bound&) { return with_case(r, v, "capitalize", capitalized); }},
    {"count", {}, length_filter},
    {"d", {"default_value", "boolean"}, default_filter},
    {"default", {"default_value", "boolean"}, default_filter},
    {"first", {}, [](Rendering& r, const Value& v, const Bound&) { return edge(r, v, true); }},
    {"items", {}, items_filter},
    {"join", {"d"}, join_filter},
    {"last", {}, [](Rendering& r, const Value& v, const Bound&) { return edge(r, v, false); }},
    {"length", {}, length_filter},
    {"list", {}, [](Rendering& r, const Value& v, const Bound&) { return r.list(items_of(r, v)); }},
    {"lower", {}, [](Rendering& r, const Value& v, const Bound&) { return with_case(r, v, "lower", lower); }},
    {"map", {"filter", "attribute"}, map_filter},
    {"reject",
     {"test", "argument"},
     [](Rendering& r, const Value& v, const Bound& a) { return selected(r, v, nullptr, a[0], a[1], false); }},
    {"rejectattr",
     {"attribute", "test", "argument"},
     [](Rendering& r, const Value& v, const Bound& a) { return selected_by_attribute(r, v, a, false); }},
    {"replace", {"old", "new", "count"}, replace_filter},
    {"reverse", {}, reverse_filter},
    {"safe", {}, unchanged},  // nothing here escapes HTML
    {"select",
     {"test", "argument"},
     [](Rendering& r, const Value& v, const Bound& a) { return selected(r, v, nullptr, a[0], a[1], true); }},
    {"selectattr",
     {"attribute", "test", "argument"},
     [](Rendering& r, const Value& v, const Bound& a) { return selected_by_attribute(r, v, a, true); }},
    {"string", {}, [](Rendering& r, const Value& v, const Bound&) -> Value { return &printed(r, v); }},
    {"title", {}, [](Rendering& r, const Value& v, const Bound&) { return with_case(r, v, "title", title); }},
    {"tojson", {"indent", "ensure_ascii"}, tojson_filter},
    {"trim", {"chars"}, trim_filter},
    {"upper", {}, [](Rendering& r, const Value& v, const Bound&) { return with_case(r, v, "upper", upper); }},
}};

}  // namespace

Value run_filter(Rendering& rendering, std::string_view name, const Value& value, const Arguments& arguments) {
  const auto* filter =
      std::find_if(kFilters.begin(), kFilters.end(), [name](const Filter& one) { return one.name == name; });
  if (filter == kFilters.end()) {
    std::vector<std::string_view> known;
    known.reserve(kFilters.size());
    for (const Filter& one : kFilters) known.push_back(one.name);
    refuse_unknown(rendering, "filter", name, known);
  }
  return filter->run(rendering, value,
                     bound_arguments(rendering, "the filter " + std::string(name), arguments, filter->parameters));
}

const ChatText& ascii_text(const Rendering& rendering, const ChatText& text, std::string_view what) {
  if (is_ascii(text.bytes())) return text;
  rendering.stop(std::string(what) + " of a text with characters beyond ASCII", "ASCII, of which the cases are known");
}

Value replaced(Rendering& rendering, const ChatText& text, const ChatText& old, const ChatText& by, std::int64_t most) {
  if (old.size() == 0) rendering.stop("replace of an empty text", "one of at least one character");
  ChatText out;
  std::size_t begin = 0;
  for (std::int64_t times = 0; most < 0 || times < most; ++times) {
    const std::size_t found = text.bytes().find(old.bytes(), begin);
    if (found == std::string::npos) break;
    rendering.append(out, text.part(begin, found));
    rendering.append(out, by);
    begin = found + old.size();
  }
  rendering.append(out, text.part(begin, text.size()));
  return rendering.keep(std::move(out));
}

Value joined(Rendering& rendering, const List& items, const ChatText& by) {
  ChatText out;
  for (std::size_t i = 0; i < items.items.size(); ++i) {
    if (i > 0) rendering.append(out, by);
    rendering.append(out, printed(rendering, items.items[i]));
  }
  return rendering.keep(std::move(out));
}

}  // namespace vesper::jinja
