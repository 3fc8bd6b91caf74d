// Chat templates against transformers: whole templates, and small pieces of Jinja one by one. cases.json is made by
// tests/tokenizer/make_chat_cases.py.
#include "tokenizer/chat_template.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "engine/core/json.h"
#include "tests/models/files.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

const std::string kFolder = source_dir() + "/tests/golden/chat";

const Json& document() {
  static const Json kDocument = read_json_file(kFolder + "/cases.json");
  return kDocument;
}

// "2026-03-07T14:05:09", with the day of the week and of the year.
std::tm fixed_now() {
  std::tm now{};
  EXPECT_NE(strptime(document().at("now").get<std::string>().c_str(), "%Y-%m-%dT%H:%M:%S", &now), nullptr);
  return now;
}

std::vector<ChatMessage> conversation(const std::string& name) {
  std::vector<ChatMessage> messages;
  for (const Json& message : document().at("conversations").at(name)) {
    messages.push_back({message.at("role").get<std::string>(), message.at("content").get<std::string>()});
  }
  return messages;
}

// The rendered text, or the message of the refusal.
struct Outcome {
  ChatText text;
  std::string refusal;
};

Outcome rendered(const ChatTemplate& chat, const std::string& name, bool prompt) {
  try {
    return {chat.render(conversation(name), prompt, fixed_now()), ""};
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput) << error.what();
    return {{}, error.what()};
  }
}

Outcome rendered(const std::string& text, const std::string& name = "turns",
                 const ChatTemplate::TokenNames& tokens = {{"bos_token", "<s>"}, {"eos_token", "</s>"}}) {
  try {
    return rendered(ChatTemplate(text, "a.jinja", tokens), name, false);
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput) << error.what();
    return {{}, error.what()};
  }
}

void expect_outcome(const Outcome& outcome, const Json& expected, const std::string& what) {
  if (expected.is_null()) {
    expect_names(outcome.refusal, {", line "});
    EXPECT_FALSE(outcome.refusal.empty()) << what << " was rendered as " << outcome.text.bytes();
    return;
  }
  EXPECT_EQ(outcome.refusal, "") << what;
  EXPECT_EQ(outcome.text.bytes(), expected.get<std::string>()) << what;
}

TEST(ChatTemplate, SnippetsGiveWhatTransformersGives) {
  ASSERT_GT(document().at("snippets").size(), 100U);
  for (const Json& snippet : document().at("snippets")) {
    const auto text = snippet.at("template").get<std::string>();
    expect_outcome(rendered(text), snippet.at("expected"), text);
  }
}

std::string assets() {
  const char* folder = std::getenv("VESPER_ASSETS");
  return folder == nullptr ? "" : folder;
}

// The cases that a filter takes; how many they were.
template <typename Takes, typename Load>
int check_cases(const Takes& takes, const Load& load) {
  int checked = 0;
  for (const Json& one : document().at("cases")) {
    if (!takes(one)) continue;
    ++checked;
    expect_outcome(rendered(load(one), one.at("conversation"), one.at("add_generation_prompt")), one.at("expected"),
                   one.at("name"));
  }
  return checked;
}

ChatTemplate from_file(const Json& one, const std::string& path) {
  ChatTemplate::TokenNames tokens;
  for (const auto& [name, token] : one.at("tokens").items()) tokens.emplace_back(name, token.get<std::string>());
  return {read_file(path), path, tokens};
}

TEST(ChatTemplate, FamiliesGiveWhatTransformersGives) {
  const int checked =
      check_cases([](const Json& one) { return one.contains("file"); },
                  [](const Json& one) { return from_file(one, kFolder + "/" + one.at("file").get<std::string>()); });
  EXPECT_EQ(checked, 70);
}

TEST(ChatTemplate, RealTemplatesGiveWhatTransformersGives) {
  if (assets().empty()) GTEST_SKIP() << "VESPER_ASSETS is not set: a folder with vectors/chat_templates";
  const int from_templates =
      check_cases([](const Json& one) { return one.contains("asset"); },
                  [](const Json& one) { return from_file(one, assets() + "/" + one.at("asset").get<std::string>()); });
  EXPECT_EQ(from_templates, 42);
  const int from_folders = check_cases(
      [](const Json& one) { return one.contains("asset_folder"); },
      [](const Json& one) { return load_chat_template(assets() + "/" + one.at("asset_folder").get<std::string>()); });
  EXPECT_EQ(from_folders, 42);
}

// The parts of a text that came with messages, between brackets.
std::string with_origins(const ChatText& text) {
  std::string out;
  std::size_t at = 0;
  for (const TextRange& range : text.message_ranges()) {
    out += text.bytes().substr(at, range.begin - at) + '[' + text.bytes().substr(range.begin, range.end - range.begin) +
           ']';
    at = range.end;
  }
  return out + text.bytes().substr(at);
}

TEST(ChatTemplate, BytesKeepTheirOrigin) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"<s>{{ messages[0].content }}</s>", "<s>[Hello, who are you?]</s>"},
      {"{{ 'a' + messages[0].content.strip()[0:5] ~ 'b' }}", "a[Hello]b"},
      {"{{ messages[0].content | replace('Hello', '<s>') }}", "<s>[, who are you?]"},
      {"{{ messages[0].content.split(',')[1] | trim | upper }}", "[WHO ARE YOU?]"},
      {"{{ messages[0].content | list | first }}{{ messages[0].content[-1] }}!", "[H?]!"},
      {"{{ messages[0] | tojson }}", R"({"role": "user", "content": "[Hello, who are you?]"})"},
      {"{{ [messages[0].role, messages[0].content] | join(': ') }}", "user: [Hello, who are you?]"},
      {"{% set x %}<{{ messages[0].content }}>{% endset %}{{ x[::-1] }}", ">[?uoy era ohw ,olleH]<"},
      {"{% set d = {messages[0].content: 1} %}{% for k in d %}({{ k }}){% endfor %}", "([Hello, who are you?])"},
      {"{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(messages[0].content) * 2 }}",
       "<[Hello, who are you?]><[Hello, who are you?]>"},
  };
  for (const auto& [text, expected] : cases) {
    const Outcome outcome = rendered(text, "user");
    EXPECT_EQ(outcome.refusal, "") << text;
    EXPECT_EQ(with_origins(outcome.text), expected) << text;
  }
}

TEST(ChatTemplate, RefusesWhatItDoesNotKnowByNameAndLine) {
  const std::vector<std::pair<std::string, std::vector<std::string_view>>> cases = {
      {"a\n{% include 'x' %}", {"a.jinja, line 2", "\"include\"", "set, for, if"}},
      {"{% raw %}x{% endraw %}", {"\"raw\""}},
      {"{{ x }}\n\n{{ 'a' | wordwrap }}", {"line 3", "the filter \"wordwrap\"", "trim, upper"}},
      {"{{ 1 is prime }}", {"the test \"prime\"", "defined"}},
      {"{{ 'a'.zfill(3) }}", {"the method \"zfill\" of a text"}},
      {"{{ [1].append(2) }}", {"the method \"append\" of a list"}},
      {"{{ {}.update(a=1) }}", {"the method \"update\" of a mapping"}},
      {"{{ lipsum() }}", {"\"lipsum\", which is not defined"}},
      {"{% for i in [1] %}{{ loop.cycle(1) }}{% endfor %}", {"loop.cycle", "previtem"}},
      {"{% for i in [1] recursive %}{% endfor %}", {"a recursive for"}},
      {"{{ {'a': 1} }}", {"a mapping as what is printed", "tojson"}},
      {"{{ 'a' | tojson(sort_keys=true) }}", {"\"sort_keys\" to the filter tojson"}},
      {"{{ 'a' | tojson(ensure_ascii=true) }}", {"ensure_ascii"}},
      {"{{ '\xC3\xA9' | upper }}", {"upper of a text with characters beyond ASCII"}},
      {"{{ f(*x) }}", {"\"*\"", "an expression"}},
      {"{{ 1_000 }}", {"the number \"1_\""}},
      {"{{ 99999999999999999999 }}", {"64 bits"}},
      {"{{ 9223372036854775807 + 1 }}", {"a result of + beyond 64 bits"}},
      {"{{ '\\ud83d' }}", {"\"d83d\""}},
      {"{{ messages.items }}{{ messages[0].items }}", {"the method \"items\" without a call"}},
      {"{% for i in [1] %}{% macro m() %}{% endmacro %}{% endfor %}", {"a macro inside of a loop"}},
      {"{{ raise_exception('Say \"user\" first\\n') }}", {"refuses with \"Say \\\"user\\\" first\\n\""}},
      {"\n{% if true %}\n{{ 1 + 'a' }}{% endif %}", {"line 3", "between a whole number and a text"}},
      {"{{ [1,\n 2,\n nothing.x] }}", {"line 3", "\"nothing\", which is not defined"}},
      {"a\xFF", {"no UTF-8 at byte offset 1"}},
  };
  for (const auto& [text, parts] : cases) {
    const Outcome outcome = rendered(text);
    for (const std::string_view part : parts) {
      EXPECT_NE(outcome.refusal.find(part), std::string::npos) << text << ": " << outcome.refusal;
    }
  }
}

std::string repeated(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

std::string rendered_from(const TempFolder& folder) {
  const std::vector<ChatMessage> messages = {{"user", "hi"}};
  return load_chat_template(folder.path()).render(messages, false, fixed_now()).bytes();
}

TEST(ChatTemplate, IsFoundWhereTransformersFindsIt) {
  const TempFolder folder;
  EXPECT_FALSE(has_chat_template(folder.path()));
  expect_names(refusal([&] { (void)load_chat_template(folder.path()); }),
               {folder.path(), "chat_template.jinja", "chat_template.json", "tokenizer_config.json"});
  write_file(folder / "special_tokens_map.json", R"({"bos_token": {"content": "<m>"}, "eos_token": "</m>"})");
  write_file(folder / "tokenizer_config.json", R"({"bos_token": "<c>", "eos_token": null, "chat_template": null})");
  EXPECT_FALSE(has_chat_template(folder.path()));
  write_file(folder / "tokenizer_config.json",
             R"({"bos_token": "<c>", "eos_token": null, "chat_template": "c{{ bos_token }}{{ eos_token }}"})");
  EXPECT_TRUE(has_chat_template(folder.path()));
  EXPECT_EQ(rendered_from(folder), "c<c></m>");
  write_file(folder / "chat_template.json", R"({"chat_template": "j{{ messages[0].content }}"})");
  EXPECT_EQ(rendered_from(folder), "jhi");
  write_file(folder / "chat_template.jinja", "f{{ messages[0].content }}\n");
  EXPECT_EQ(rendered_from(folder), "fhi");
}

TEST(ChatTemplate, OfSeveralTheDefaultIsTaken) {
  const TempFolder folder;
  const std::string path = folder / "tokenizer_config.json";
  write_file(path, R"({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]})");
  EXPECT_EQ(rendered_from(folder), "d");
  write_file(path, R"({"chat_template": [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]})");
  expect_names(refusal([&] { (void)load_chat_template(folder.path()); }),
               {path, R"("rag", "tool_use")", "\"default\""});
  write_file(path, R"({"chat_template": [{"name": "rag"}]})");
  expect_names(refusal([&] { (void)load_chat_template(folder.path()); }), {path, "JSON of type array"});
  write_file(path, R"({"chat_template": 7})");
  expect_names(refusal([&] { (void)load_chat_template(folder.path()); }), {path, "JSON of type number"});
  write_file(path, R"({"chat_template": "x", "bos_token": ["<s>"]})");
  expect_names(refusal([&] { (void)load_chat_template(folder.path()); }),
               {path, "\"bos_token\"", "JSON of type array"});
  write_file(path, "[]");
  expect_names(refusal([&] { (void)load_chat_template(folder.path()); }), {path, "JSON of type array", "an object"});
}

TEST(ChatTemplate, HostileTemplatesEndWithOneSentence) {
  const std::string loop = "{% for i in range(100000) %}";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {loop + loop + "{% endfor %}{% endfor %}", "128 MiB"},
      {"{% set ns = namespace(x='ab') %}" + loop + "{% set ns.x = ns.x + ns.x %}{% endfor %}", "128 MiB"},
      {"{{ 'a' * 9000000000000000000 }}", "goes on and on"},
      {"{{ '' * 9000000000000000000 }}", "goes on and on"},
      {"{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}", "128 MiB"},
      {"{{ range(100000) | list * 3 }}", "the operator *"},
      {"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "inside each other"},
      {repeated("{% if true %}", 5000), "nesting deeper than 100 levels"},
      {"{{ " + repeated("(", 100000) + repeated(")", 100000) + " }}", "nesting deeper than 100 levels"},
      {"{{ " + repeated("-", 100000) + "1 }}", "nesting deeper than 100 levels"},
      {"{{ " + repeated("not ", 100000) + "1 }}", "nesting deeper than 100 levels"},
      {"{{ 1" + repeated("+1", 100000) + " }}", "nesting deeper than 100 levels"},
      {"{{ a" + repeated(".a", 100000) + " }}", "nesting deeper than 100 levels"},
      {"{{ a" + repeated("|trim", 100000) + " }}", "nesting deeper than 100 levels"},
      {"{{ 1" + repeated(" if 1", 100000) + " }}", "nesting deeper than 100 levels"},
      {repeated("{{ [", 300000), "expected"},
      {std::string((1 << 20) + 1, 'a'), "at most 1048576"},
      {"{{ 2 ** 9000000000000000000 }}", "beyond 64 bits"},
      {"{{ (-1) ** 9000000000000000001 }}{{ nothing.x }}", "not defined"},
      {"{{ -9223372036854775807 // -1 }}{{ (-9223372036854775807 - 1) // -1 }}", "beyond 64 bits"},
      {"{{ [1][9223372036854775807:-9223372036854775807:-9223372036854775807] | length }}{{ nothing.x }}",
       "not defined"},
      {"{{ strftime_now('%99999999d') }}", "255 bytes"},
      {"{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a == ns.a }}{{ ns.a | tojson }}", "a namespace"},
  };
  for (const auto& [text, expected] : cases) {
    const Outcome outcome = rendered(text);
    EXPECT_NE(outcome.refusal.find(expected), std::string::npos) << text.substr(0, 200) << ": " << outcome.refusal;
  }
}

}  // namespace
}  // namespace vesper
