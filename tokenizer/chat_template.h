// The chat template of a model folder: turns of a conversation to the text that the model was trained on.
#pragma once

#include <ctime>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/chat_text.h"
#include "tokenizer/jinja_ast.h"

namespace vesper {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant": our own words, hence of the template's origin
  std::string content;
};

class ChatTemplate {
 public:
  // Variables that name tokens: {"bos_token", "<s>"} and the like.
  using TokenNames = std::vector<std::pair<std::string, std::string>>;

  // Parses `text`. `source` names it in messages. Throws input errors with the line: what is no template, and what is
  // Jinja that chat templates of the supported families do not use.
  ChatTemplate(std::string_view text, std::string source, TokenNames tokens);

  // What transformers' apply_chat_template renders for the same messages: `messages`, `add_generation_prompt`, `tools`
  // and `documents` (none) and the token names are defined. `now` is what strftime_now tells: today() unless a test
  // fixes it. Contents must be valid UTF-8. Throws an input error with the line where the template refuses the messages
  // or asks for what it may not have.
  [[nodiscard]] ChatText render(std::span<const ChatMessage> messages, bool add_generation_prompt,
                                const std::tm& now) const;

  [[nodiscard]] const std::string& source() const { return source_; }

 private:
  std::string source_;
  TokenNames tokens_;
  jinja::Program program_;
};

// Local time.
std::tm today();

// Whether load_chat_template finds a template in the folder. Reads no template, but tokenizer_config.json where it
// must.
bool has_chat_template(const std::string& folder);

// From chat_template.jinja, else chat_template.json, else "chat_template" of tokenizer_config.json, where it may be a
// list of named ones, of which "default" is taken: the order of transformers. Token names are those of
// tokenizer_config.json, else of special_tokens_map.json. Throws an input error that names the files looked for where
// there is none.
ChatTemplate load_chat_template(const std::string& folder);

}  // namespace vesper
