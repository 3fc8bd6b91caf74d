#include "tokenizer/jinja_rendering.h"

#include "engine/core/error.h"

namespace vesper::jinja {

void Rendering::stop(const std::string& found, const std::string& expected, const std::string& change) const {
  refuse({"rendering " + source_ + ", line " + std::to_string(line_), found, expected, change});
}

void Rendering::too_much_work() const {
  stop("a template that goes on and on", "one that ends after some sixteen million steps");
}

void Rendering::too_deep() const {
  stop("more than " + std::to_string(kMaxDepth) + " expressions and statements inside each other",
       "a template without endless recursion");
}

void Rendering::take(std::uint64_t bytes) {
  work(bytes);
  bytes_ += bytes;
  if (bytes_ <= kMaxBytes) return;
  stop("a template that makes more than " + std::to_string(kMaxBytes >> 20U) + " MiB of texts and lists",
       "a conversation and a template that need less");
}

Value Rendering::keep(ChatText text) {
  take(sizeof(ChatText));
  return &texts_.emplace_back(std::move(text));
}

Value Rendering::text(std::string_view template_bytes) {
  take(template_bytes.size());
  return keep(ChatText::of_template(template_bytes));
}

Value Rendering::part(const ChatText& text, std::size_t begin, std::size_t end) {
  take(end - begin);
  return keep(text.part(begin, end));
}

Value Rendering::list(List items) {
  take(sizeof(List) + items.items.size() * sizeof(Value));
  return &lists_.emplace_back(std::move(items));
}

Value Rendering::dict(Dict entries) {
  take(sizeof(Dict) + entries.entries.size() * (sizeof(ChatText) + sizeof(Value)));
  return &dicts_.emplace_back(std::move(entries));
}

Namespace* Rendering::make_namespace(Dict attributes) {
  take(sizeof(Namespace) + attributes.entries.size() * (sizeof(ChatText) + sizeof(Value)));
  return &namespaces_.emplace_back(Namespace{std::move(attributes)});
}

Loop* Rendering::make_loop(const List& items) {
  take(sizeof(Loop));
  return &loops_.emplace_back(Loop{&items.items, 0});
}

}  // namespace vesper::jinja
