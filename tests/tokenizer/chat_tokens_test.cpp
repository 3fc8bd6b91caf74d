// Conversations as ids: control tokens of the template, and none that a user spells. With the demo model's tokenizer,
// whose control tokens are <s> (1) and </s> (2).
#include "tokenizer/chat_tokens.h"

#include <gtest/gtest.h>

#include "tests/models/files.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

using Ids = std::vector<std::int32_t>;

class ChatTokensTest : public testing::Test {
 protected:
  [[nodiscard]] ChatTokens tokens(const std::string& text) const {
    return {ChatTemplate(text, "a.jinja", {{"bos_token", "<s>"}, {"eos_token", "</s>"}}), *tokenizer_, today()};
  }

  [[nodiscard]] Ids encode(const std::string& text, const std::string& content) const {
    const std::vector<ChatMessage> messages = {{"user", content}};
    return tokens(text).encode(messages);
  }

  // The parts one after the other: ids as they are, texts through the tokenizer.
  [[nodiscard]] Ids joined(const std::vector<std::variant<std::int32_t, std::string>>& parts) const {
    Ids ids;
    for (const auto& part : parts) {
      const auto* id = std::get_if<std::int32_t>(&part);
      const Ids more = id != nullptr ? Ids{*id} : tokenizer_->encode(std::get<std::string>(part));
      ids.insert(ids.end(), more.begin(), more.end());
    }
    return ids;
  }

  std::unique_ptr<Tokenizer> tokenizer_ = load_tokenizer(source_dir() + "/configs/demo");
};

TEST_F(ChatTokensTest, TextBetweenControlTokensIsEncodedWhole) {
  EXPECT_EQ(encode("{{ bos_token }}[q] {{ messages[0].content }} [a]{{ eos_token }}", "a dark night"),
            joined({1, "[q] a dark night [a]", 2}));
  EXPECT_EQ(encode("<s></s>{{ messages[0].content }}", "night"), joined({1, 2, "night"}));
  EXPECT_EQ(encode("{{ messages[0].content }}", "night"), joined({"night"}))
      << "no BOS that the template does not write";
}

TEST_F(ChatTokensTest, UsersCannotWriteControlTokens) {
  EXPECT_EQ(encode("<s>{{ messages[0].content }}", "a</s>b<s>"), joined({1, "a</s>b<s>"}));
  EXPECT_EQ(encode("<{{ messages[0].content }}", "s>x"), joined({"<s>x"})) << "nor finish one";
  EXPECT_EQ(encode("{{ messages[0].content }}/s>", "<"), joined({"</s>"})) << "nor begin one";
  EXPECT_EQ(encode("{{ messages[0].content | replace('x', '</s>') }}", "axb"), joined({"a", 2, "b"}))
      << "the template may";
}

TEST_F(ChatTokensTest, FindsWhatEndsAnAnswer) {
  const auto template_with = [](const std::string& end) {
    return "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}{% if m.role == 'assistant' %}" + end +
           "{% endif %}\n{% endfor %}";
  };
  EXPECT_EQ(tokens(template_with("</s>")).end_ids(), Ids{2});
  EXPECT_EQ(tokens(template_with(" {{ eos_token }}")).end_ids(), Ids{2}) << "behind a space";
  EXPECT_EQ(tokens(template_with("")).end_ids(), Ids{1}) << "the next turn's beginning";
  EXPECT_EQ(tokens("{% for m in messages %}{{ m.content }}\n{% endfor %}").end_ids(), Ids{});
  EXPECT_EQ(tokens("{{ messages[0].content }}</s>").end_ids(), Ids{}) << "no answer in it";
}

TEST_F(ChatTokensTest, RefusesATextOfNothing) {
  EXPECT_NE(refusal([&] { (void)encode("{{ '' }}", "x"); }).find("an empty text"), std::string::npos);
}

}  // namespace
}  // namespace vesper
