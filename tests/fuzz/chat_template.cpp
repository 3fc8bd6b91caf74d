// chat_template.jinja: parsed, and rendered for a short conversation.
#include "tokenizer/chat_template.h"

#include <vector>

#include "tests/fuzz/fuzz.h"

namespace vesper {

void fuzz(std::string_view input) {
  const ChatTemplate chat(input, "chat_template.jinja", {{"bos_token", "<s>"}, {"eos_token", "</s>"}});
  const std::vector<ChatMessage> messages = {
      {"system", "Be brief."}, {"user", " What is \u20ac?\n"}, {"assistant", "<s>A sign."}, {"user", "Thanks"}};
  const std::tm now = {.tm_mday = 26, .tm_mon = 6, .tm_year = 124, .tm_wday = 5, .tm_yday = 207};
  for (const bool add_generation_prompt : {false, true}) {
    const ChatText text = chat.render(messages, add_generation_prompt, now);
    promise(find_invalid_utf8(text.bytes()) < 0, "a rendered text is valid UTF-8");
    std::size_t end = 0;
    for (const TextRange& range : text.message_ranges()) {
      promise(range.begin < range.end && range.begin >= end && range.end <= text.size(),
              "the ranges of messages are ascending and inside the text");
      end = range.end + 1;
    }
  }
}

}  // namespace vesper
