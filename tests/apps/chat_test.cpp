// vesper chat and generate --chat through the binary: turns share a cache, and are what a run from scratch gives.
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>

#include "tests/apps/run_vesper.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

// The demo model with a template, so that it passes for an instruct model.
class ChatTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"config.json", "model.safetensors", "tokenizer.model"}) {
      std::filesystem::create_symlink(std::filesystem::absolute(demo_model()) / name, folder_ / name);
    }
    write_file(folder_ / "tokenizer_config.json", R"({"bos_token": "<s>", "eos_token": "</s>"})");
    write_file(folder_ / "chat_template.jinja",
               "{{ bos_token }}{% for m in messages %}({{ m.role }}){{ m.content }}\n{% endfor %}"
               "{% if add_generation_prompt %}(assistant){% endif %}");
  }

  [[nodiscard]] std::vector<std::string> command(const std::string& name, const std::vector<std::string>& more) const {
    std::vector<std::string> arguments = {name, "--model", folder_.path(), "--device", "cpu"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  [[nodiscard]] RunResult chat(const std::string& input, const std::vector<std::string>& more) const {
    return run_well(command("chat", more), {.input = input});
  }

  // The JSON lines of a chat of at most 16 tokens a turn.
  [[nodiscard]] std::vector<Json> turns(const std::string& input, std::vector<std::string> more = {}) const {
    more.insert(more.end(), {"--json", "--max-tokens", "16"});
    std::istringstream out(chat(input, more).out);
    std::vector<Json> lines;
    for (std::string line; std::getline(out, line);) lines.push_back(Json::parse(line, nullptr, false));
    return lines;
  }

  // The greedy ids of `prompt`, which is taken as it is, behind BOS.
  [[nodiscard]] Json plain_ids(const std::string& prompt) const {
    const RunResult result =
        run_well(command("generate", {"--prompt", prompt, "--max-tokens", "16", "--json", "--log-level", "warn"}));
    return Json::parse(result.out, nullptr, false).at("ids");
  }

  TempFolder folder_;
};

TEST_F(ChatTest, TurnsPrefillOnlyWhatIsNewAndAnswerAsFromScratch) {
  const std::vector<Json> lines = turns("Where is the old house?\nAnd the moor?\nA third question\n");
  ASSERT_EQ(lines.size(), 3U);
  std::string conversation;
  const std::array<std::string, 3> questions = {"Where is the old house?", "And the moor?", "A third question"};
  int held = 0;  // tokens that the cache holds after the turn before
  for (std::size_t i = 0; i < 3; ++i) {
    const Json& line = lines[i];
    EXPECT_EQ(line.at("turn"), i + 1);
    conversation += "(user)" + questions[i] + "\n(assistant)";
    EXPECT_EQ(line.at("ids"), plain_ids(conversation)) << "turn " << i + 1;
    const int prompt = line.at("prompt_tokens");
    const int reused = line.at("reused_tokens");
    EXPECT_EQ(line.at("prefilled_tokens"), prompt - reused);
    // Where an answer ends inside of a word, the next prompt may cut its last tokens otherwise.
    EXPECT_GE(reused, std::max(0, held - 3));
    EXPECT_LE(reused, held);
    held = prompt + static_cast<int>(line.at("ids").size()) - 1;
    conversation += line.at("text").get<std::string>() + "\n";
  }
}

TEST_F(ChatTest, AnswersGoToStdoutAndAllElseToStderr) {
  const std::vector<Json> lines = turns("Where is the old house?\nAnd the moor?\n");
  const RunResult result = chat("Where is the old house?\r\n\n  \nAnd the moor?", {"--max-tokens", "16"});
  EXPECT_EQ(result.out, lines[0].at("text").get<std::string>() + "\n" + lines[1].at("text").get<std::string>() + "\n");
  EXPECT_TRUE(std::regex_search(
      result.err,
      std::regex("turn 2 \\| \\d+ tokens, \\d+ of them from the cache \\| TTFT [\\d.]+ ms \\| 16 tokens \\(length\\) "
                 "\\| TPOT [\\d.]+ ms\n$")))
      << result.err;
  EXPECT_EQ(chat("", {}).out, "");
  const RunResult sparse = chat("Where?\n", {"--max-tokens", "16", "--attention", "quest:token_budget=16"});
  EXPECT_NE(sparse.err.find("layers 2-7 quest: kept "), std::string::npos) << sparse.err;
}

TEST_F(ChatTest, CommandsAndTheSystemsTurn) {
  const std::vector<Json> lines = turns("One\nTwo\n/reset\n/help\n/nothing\n/a path\nOne\n/exit\nThree\n");
  ASSERT_EQ(lines.size(), 4U) << "\"/a path\" is a turn, \"Three\" comes after the end";
  const std::vector<Json> begun = turns("One\n/reset\nOne\n");
  EXPECT_EQ(begun[0].at("ids"), lines[0].at("ids"));
  EXPECT_EQ(begun[1].at("ids"), lines[0].at("ids")) << "a new conversation";
  EXPECT_EQ(begun[1].at("prefilled_tokens"), 1) << "the same prompt: its last token is fed for its logits";
  const RunResult result = chat("/nothing\n/help\n", {});
  EXPECT_NE(result.err.find("found the command /nothing, expected /reset, /exit or /help"), std::string::npos);
  EXPECT_NE(result.err.find("forget the conversation"), std::string::npos);
  const std::vector<Json> with_system = turns("One\n/reset\nOne\n", {"--system", "Be a ghost."});
  EXPECT_EQ(with_system[0].at("ids"), plain_ids("(system)Be a ghost.\n(user)One\n(assistant)"));
  EXPECT_EQ(with_system[1].at("ids"), with_system[0].at("ids"));
}

TEST_F(ChatTest, AFullContextIsSaidAndResetBeginsAnew) {
  const std::string long_turn(200, 'x');
  const std::vector<Json> lines =
      turns("One\n" + long_turn + "\nTwo\nThree\nFour\n/reset\nOne\n", {"--max-context", "64"});
  ASSERT_EQ(lines.size(), 6U);
  EXPECT_NE(lines[1].at("error").get<std::string>().find("the context is full: found "), std::string::npos) << lines[1];
  EXPECT_NE(lines[1].at("error").get<std::string>().find("expected fewer than 64 (--max-context); /reset"),
            std::string::npos);
  EXPECT_FALSE(lines[2].contains("error")) << "a shorter turn still fits: " << lines[2];
  EXPECT_TRUE(lines[4].contains("error")) << lines[4];
  EXPECT_EQ(lines[5].at("ids"), lines[0].at("ids"));
  const RunResult cut = chat("One\n", {"--max-context", "20"});
  EXPECT_NE(cut.err.find("the context is full: the answer ends here; /reset begins anew\n"), std::string::npos)
      << cut.err;
}

TEST_F(ChatTest, ABrokenTurnIsSaidAndTheConversationGoesOn) {
  const std::vector<Json> lines = turns("One\na\xFFz\nTwo\n");
  ASSERT_EQ(lines.size(), 3U);
  EXPECT_NE(lines[1].at("error").get<std::string>().find("no valid UTF-8 at byte offset 1"), std::string::npos);
  EXPECT_EQ(lines[2].at("ids"), turns("One\nTwo\n")[1].at("ids"));
}

TEST_F(ChatTest, CtrlCEndsTheAnswerNotTheProgram) {
  const std::vector<std::string> arguments = command("chat", {"--max-tokens", "12000"});
  const RunResult result = run_well(arguments, {.input = "One\n/reset\n/help\n", .interrupt_after = 40});
  EXPECT_GE(result.out.size(), 40U);
  EXPECT_TRUE(result.out.ends_with('\n'));
  EXPECT_NE(result.err.find("(interrupted)"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("forget the conversation"), std::string::npos) << "what came after was still read";
}

TEST_F(ChatTest, GenerateAsksOneTurn) {
  const std::string prompt = "(system)Be a ghost.\n(user)Where is the </s> house?\n(assistant)";
  const std::vector<std::string> arguments = command(
      "generate",
      {"--chat", "--system", "Be a ghost.", "--prompt", "Where is the </s> house?", "--max-tokens", "16", "--json"});
  const RunResult result = run_well(arguments);
  EXPECT_EQ(Json::parse(result.out, nullptr, false).at("ids"), plain_ids(prompt));
  EXPECT_EQ(result.err.find("chat template"), std::string::npos) << result.err;
  const RunResult hinted = run_well(command("generate", {"--prompt", "a", "--max-tokens", "1"}));
  EXPECT_NE(hinted.err.find("info: this model has a chat template"), std::string::npos) << hinted.err;
  EXPECT_EQ(run_well({"generate", "--model", demo_model(), "--prompt", "a", "--max-tokens", "1"}).err.find("template"),
            std::string::npos);
}

TEST_F(ChatTest, GenerationConfigEndsAndDraws) {
  const std::vector<Json> greedy = turns("One\n");
  const Json ids = greedy[0].at("ids");
  write_file(folder_ / "generation_config.json", Json{{"eos_token_id", {2, ids[4]}}}.dump());
  const std::vector<Json> ended = turns("One\n");
  EXPECT_EQ(ended[0].at("finish_reason"), "eos");
  EXPECT_LE(ended[0].at("ids").size(), 5U);
  EXPECT_EQ(ended[0].at("ids").back(), ids[4]);

  write_file(folder_ / "generation_config.json",
             R"({"do_sample": true, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.05})");
  const RunResult drawn = chat("One\n", {"--json", "--max-tokens", "16"});
  EXPECT_NE(Json::parse(drawn.out, nullptr, false).at("ids"), ids);
  EXPECT_NE(drawn.err.find("generation_config.json sets --temperature 1.5, --top-k 50, --top-p 0.9"), std::string::npos)
      << drawn.err;
  EXPECT_NE(drawn.err.find("repetition_penalty 1.05, which is not supported"), std::string::npos) << drawn.err;
  EXPECT_EQ(turns("One\n", {"--temperature", "0"})[0].at("ids"), ids) << "flags win";
  EXPECT_EQ(turns("One\n", {"--top-k", "1"})[0].at("ids"), ids);

  write_file(folder_ / "generation_config.json", R"({"do_sample": "yes"})");
  expect_names(refused(command("chat", {})), {"generation_config.json", "\"do_sample\"", "\"yes\""});
}

TEST_F(ChatTest, WrongRequestsAreRefused) {
  expect_names(refused({"chat", "--model", demo_model()}), {"chat_template.jinja", "tokenizer_config.json"});
  expect_names(refused({"generate", "--model", demo_model(), "--chat", "--prompt", "a"}), {"chat_template.jinja"});
  expect_names(refused({"chat", "--model", "synthetic:tiny"}), {"without a tokenizer"});
  expect_names(refused(command("generate", {"--chat", "--ids", "1"})), {"--chat", "--ids"});
  expect_names(refused(command("generate", {"--system", "a", "--prompt", "a"})), {"--system", "--chat"});
  expect_names(refused(command("chat", {"--system", "a\xFF"})), {"--system", "valid UTF-8"});
  write_file(folder_ / "chat_template.jinja", "{% for m in messages %}\n{{ m.content | shout }}{% endfor %}");
  expect_names(refused(command("chat", {})), {"chat_template.jinja, line 2", "\"shout\""});
  write_file(folder_ / "chat_template.jinja",
             "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn.') }}{% endif %}a");
  expect_names(refused(command("chat", {"--system", "x"})), {"\"No system turn.\""});
}

}  // namespace
}  // namespace vesper
