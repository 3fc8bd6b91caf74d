// Conversations as token ids.
#pragma once

#include <cstdint>
#include <ctime>
#include <span>
#include <vector>

#include "tokenizer/chat_template.h"
#include "tokenizer/tokenizer.h"

namespace vesper {

// A template and the tokenizer that its text is meant for. The names of special tokens become ids in what the template
// wrote and nowhere else; text between two of them is encoded as a whole, so that ids equal those of transformers'
// apply_chat_template for messages that spell no special token. No BOS but one that the template writes.
class ChatTokens {
 public:
  // `tokenizer` outlives this. `now` is the date that the template may ask for: one for a whole conversation, whose
  // beginning would change with it. Throws an input error where the template refuses a short conversation.
  ChatTokens(ChatTemplate chat, const Tokenizer& tokenizer, const std::tm& now);

  // The conversation up to where the assistant's next answer begins. Throws what ChatTemplate::render throws, and an
  // input error where nothing comes out.
  [[nodiscard]] std::vector<std::int32_t> encode(std::span<const ChatMessage> messages) const;

  // The special tokens that the template writes right after an assistant's message: they end an answer, whatever the
  // model's eos ids are. None or one.
  [[nodiscard]] const std::vector<std::int32_t>& end_ids() const { return end_ids_; }

 private:
  [[nodiscard]] std::vector<std::int32_t> encode(const ChatText& text) const;
  void find_end_ids();

  ChatTemplate chat_;
  const Tokenizer* tokenizer_;
  std::tm now_;
  std::vector<std::int32_t> end_ids_;
};

}  // namespace vesper
