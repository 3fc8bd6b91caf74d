// What the expressions of a chat template stand for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "tokenizer/chat_text.h"

namespace vesper::jinja {

struct Statement;
struct List;
struct Dict;
struct Namespace;
struct Loop;

// The answer to a name or key that is not there: prints as nothing, is false and empty; anything else asked of it is
// refused by `name`, which outlives it.
struct Undefined {
  std::string_view name;
};
struct None {};

// The functions that a template finds without defining them.
enum class Builtin : std::uint8_t { kRange, kNamespace, kDict, kRaiseException, kStrftimeNow };

// Small and copied freely: texts and containers belong to the Rendering (or the Template) and never change, except for
// a namespace's attributes. Python's tuples are lists here: templates only build and unpack them.
using Value = std::variant<Undefined, None, bool, std::int64_t, double, const ChatText*, const List*, const Dict*,
                           Namespace*, const Loop*, const Statement*, Builtin>;

struct List {
  std::vector<Value> items;
};

// In the order of insertion, as Python's.
struct Dict {
  std::vector<std::pair<ChatText, Value>> entries;

  // nullptr where the key is absent.
  [[nodiscard]] const Value* find(std::string_view key) const {
    for (const auto& [name, value] : entries) {
      if (name.bytes() == key) return &value;
    }
    return nullptr;
  }
  void set(const ChatText& key, Value value) {
    for (auto& [name, old] : entries) {
      if (name.bytes() != key.bytes()) continue;
      old = value;
      return;
    }
    entries.emplace_back(key, value);
  }
};

// namespace(...): the one thing whose attributes can be set from inside a loop and read after it.
struct Namespace {
  Dict attributes;
};

// The variable `loop` of a for statement.
struct Loop {
  const std::vector<Value>* items;
  std::size_t index0;
};

}  // namespace vesper::jinja
