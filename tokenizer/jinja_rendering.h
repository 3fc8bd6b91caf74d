// One run of a chat template: what it makes, what it may use, where it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <ctime>
#include <deque>
#include <string>
#include <string_view>
#include <utility>

#include "tokenizer/jinja_value.h"

namespace vesper::jinja {

// Owns all values of the run until it ends: templates are small, and nothing is freed in between. A template is code
// from a stranger, so every byte that it makes and every step that it takes is counted, and a run that asks for too
// much ends with one sentence.
class Rendering {
 public:
  static constexpr std::uint64_t kMaxBytes = std::uint64_t{128} << 20;
  // An expression counts kStep, a byte looked at 1: a few seconds, under sanitizers too.
  static constexpr std::uint64_t kMaxWork = std::uint64_t{1} << 30;
  static constexpr std::uint64_t kStep = 64;
  static constexpr int kMaxDepth = 500;  // of expressions and statements inside each other, through macros

  // `source` names the template in messages and outlives this; `now` is what strftime_now tells.
  Rendering(const std::string& source, const std::tm& now) : source_(source), now_(now) {}

  // An input error at the line that is being rendered.
  [[noreturn]] void stop(const std::string& found, const std::string& expected, const std::string& change = "") const;
  void at_line(int line) { line_ = line; }
  [[nodiscard]] int line() const { return line_; }

  // Counts before it is spent.
  void work(std::uint64_t units) {
    work_ += units;
    if (work_ > kMaxWork) too_much_work();
  }
  void take(std::uint64_t bytes);
  void enter() {
    if (++depth_ > kMaxDepth) too_deep();
  }
  void leave() { --depth_; }

  // A text's bytes have been counted where it was put together: by append, or by these for texts made whole.
  void append(ChatText& to, const ChatText& text) {
    take(text.size());
    to.append(text);
  }
  void append(ChatText& to, std::string_view template_bytes) { append(to, ChatText::of_template(template_bytes)); }
  Value keep(ChatText text);
  Value text(std::string_view template_bytes);
  Value part(const ChatText& text, std::size_t begin, std::size_t end);
  Value list(List items);
  Value dict(Dict entries);
  Namespace* make_namespace(Dict attributes);
  Loop* make_loop(const List& items);

  [[nodiscard]] const std::tm& now() const { return now_; }

 private:
  [[noreturn]] void too_much_work() const;
  [[noreturn]] void too_deep() const;

  const std::string& source_;
  std::tm now_;
  int line_ = 1;
  int depth_ = 0;
  std::uint64_t work_ = 0;
  std::uint64_t bytes_ = 0;
  std::deque<ChatText> texts_;
  std::deque<List> lists_;
  std::deque<Dict> dicts_;
  std::deque<Namespace> namespaces_;
  std::deque<Loop> loops_;
};

}  // namespace vesper::jinja
