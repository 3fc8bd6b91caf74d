#include "tokenizer/chat_tokens.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/core/error.h"

namespace vesper {

ChatTokens::ChatTokens(ChatTemplate chat, const Tokenizer& tokenizer, const std::tm& now)
    : chat_(std::move(chat)), tokenizer_(&tokenizer), now_(now) {
  find_end_ids();
}

std::vector<std::int32_t> ChatTokens::encode(std::span<const ChatMessage> messages) const {
  std::vector<std::int32_t> ids = encode(chat_.render(messages, /*add_generation_prompt=*/true, now_));
  if (ids.empty()) {
    refuse({"rendering " + chat_.source(), "an empty text", "a conversation", "choose a model with a sound template"});
  }
  return ids;
}

std::vector<std::int32_t> ChatTokens::encode(const ChatText& text) const {
  return tokenizer_->encode_with_special(text.bytes(), text.message_ranges());
}

void ChatTokens::find_end_ids() {
  const std::string answer = "answer";
  const std::vector<ChatMessage> messages = {{"user", "question"}, {"assistant", answer}, {"user", "question"}};
  const ChatText text = chat_.render(messages, /*add_generation_prompt=*/false, now_);
  const std::vector<TextRange>& ranges = text.message_ranges();
  const auto found = std::find_if(ranges.begin(), ranges.end(), [&](const TextRange& range) {
    return text.bytes().compare(range.begin, range.end - range.begin, answer) == 0;
  });
  if (found == ranges.end()) return;
  const std::size_t end = found + 1 == ranges.end() ? text.size() : (found + 1)->begin;
  const std::vector<std::int32_t> behind = encode(text.part(found->end, end));
  // Only special tokens stand for no bytes.
  const auto special = std::find_if(behind.begin(), behind.end(),
                                    [this](std::int32_t id) { return tokenizer_->token_bytes(id).empty(); });
  if (special != behind.end()) end_ids_ = {*special};
}

}  // namespace vesper
