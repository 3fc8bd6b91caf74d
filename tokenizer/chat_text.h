// A text that knows which of its bytes a chat template wrote and which came in with a message.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace vesper {

// UTF-8 bytes with their origin. Control tokens are sought in the template's own bytes only, so that nobody can put one
// into a conversation by spelling it. A value: parts and sums of texts keep the origin of every byte.
class ChatText {
 public:
  ChatText() = default;
  static ChatText of_template(std::string_view bytes);
  static ChatText of_message(std::string_view bytes);

  [[nodiscard]] const std::string& bytes() const { return bytes_; }
  [[nodiscard]] std::size_t size() const { return bytes_.size(); }
  // The bytes that came with messages: ascending, neither empty nor touching.
  [[nodiscard]] const std::vector<TextRange>& message_ranges() const { return ranges_; }
  // Whether the template wrote all bytes of [begin, end).
  [[nodiscard]] bool is_of_template(std::size_t begin, std::size_t end) const;

  [[nodiscard]] ChatText part(std::size_t begin, std::size_t end) const;
  void append(const ChatText& text);
  // The same text with bytes of the same length each in place of the old ones (another case, say).
  [[nodiscard]] ChatText with_bytes(std::string bytes) const;

 private:
  std::string bytes_;
  std::vector<TextRange> ranges_;
};

}  // namespace vesper
