// Semantics: Python's str and dict; jinja2's range and namespace; raise_exception and strftime_now of transformers.
#include "tokenizer/jinja_methods.h"

#include <algorithm>
#include <ctime>

#include "engine/core/json.h"
#include "tokenizer/jinja_filters.h"
#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace vesper::jinja {
namespace {

constexpr std::int64_t kMaxRange = 100000;  // jinja2's sandbox.MAX_RANGE
constexpr std::size_t kMaxDateBytes = 256;  // of a formatted date: real ones have some twenty

// A text argument; null where none was given, or none (which stands for the same).
const std::string* optional_text(const Rendering& rendering, const Value* value, const std::string& role) {
  if (value == nullptr || std::holds_alternative<None>(*value)) return nullptr;
  return &text_of(rendering, *value, role).bytes();
}

const ChatText& needed_text(const Rendering& rendering, const Value* value, const std::string& role) {
  if (value == nullptr) rendering.stop("nothing as " + role, "a text");
  return text_of(rendering, *value, role);
}

using TextMethod = Value (*)(Rendering& rendering, const ChatText& text, const Bound& arguments);

template <Ends ends>
Value strip_method(Rendering& rendering, const ChatText& text, const Bound& arguments) {
  rendering.take(text.size());
  return rendering.keep(stripped(text, optional_text(rendering, arguments[0], "what strip strips"), ends));
}

Value split_method(Rendering& rendering, const ChatText& text, const Bound& arguments) {
  const std::string* separator = optional_text(rendering, arguments[0], "what split splits at");
  if (separator != nullptr && separator->empty()) rendering.stop("split at an empty text", "a separator");
  const std::int64_t most = arguments[1] == nullptr ? -1 : integer_of(rendering, *arguments[1], "the most splits");
  rendering.take(text.size() * (1 + sizeof(ChatText)));  // at worst a part for each character
  List parts;
  for (ChatText& part : split(text, separator, most)) parts.items.push_back(rendering.keep(std::move(part)));
  return rendering.list(std::move(parts));
}

// startswith and endswith, of one text or of a list of them.
template <bool at_start>
Value edge_method(Rendering& rendering, const ChatText& text, const Bound& arguments) {
  const auto fits = [&](const Value& value) {
    const std::string& edge = text_of(rendering, value, "what a text begins or ends with").bytes();
    return at_start ? text.bytes().starts_with(edge) : text.bytes().ends_with(edge);
  };
  if (arguments[0] == nullptr) rendering.stop("startswith or endswith without a text", "one");
  const auto* several = std::get_if<const List*>(arguments[0]);  // NOLINT: bound above
  if (several == nullptr) return fits(*arguments[0]);
  return std::any_of((*several)->items.begin(), (*several)->items.end(), fits);
}

Value with_case(Rendering& rendering, const ChatText& text, std::string_view what, std::string (*change)(std::string)) {
  rendering.take(text.size());
  return rendering.keep(text.with_bytes(change(ascii_text(rendering, text, what).bytes())));
}

// str.title: a word is a run of letters.
std::string title(std::string text) {
  return titled(std::move(text), [](char c) { return !((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')); });
}

Value replace_method(Rendering& rendering, const ChatText& text, const Bound& arguments) {
  return replaced(rendering, text, needed_text(rendering, arguments[0], "what replace replaces"),
                  needed_text(rendering, arguments[1], "what replace puts there"),
                  arguments[2] == nullptr ? -1 : integer_of(rendering, *arguments[2], "how often replace replaces"));
}

Value find_method(Rendering& rendering, const ChatText& text, const Bound& arguments) {
  rendering.work(text.size());
  const std::size_t found = text.bytes().find(needed_text(rendering, arguments[0], "what find looks for").bytes());
  if (found == std::string::npos) return std::int64_t{-1};
  return characters(std::string_view(text.bytes()).substr(0, found));
}

Value join_method(Rendering& rendering, const ChatText& text, const Bound& arguments) {
  if (arguments[0] == nullptr) rendering.stop("join without a list", "one");
  const List items = items_of(rendering, *arguments[0]);
  for (const Value& item : items.items) (void)text_of(rendering, item, "what join joins");  // stricter than the filter
  return joined(rendering, items, text);
}

struct TextMethodRow {
  std::string_view name;
  Parameters parameters;
  TextMethod run;
};

constexpr std::array<TextMethodRow, 13> kTextMethods = {{
    {"capitalize",
     {},
     [](Rendering& r, const ChatText& t, const Bound&) { return with_case(r, t, "capitalize", capitalized); }},
    {"endswith", {"suffix"}, edge_method<false>},
    {"find", {"sub"}, find_method},
    {"join", {"iterable"}, join_method},
    {"lower", {}, [](Rendering& r, const ChatText& t, const Bound&) { return with_case(r, t, "lower", lower); }},
    {"lstrip", {"chars"}, strip_method<Ends::kLeft>},
    {"replace", {"old", "new", "count"}, replace_method},
    {"rstrip", {"chars"}, strip_method<Ends::kRight>},
    {"split", {"sep", "maxsplit"}, split_method},
    {"startswith", {"prefix"}, edge_method<true>},
    {"strip", {"chars"}, strip_method<Ends::kBoth>},
    {"title", {}, [](Rendering& r, const ChatText& t, const Bound&) { return with_case(r, t, "title", title); }},
    {"upper", {}, [](Rendering& r, const ChatText& t, const Bound&) { return with_case(r, t, "upper", upper); }},
}};

constexpr std::array<std::string_view, 4> kDictMethods = {"get", "items", "keys", "values"};

const TextMethodRow* text_method(std::string_view name) {
  const auto* found = std::find_if(kTextMethods.begin(), kTextMethods.end(),
                                   [name](const TextMethodRow& row) { return row.name == name; });
  return found == kTextMethods.end() ? nullptr : found;
}

Value dict_method(Rendering& rendering, const Dict& dict, std::string_view name, const Arguments& arguments) {
  const std::string what = "the method " + std::string(name);
  if (name == "get") {
    const Bound bound = bound_arguments(rendering, what, arguments, {"key", "default"});
    rendering.work(dict.entries.size());
    const Value* found = dict.find(needed_text(rendering, bound[0], "the key that get looks for").bytes());
    if (found != nullptr) return *found;
    return bound[1] != nullptr ? *bound[1] : Value(None{});
  }
  (void)bound_arguments(rendering, what, arguments, {});
  if (name == "items") return run_filter(rendering, "items", &dict, {});
  if (name == "keys") return rendering.list(items_of(rendering, &dict));
  List values;
  for (const auto& [key, value] : dict.entries) values.items.push_back(value);
  return rendering.list(std::move(values));
}

Value range(Rendering& rendering, const Arguments& arguments) {
  const Bound bound = bound_arguments(rendering, "range", arguments, {"start", "stop", "step"});
  if (bound[0] == nullptr || !arguments.named.empty()) rendering.stop("range without a number", "one to three numbers");
  const auto number = [&](const Value* value) { return integer_of(rendering, *value, "a bound of range"); };
  const std::int64_t first = bound[1] == nullptr ? 0 : number(bound[0]);
  const std::int64_t last = bound[1] == nullptr ? number(bound[0]) : number(bound[1]);
  const std::int64_t step = bound[2] == nullptr ? 1 : number(bound[2]);
  if (step == 0) rendering.stop("range in steps of 0", "another step");
  List numbers;
  std::int64_t at = first;
  bool more = true;
  while (more && (step > 0 ? at < last : at > last)) {
    if (static_cast<std::int64_t>(numbers.items.size()) == kMaxRange) {
      rendering.stop("a range of more than " + std::to_string(kMaxRange) + " numbers", "a shorter one");
    }
    numbers.items.emplace_back(at);
    more = !__builtin_add_overflow(at, step, &at);
  }
  return rendering.list(std::move(numbers));
}

// namespace(a=1, b=2), dict(a=1): also from one mapping.
Dict attributes(Rendering& rendering, const std::string& what, const Arguments& arguments) {
  Dict made;
  if (arguments.positional.size() > 1) {
    rendering.stop(std::to_string(arguments.positional.size()) + " arguments to " + what, "one mapping, or names");
  }
  for (const Value& value : arguments.positional) {
    const auto* dict = std::get_if<const Dict*>(&value);
    if (dict == nullptr) refuse_kind(rendering, value, "the argument of " + what, "a mapping");
    made = **dict;
  }
  for (const auto& [name, value] : arguments.named) {
    rendering.work(made.entries.size());
    made.set(ChatText::of_template(name), value);
  }
  return made;
}

Value strftime_now(Rendering& rendering, const Arguments& arguments) {
  const Bound bound = bound_arguments(rendering, "strftime_now", arguments, {"format"});
  // The space tells an empty result from one that does not fit.
  const std::string format = needed_text(rendering, bound[0], "the format of strftime_now").bytes() + " ";
  if (format.find('\0') != std::string::npos) rendering.stop("a NUL in a date's format", "a format without");
  std::array<char, kMaxDateBytes> buffer{};
  const std::size_t bytes = std::strftime(buffer.data(), buffer.size(), format.c_str(), &rendering.now());
  if (bytes == 0) rendering.stop("a date of more than 255 bytes", "a shorter format");
  return rendering.text({buffer.data(), bytes - 1});
}

}  // namespace

bool has_method(const Value& value, std::string_view name) {
  if (std::holds_alternative<const ChatText*>(value)) return text_method(name) != nullptr;
  if (!std::holds_alternative<const Dict*>(value)) return false;
  return std::find(kDictMethods.begin(), kDictMethods.end(), name) != kDictMethods.end();
}

Value run_method(Rendering& rendering, const Value& value, std::string_view name, const Arguments& arguments) {
  if (const auto* dict = std::get_if<const Dict*>(&value)) return dict_method(rendering, **dict, name, arguments);
  const TextMethodRow& method = *text_method(name);
  return method.run(rendering, *std::get<const ChatText*>(value),
                    bound_arguments(rendering, "the method " + std::string(name), arguments, method.parameters));
}

Value builtin_named(std::string_view name) {
  if (name == "range") return Builtin::kRange;
  if (name == "namespace") return Builtin::kNamespace;
  if (name == "dict") return Builtin::kDict;
  if (name == "raise_exception") return Builtin::kRaiseException;
  if (name == "strftime_now") return Builtin::kStrftimeNow;
  return Undefined{name};
}

Value run_builtin(Rendering& rendering, Builtin function, const Arguments& arguments) {
  switch (function) {
    case Builtin::kRange:
      return range(rendering, arguments);
    case Builtin::kNamespace:
      return rendering.make_namespace(attributes(rendering, "namespace", arguments));
    case Builtin::kDict:
      return rendering.dict(attributes(rendering, "dict", arguments));
    case Builtin::kStrftimeNow:
      return strftime_now(rendering, arguments);
    case Builtin::kRaiseException:
      break;
  }
  const Bound bound = bound_arguments(rendering, "raise_exception", arguments, {"message"});
  rendering.stop("a conversation that the template refuses with " +
                     in_quotes(needed_text(rendering, bound[0], "the message of raise_exception").bytes()),
                 "one that it accepts");
}

}  // namespace vesper::jinja
