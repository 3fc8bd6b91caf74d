#include "tokenizer/jinja_operations.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "engine/core/json.h"
#include "tokenizer/jinja_text.h"

namespace vesper::jinja {
namespace {

template <typename Type>
const Type* as(const Value& value) {
  return std::get_if<Type>(&value);
}

const ChatText* as_text(const Value& value) {
  const auto* text = as<const ChatText*>(value);
  return text == nullptr ? nullptr : *text;
}

const List* as_list(const Value& value) {
  const auto* list = as<const List*>(value);
  return list == nullptr ? nullptr : *list;
}

const Dict* as_dict(const Value& value) {
  const auto* dict = as<const Dict*>(value);
  return dict == nullptr ? nullptr : *dict;
}

std::optional<double> as_real(const Value& value) {
  if (const auto integer = as_integer(value)) return static_cast<double>(*integer);
  if (const auto* real = as<double>(value)) return *real;
  return std::nullopt;
}

std::string_view symbol_of(Operator op) {
  constexpr std::array<std::string_view, 15> kSymbols = {
      "+", "-", "*", "/", "//", "%", "**", "==", "!=", "<", "<=", ">", ">=", "in", "not in"};
  return kSymbols[static_cast<std::size_t>(op)];
}

[[noreturn]] void refuse_operands(const Rendering& rendering, Operator op, const Value& a, const Value& b) {
  for (const Value* value : {&a, &b}) {
    if (const auto* undefined = as<Undefined>(*value)) refuse_undefined(rendering, *undefined);
  }
  rendering.stop(std::string("the operator ").append(symbol_of(op)) + " between " + kind_of(a) + " and " + kind_of(b),
                 "operands that it knows");
}

[[noreturn]] void refuse_overflow(const Rendering& rendering, Operator op) {
  rendering.stop(std::string("a result of ").append(symbol_of(op)) + " beyond 64 bits", "smaller numbers");
}

Value integer_arithmetic(const Rendering& rendering, Operator op, std::int64_t a, std::int64_t b) {
  const bool divides = op == Operator::kDivide || op == Operator::kFloorDivide || op == Operator::kModulo;
  if (divides && b == 0) rendering.stop("a division by zero", "another divisor");
  std::int64_t result = 0;
  bool overflow = false;
  switch (op) {
    case Operator::kAdd:
      overflow = __builtin_add_overflow(a, b, &result);
      break;
    case Operator::kSubtract:
      overflow = __builtin_sub_overflow(a, b, &result);
      break;
    case Operator::kMultiply:
      overflow = __builtin_mul_overflow(a, b, &result);
      break;
    case Operator::kDivide:
      return static_cast<double>(a) / static_cast<double>(b);
    case Operator::kFloorDivide:
    case Operator::kModulo: {  // towards minus infinity
      if (b == -1) {           // INT64_MIN / -1 does not fit
        overflow = op == Operator::kFloorDivide && __builtin_sub_overflow(std::int64_t{0}, a, &result);
        break;
      }
      const bool away = a % b != 0 && (a < 0) != (b < 0);
      result = op == Operator::kModulo ? a % b + (away ? b : 0) : a / b - (away ? 1 : 0);
      break;
    }
    default: {  // power
      if (b < 0) return std::pow(static_cast<double>(a), static_cast<double>(b));
      result = 1;
      const bool trivial = a == 0 || a == 1 || a == -1;  // whose powers never overflow and so never end the loop
      const std::int64_t times = trivial ? (b == 0 ? 0 : 2 - b % 2) : b;
      for (std::int64_t i = 0; i < times && !overflow; ++i) overflow = __builtin_mul_overflow(result, a, &result);
    }
  }
  if (overflow) refuse_overflow(rendering, op);
  return result;
}

Value real_arithmetic(const Rendering& rendering, Operator op, double a, double b) {
  const bool divides = op == Operator::kDivide || op == Operator::kFloorDivide || op == Operator::kModulo;
  if (divides && b == 0.0) rendering.stop("a division by zero", "another divisor");
  switch (op) {
    case Operator::kAdd:
      return a + b;
    case Operator::kSubtract:
      return a - b;
    case Operator::kMultiply:
      return a * b;
    case Operator::kDivide:
      return a / b;
    case Operator::kFloorDivide:
      return std::floor(a / b);
    case Operator::kModulo: {
      const double rest = std::fmod(a, b);
      return rest != 0.0 && (rest < 0.0) != (b < 0.0) ? rest + b : rest;
    }
    default:
      return std::pow(a, b);
  }
}

Value repeated(Rendering& rendering, const ChatText& text, std::int64_t times) {
  ChatText out;
  for (std::int64_t i = 0; i < times; ++i) {
    rendering.work(Rendering::kStep);  // of an empty text too
    rendering.append(out, text);
  }
  return rendering.keep(std::move(out));
}

bool contains(Rendering& rendering, const Value& container, const Value& wanted) {
  if (as<Undefined>(container) != nullptr) return false;
  if (const ChatText* text = as_text(container)) {
    const std::string& needle = text_of(rendering, wanted, "what \"in\" looks for in a text").bytes();
    rendering.work(text->size());
    return text->bytes().find(needle) != std::string::npos;
  }
  if (const List* list = as_list(container)) {
    return std::any_of(list->items.begin(), list->items.end(),
                       [&](const Value& value) { return equal(rendering, value, wanted); });
  }
  if (const Dict* dict = as_dict(container)) {
    rendering.work(dict->entries.size());
    return as_text(wanted) != nullptr && dict->find(as_text(wanted)->bytes()) != nullptr;
  }
  refuse_operands(rendering, Operator::kIn, wanted, container);
}

// The numbers of the items that a slice of a sequence of `size` items takes: PySlice_AdjustIndices.
std::vector<std::size_t> sliced(std::int64_t size, std::optional<std::int64_t> first, std::optional<std::int64_t> last,
                                std::int64_t step) {
  const std::int64_t least = step < 0 ? -1 : 0;
  const std::int64_t most = step < 0 ? size - 1 : size;
  const auto clamped = [&](std::int64_t index) { return std::clamp(index < 0 ? index + size : index, least, most); };
  const std::int64_t begin = first ? clamped(*first) : step < 0 ? most : 0;
  const std::int64_t end = last ? clamped(*last) : step < 0 ? -1 : size;
  const std::int64_t stride = std::clamp(step, -size - 1, size + 1);  // farther steps take no other items
  std::vector<std::size_t> numbers;
  for (std::int64_t i = begin; step < 0 ? i > end : i < end; i += stride) {
    numbers.push_back(static_cast<std::size_t>(i));
  }
  return numbers;
}

std::optional<std::size_t> index_in(std::int64_t size, std::int64_t index) {
  if (index < 0) index += size;
  if (index < 0 || index >= size) return std::nullopt;
  return static_cast<std::size_t>(index);
}

Value loop_attribute(const Rendering& rendering, const Loop& loop, std::string_view name) {
  const auto index = static_cast<std::int64_t>(loop.index0);
  const auto length = static_cast<std::int64_t>(loop.items->size());
  if (name == "index") return index + 1;
  if (name == "index0") return index;
  if (name == "revindex") return length - index;
  if (name == "revindex0") return length - index - 1;
  if (name == "first") return index == 0;
  if (name == "last") return index + 1 == length;
  if (name == "length") return length;
  if (name == "previtem") return index == 0 ? Value(Undefined{"loop.previtem"}) : (*loop.items)[loop.index0 - 1];
  if (name == "nextitem") {
    return index + 1 == length ? Value(Undefined{"loop.nextitem"}) : (*loop.items)[loop.index0 + 1];
  }
  rendering.stop("loop." + std::string(name),
                 "one of: index, index0, revindex, revindex0, first, last, length, previtem, nextitem");
}

}  // namespace

std::string kind_of(const Value& value) {
  constexpr std::array<std::string_view, 12> kKinds = {"nothing defined", "none",     "a boolean", "a whole number",
                                                       "a number",        "a text",   "a list",    "a mapping",
                                                       "a namespace",     "the loop", "a macro",   "a function"};
  return std::string(kKinds[value.index()]);
}

void refuse_undefined(const Rendering& rendering, const Undefined& undefined) {
  rendering.stop(in_quotes(undefined.name) + ", which is not defined", "a value");
}

void refuse_kind(const Rendering& rendering, const Value& value, const std::string& role, const std::string& expected) {
  if (const auto* undefined = as<Undefined>(value)) refuse_undefined(rendering, *undefined);
  rendering.stop(kind_of(value) + " as " + role, expected);
}

bool is_true(const Value& value) {
  if (const auto* flag = as<bool>(value)) return *flag;
  if (const auto number = as_real(value)) return *number != 0.0;
  if (const ChatText* text = as_text(value)) return text->size() > 0;
  if (const List* list = as_list(value)) return !list->items.empty();
  if (const Dict* dict = as_dict(value)) return !dict->entries.empty();
  return as<Undefined>(value) == nullptr && as<None>(value) == nullptr;
}

const ChatText& text_of(const Rendering& rendering, const Value& value, const std::string& role) {
  if (const ChatText* text = as_text(value)) return *text;
  refuse_kind(rendering, value, role, "a text");
}

std::int64_t integer_of(const Rendering& rendering, const Value& value, const std::string& role) {
  if (const auto integer = as_integer(value)) return *integer;
  refuse_kind(rendering, value, role, "a whole number");
}

std::optional<std::int64_t> as_integer(const Value& value) {
  if (const auto* integer = as<std::int64_t>(value)) return *integer;
  if (const auto* flag = as<bool>(value)) return *flag ? 1 : 0;
  return std::nullopt;
}

// CPython's float_repr_style "short": decimal from 1e-4 to below 1e16, else an exponent of at least two digits.
std::string real_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  const double size = std::fabs(value);
  const bool decimal = size == 0.0 || (size >= 1e-4 && size < 1e16);
  std::array<char, 64> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                 decimal ? std::chars_format::fixed : std::chars_format::scientific);
  std::string text(buffer.data(), end.ptr);
  if (decimal && text.find('.') == std::string::npos) text += ".0";
  return text;
}

const ChatText& printed(Rendering& rendering, const Value& value) {
  if (const ChatText* text = as_text(value)) return *text;
  const auto made = [&](const std::string& text) -> const ChatText& {
    return *std::get<const ChatText*>(rendering.text(text));
  };
  if (as<Undefined>(value) != nullptr) return made("");
  if (as<None>(value) != nullptr) return made("None");
  if (const auto* flag = as<bool>(value)) return made(*flag ? "True" : "False");
  if (const auto* integer = as<std::int64_t>(value)) return made(std::to_string(*integer));
  if (const auto* real = as<double>(value)) return made(real_text(*real));
  refuse_kind(rendering, value, "what is printed", "a text or a number (lists and mappings through tojson or join)");
}

List items_of(Rendering& rendering, const Value& value) {
  List items;
  if (as<Undefined>(value) != nullptr) return items;
  if (const List* list = as_list(value)) {
    rendering.take(list->items.size() * sizeof(Value));
    return *list;
  }
  if (const Dict* dict = as_dict(value)) {
    for (const auto& [key, ignored] : dict->entries) items.items.push_back(rendering.part(key, 0, key.size()));
    return items;
  }
  if (const ChatText* text = as_text(value)) {
    rendering.take(text->size() * sizeof(std::size_t));
    const std::vector<std::size_t> offsets = character_offsets(text->bytes());
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
      items.items.push_back(rendering.part(*text, offsets[i], offsets[i + 1]));
    }
    return items;
  }
  refuse_kind(rendering, value, "what is gone through", "a list, a mapping or a text");
}

std::int64_t length_of(Rendering& rendering, const Value& value) {
  if (as<Undefined>(value) != nullptr) return 0;
  if (const List* list = as_list(value)) return static_cast<std::int64_t>(list->items.size());
  if (const Dict* dict = as_dict(value)) return static_cast<std::int64_t>(dict->entries.size());
  if (const ChatText* text = as_text(value)) {
    rendering.work(text->size());
    return characters(text->bytes());
  }
  refuse_kind(rendering, value, "what length counts", "a list, a mapping or a text");
}

bool equal(Rendering& rendering, const Value& a, const Value& b) {
  rendering.work(Rendering::kStep);
  const auto left = as_integer(a);
  const auto right = as_integer(b);
  if (left && right) return *left == *right;
  const auto left_real = as_real(a);
  const auto right_real = as_real(b);
  if (left_real && right_real) return *left_real == *right_real;
  if (a.index() != b.index()) return false;
  if (const ChatText* text = as_text(a)) {
    rendering.work(text->size());
    return text->bytes() == as_text(b)->bytes();
  }
  rendering.enter();
  bool same = a.index() <= 1;  // none is none, and what is undefined equals what is undefined
  if (const List* list = as_list(a)) {
    const List& other = *as_list(b);
    same = std::equal(list->items.begin(), list->items.end(), other.items.begin(), other.items.end(),
                      [&](const Value& x, const Value& y) { return equal(rendering, x, y); });
  } else if (const Dict* dict = as_dict(a)) {
    const Dict& other = *as_dict(b);
    rendering.work(dict->entries.size() * other.entries.size());
    same = dict->entries.size() == other.entries.size() &&
           std::all_of(dict->entries.begin(), dict->entries.end(), [&](const auto& entry) {
             const Value* found = other.find(entry.first.bytes());
             return found != nullptr && equal(rendering, entry.second, *found);
           });
  } else if (const auto* space = as<Namespace*>(a)) {
    same = *space == std::get<Namespace*>(b);
  }
  rendering.leave();
  return same;
}

bool compare(Rendering& rendering, Operator op, const Value& a, const Value& b) {
  if (op == Operator::kEqual) return equal(rendering, a, b);
  if (op == Operator::kNotEqual) return !equal(rendering, a, b);
  if (op == Operator::kIn) return contains(rendering, b, a);
  if (op == Operator::kNotIn) return !contains(rendering, b, a);
  const auto ordered = [op](const auto& x, const auto& y) {
    if (op == Operator::kLess) return x < y;
    if (op == Operator::kLessEqual) return x <= y;
    return op == Operator::kGreater ? x > y : x >= y;
  };
  if (as_integer(a) && as_integer(b)) return ordered(*as_integer(a), *as_integer(b));
  if (as_real(a) && as_real(b)) return ordered(*as_real(a), *as_real(b));
  if (as_text(a) == nullptr || as_text(b) == nullptr) refuse_operands(rendering, op, a, b);
  rendering.work(as_text(a)->size());
  return ordered(as_text(a)->bytes(), as_text(b)->bytes());  // UTF-8 sorts as code points do
}

Value arithmetic(Rendering& rendering, Operator op, const Value& a, const Value& b) {
  if (as_integer(a) && as_integer(b)) return integer_arithmetic(rendering, op, *as_integer(a), *as_integer(b));
  if (as_real(a) && as_real(b)) return real_arithmetic(rendering, op, *as_real(a), *as_real(b));
  if (op == Operator::kAdd && as_text(a) != nullptr && as_text(b) != nullptr) {
    ChatText sum;
    rendering.append(sum, *as_text(a));
    rendering.append(sum, *as_text(b));
    return rendering.keep(std::move(sum));
  }
  if (op == Operator::kAdd && as_list(a) != nullptr && as_list(b) != nullptr) {
    List sum = items_of(rendering, a);
    const List more = items_of(rendering, b);
    sum.items.insert(sum.items.end(), more.items.begin(), more.items.end());
    return rendering.list(std::move(sum));
  }
  if (op == Operator::kMultiply && as_text(a) != nullptr && as_integer(b)) {
    return repeated(rendering, *as_text(a), *as_integer(b));
  }
  if (op == Operator::kMultiply && as_integer(a) && as_text(b) != nullptr) {
    return repeated(rendering, *as_text(b), *as_integer(a));
  }
  refuse_operands(rendering, op, a, b);
}

Value attribute(Rendering& rendering, const Value& value, std::string_view name) {
  if (const auto* undefined = as<Undefined>(value)) refuse_undefined(rendering, *undefined);
  if (const auto* loop = as<const Loop*>(value)) return loop_attribute(rendering, **loop, name);
  const Dict* dict = as_dict(value);
  if (const auto* space = as<Namespace*>(value)) dict = &(*space)->attributes;
  if (dict == nullptr) return Undefined{name};
  rendering.work(dict->entries.size());
  const Value* found = dict->find(name);
  return found != nullptr ? *found : Value(Undefined{name});
}

Value item(Rendering& rendering, const Value& value, const Value& key) {
  if (const ChatText* name = as_text(key)) return attribute(rendering, value, name->bytes());
  if (const auto* undefined = as<Undefined>(value)) refuse_undefined(rendering, *undefined);
  const auto index = as_integer(key);
  if (!index) refuse_kind(rendering, key, "a subscript", "a whole number or a text");
  if (const List* list = as_list(value)) {
    const auto found = index_in(static_cast<std::int64_t>(list->items.size()), *index);
    return found ? list->items[*found] : Value(Undefined{"an item past the end of a list"});
  }
  if (const ChatText* text = as_text(value)) {
    rendering.take(text->size() * sizeof(std::size_t));
    const std::vector<std::size_t> offsets = character_offsets(text->bytes());
    const auto found = index_in(static_cast<std::int64_t>(offsets.size()) - 1, *index);
    return found ? rendering.part(*text, offsets[*found], offsets[*found + 1])
                 : Value(Undefined{"a character past the end of a text"});
  }
  return Undefined{"a numbered item of what is no list"};
}

Value slice(Rendering& rendering, const Value& value, const Value& first, const Value& last, const Value& step) {
  const auto bound = [&](const Value& given) -> std::optional<std::int64_t> {
    if (as<None>(given) != nullptr) return std::nullopt;
    return integer_of(rendering, given, "a bound of a slice");
  };
  const std::int64_t stride = bound(step).value_or(1);
  if (stride == 0) rendering.stop("a slice in steps of 0", "another step");
  if (const List* list = as_list(value)) {
    rendering.take(list->items.size() * sizeof(Value));
    List part;
    for (const std::size_t i :
         sliced(static_cast<std::int64_t>(list->items.size()), bound(first), bound(last), stride)) {
      part.items.push_back(list->items[i]);
    }
    return rendering.list(std::move(part));
  }
  if (const ChatText* text = as_text(value)) {
    rendering.take(text->size() * sizeof(std::size_t));
    const std::vector<std::size_t> offsets = character_offsets(text->bytes());
    const auto taken = sliced(static_cast<std::int64_t>(offsets.size()) - 1, bound(first), bound(last), stride);
    if (stride == 1 && !taken.empty()) return rendering.part(*text, offsets[taken.front()], offsets[taken.back() + 1]);
    ChatText part;
    for (const std::size_t i : taken) rendering.append(part, text->part(offsets[i], offsets[i + 1]));
    return rendering.keep(std::move(part));
  }
  refuse_kind(rendering, value, "what is sliced", "a list or a text");
}

}  // namespace vesper::jinja
