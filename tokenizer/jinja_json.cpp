// Python's json/encoder.py.
#include "tokenizer/jinja_json.h"

#include <cmath>
#include <optional>

#include "tokenizer/jinja_operations.h"

namespace vesper::jinja {
namespace {

constexpr std::int64_t kMaxIndent = 16;

std::string escape_of(char c) {
  switch (c) {
    case '"':
      return "\\\"";
    case '\\':
      return "\\\\";
    case '\n':
      return "\\n";
    case '\r':
      return "\\r";
    case '\t':
      return "\\t";
    case '\b':
      return "\\b";
    case '\f':
      return "\\f";
    default:
      break;
  }
  const auto byte = static_cast<unsigned char>(c);
  if (byte >= 0x20) return "";
  return {'\\', 'u', '0', '0', "01"[byte >> 4U], "0123456789abcdef"[byte & 15U]};
}

class Writer {
 public:
  Writer(Rendering& rendering, std::optional<std::int64_t> indent) : rendering_(rendering), indent_(indent) {}

  void put(const Value& value) {
    rendering_.enter();
    rendering_.work(Rendering::kStep);
    if (const auto* list = std::get_if<const List*>(&value)) {
      put_all('[', ']', (*list)->items, [this](const Value& item) { put(item); });
    } else if (const auto* dict = std::get_if<const Dict*>(&value)) {
      put_all('{', '}', (*dict)->entries, [this](const auto& entry) {
        put_text(entry.first);
        rendering_.append(out_, ": ");
        put(entry.second);
      });
    } else if (const auto* text = std::get_if<const ChatText*>(&value)) {
      put_text(**text);
    } else {
      rendering_.append(out_, word(value));
    }
    rendering_.leave();
  }

  Value result() { return rendering_.keep(std::move(out_)); }

 private:
  [[nodiscard]] std::string word(const Value& value) const {
    if (std::holds_alternative<None>(value)) return "null";
    if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
    if (const auto* integer = std::get_if<std::int64_t>(&value)) return std::to_string(*integer);
    if (const auto* real = std::get_if<double>(&value)) {
      if (std::isnan(*real)) return "NaN";
      if (std::isinf(*real)) return *real < 0 ? "-Infinity" : "Infinity";
      return real_text(*real);
    }
    refuse_kind(rendering_, value, "what tojson writes", "a text, a number, a list or a mapping");
  }

  // Each byte keeps its origin, an escape that of the character that it stands for.
  void put_text(const ChatText& text) {
    rendering_.append(out_, "\"");
    std::size_t begin = 0;
    for (std::size_t at = 0; at < text.size(); ++at) {
      const std::string escape = escape_of(text.bytes()[at]);
      if (escape.empty()) continue;
      rendering_.append(out_, text.part(begin, at));
      rendering_.append(out_,
                        text.is_of_template(at, at + 1) ? ChatText::of_template(escape) : ChatText::of_message(escape));
      begin = at + 1;
    }
    rendering_.append(out_, text.part(begin, text.size()));
    rendering_.append(out_, "\"");
  }

  template <typename Items, typename Put>
  void put_all(char open, char close, const Items& items, const Put& put_one) {
    rendering_.append(out_, std::string(1, open));
    ++level_;
    bool first = true;
    for (const auto& item : items) {
      if (!first) rendering_.append(out_, indent_ ? "," : ", ");
      first = false;
      new_line();
      put_one(item);
    }
    --level_;
    if (!items.empty()) new_line();
    rendering_.append(out_, std::string(1, close));
  }

  void new_line() {
    if (!indent_) return;
    rendering_.append(out_, "\n");
    rendering_.append(out_, std::string(static_cast<std::size_t>(*indent_ * level_), ' '));
  }

  Rendering& rendering_;
  std::optional<std::int64_t> indent_;
  std::int64_t level_ = 0;
  ChatText out_;
};

}  // namespace

Value to_json(Rendering& rendering, const Value& value, const Value& indent) {
  std::optional<std::int64_t> spaces;
  if (!std::holds_alternative<None>(indent)) {
    spaces = integer_of(rendering, indent, "the indent of tojson");
    if (*spaces < 0 || *spaces > kMaxIndent) {
      rendering.stop("the indent " + std::to_string(*spaces) + " of tojson", "0 to " + std::to_string(kMaxIndent));
    }
  }
  Writer writer(rendering, spaces);
  writer.put(value);
  return writer.result();
}

}  // namespace vesper::jinja
