// tokenizer.json: what is taken, what is refused by name, and what comes of it.
#include "tokenizer/tokenizer_json.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/tokenizer/small_tokenizers.h"
#include "tokenizer/tiktoken_file.h"

namespace vesper {
namespace {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;
using Change = std::function<void(json&)>;

std::unique_ptr<Tokenizer> load(json document, const Change& change = {}) {
  if (change) change(document);
  return parse_tokenizer_json(document.dump(), "x.json", {});
}

void expect_refusal(json document, const Change& change, const std::string& reason) {
  change(document);
  const std::string message = refusal_of([&] { (void)parse_tokenizer_json(document.dump(), "x.json", {}); });
  EXPECT_NE(message.find(reason), std::string::npos) << "expected " << reason << " in: " << message;
  EXPECT_NE(message.find("x.json"), std::string::npos) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

json step(const std::string& type) {
  return {{"type", type}};
}

TEST(TokenizerJson, EncodesByBytes) {
  const std::unique_ptr<Tokenizer> tokenizer = load(byte_level_json());
  EXPECT_EQ(tokenizer->encode("abc ab  abx"), (Ids{257, ' ', 256, ' ', ' ', 256, 'x'}));
  EXPECT_EQ(tokenizer->encode(""), Ids{});
  EXPECT_EQ(tokenizer->encode("\u00E9"), (Ids{0xC3, 0xA9}));
  EXPECT_EQ(tokenizer->token_bytes(0xC3), "\xC3");
  EXPECT_EQ(tokenizer->token_bytes(259), " ab");
  EXPECT_EQ(tokenizer->first_token_bytes(259), " ab");
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->bos_id(), -1);
}

TEST(TokenizerJson, TakesMergesAsPairsToo) {
  const auto pairs = [](json& document) {
    for (json& merge : document["model"]["merges"]) {
      const std::string line = merge;
      const std::size_t space = line.find(' ');
      merge = {line.substr(0, space), line.substr(space + 1)};
    }
  };
  EXPECT_EQ(load(byte_level_json(), pairs)->encode("abc ab"), load(byte_level_json())->encode("abc ab"));
}

TEST(TokenizerJson, SplitsBeforeItMerges) {
  const auto split = [](const char* kind, const char* pattern) {
    return [=](json& document) {
      const json cut = {{"type", "Split"}, {"pattern", {{kind, pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
      const json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
      document["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {cut, bytes}}};
    };
  };
  EXPECT_EQ(load(byte_level_json(), split("Regex", "b"))->encode("abc a b"), (Ids{'a', 'b', 'c', 258, ' ', 'b'}));
  EXPECT_EQ(load(byte_level_json(), split("String", "c a"))->encode("abc ab"), (Ids{256, 'c', 258, 'b'}));
}

TEST(TokenizerJson, EncodesWithMarksForSpaces) {
  const std::unique_ptr<Tokenizer> tokenizer = load(marked_json());
  EXPECT_EQ(tokenizer->encode("ab"), Ids{11});
  EXPECT_EQ(tokenizer->encode(" ab a"), (Ids{6, 11, 9}));
  EXPECT_EQ(tokenizer->encode("\u20AC"), (Ids{6, 3, 4, 5}));
  EXPECT_EQ(tokenizer->encode("xyb"), (Ids{6, 0, 8}));  // one unknown token for both
  EXPECT_EQ(tokenizer->encode(""), Ids{});
  EXPECT_EQ(tokenizer->encode_prompt("ab"), (Ids{1, 11}));
  EXPECT_EQ(tokenizer->decode(Ids{1, 11, 9, 6, 3, 4, 5, 2}), "ab a \u20AC");
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("  a b")), "  a b");
  EXPECT_EQ(tokenizer->token_bytes(11), " ab");
  EXPECT_EQ(tokenizer->first_token_bytes(11), "ab");
  EXPECT_EQ(tokenizer->token_bytes(1), "");
}

TEST(TokenizerJson, MetaspaceMarksAlwaysFirstOrNever) {
  const auto metaspace = [](const char* scheme, bool split) {
    return [=](json& document) {
      document["normalizer"] = nullptr;
      document["pre_tokenizer"] = {
          {"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", scheme}, {"split", split}};
      document["decoder"] = document["pre_tokenizer"];
    };
  };
  const auto always = load(marked_json(), metaspace("always", true));
  EXPECT_EQ(always->encode_with_special("ab<s>ab"), (Ids{11, 1, 11}));
  EXPECT_EQ(always->encode(" ab"), Ids{11});  // begins with a mark already
  EXPECT_EQ(always->decode(Ids{11, 9}), "ab a");
  const auto first = load(marked_json(), metaspace("first", false));
  EXPECT_EQ(first->encode_with_special("ab<s>ab"), (Ids{11, 1, 10}));
  EXPECT_EQ(first->encode_with_special("<s>ab"), (Ids{1, 10}));
  const auto never = load(marked_json(), metaspace("never", false));
  EXPECT_EQ(never->encode("ab ab"), (Ids{10, 11}));
  EXPECT_EQ(never->decode(Ids{11}), " ab");
}

TEST(TokenizerJson, SpecialTokensAreTextUnlessAskedFor) {
  const auto add = [](json& document) {
    document["added_tokens"].push_back({{"id", 14}, {"content", "<|a|>"}, {"special", true}});
    document["added_tokens"].push_back({{"id", 15}, {"content", "<b>"}, {"special", false}, {"normalized", false}});
  };
  const auto tokenizer = load(marked_json(), add);
  EXPECT_EQ(tokenizer->vocab(), 16);
  EXPECT_EQ(tokenizer->id_of("<|a|>"), 14);
  EXPECT_EQ(tokenizer->id_of("ab"), 10);
  EXPECT_EQ(tokenizer->id_of("nothing"), -1);
  EXPECT_EQ(tokenizer->encode("a<|a|><b>a"), (Ids{9, 0, 7, 0, 15, 9}));
  EXPECT_EQ(tokenizer->encode_with_special("a<|a|><b>a"), (Ids{9, 14, 15, 9}));
  const TextRange user = {6, 11};
  EXPECT_EQ(tokenizer->encode_with_special("<|a|>a<|a|><|a|>", {&user, 1}), (Ids{14, 9, 0, 7, 0, 14}));
  EXPECT_EQ(tokenizer->token_bytes(14), "");
  EXPECT_EQ(tokenizer->token_bytes(15), "<b>");
}

TEST(TokenizerJson, NormalizedTokensAreSoughtInTheNormalizedText) {
  const auto normalized = [](json& document) {
    for (json& token : document["added_tokens"]) token["normalized"] = true;
  };
  const auto tokenizer = load(marked_json(), normalized);  // sought is "▁<s>"
  EXPECT_EQ(tokenizer->encode_with_special("<s> a"), (Ids{1, 9}));
  EXPECT_EQ(tokenizer->encode_with_special("a <s>"), (Ids{9, 1}));
  EXPECT_EQ(tokenizer->encode_with_special("a<s>"), (Ids{9, 0}));
  const TextRange user = {1, 4};  // the template's space may not help what a user wrote
  EXPECT_EQ(tokenizer->encode_with_special(" <s> <s>", {&user, 1}), (Ids{6, 6, 0, 1}));
}

TEST(TokenizerJson, RefusesFeaturesByName) {
  const auto set = [](const char* key, const json& value) { return [=](json& document) { document[key] = value; }; };
  const auto model = [](const char* key, const json& value) {
    return [=](json& document) { document["model"][key] = value; };
  };
  expect_refusal(marked_json(), model("type", "Unigram"), "\"Unigram\"");
  expect_refusal(marked_json(), model("dropout", 0.1), "dropout");
  expect_refusal(marked_json(), model("continuing_subword_prefix", "##"), "continuing_subword_prefix");
  expect_refusal(marked_json(), model("end_of_word_suffix", "</w>"), "end_of_word_suffix");
  expect_refusal(marked_json(), model("new_setting", 1), "\"new_setting\"");
  for (const char* type : {"Lowercase", "NFKC", "Precompiled", "StripAccents", "BertNormalizer"}) {
    expect_refusal(marked_json(), set("normalizer", step(type)), std::string("\"") + type + "\"");
    expect_refusal(marked_json(), set("normalizer", {{"type", "Sequence"}, {"normalizers", {step("NFC"), step(type)}}}),
                   std::string("\"") + type + "\"");
  }
  expect_refusal(marked_json(),
                 set("normalizer", {{"type", "Replace"}, {"pattern", {{"Regex", " +"}}}, {"content", ""}}), "Regex");
  for (const char* type : {"Digits", "Whitespace", "BertPreTokenizer", "UnicodeScripts", "Punctuation"}) {
    expect_refusal(byte_level_json(), set("pre_tokenizer", step(type)), std::string("\"") + type + "\"");
  }
  expect_refusal(byte_level_json(), set("pre_tokenizer", step("ByteLevel")), "add_prefix_space");
  const json removed = {{"type", "Split"}, {"pattern", {{"String", " "}}}, {"behavior", "Removed"}};
  expect_refusal(byte_level_json(), set("pre_tokenizer", removed), "a Split with behavior \"Removed\"");
  for (const char* type : {"WordPiece", "BPEDecoder", "CTC"}) {
    expect_refusal(marked_json(), set("decoder", step(type)), std::string("\"") + type + "\"");
  }
  expect_refusal(marked_json(), set("decoder", nullptr), "no decoder");
  expect_refusal(marked_json(), set("decoder", step("ByteLevel")), "of which one is ByteLevel");
  expect_refusal(byte_level_json(), set("decoder", step("Fuse")), "of which one is ByteLevel");
  const json strip = {{"type", "Strip"}, {"content", " "}, {"start", 2}, {"stop", 0}};
  expect_refusal(marked_json(), set("decoder", {{"type", "Sequence"}, {"decoders", {step("Fuse"), strip}}}), "a Strip");
  for (const char* type : {"BertProcessing", "RobertaProcessing"}) {
    expect_refusal(marked_json(), set("post_processor", step(type)), std::string("\"") + type + "\"");
  }
  expect_refusal(
      marked_json(),
      [](json& document) {
        document["post_processor"]["single"].push_back({{"SpecialToken", {{"id", "</s>"}, {"type_id", 0}}}});
      },
      "a template that puts \"</s>\" behind the text");
}

TEST(TokenizerJson, RefusesATemplateWithAnUnknownId) {
  expect_refusal(
      marked_json(),
      [](json& document) {
        for (auto& [name, token] : document["post_processor"]["special_tokens"].items()) token["ids"] = {4194303};
      },
      "a template that puts the token 4194303 before the text");
}

TEST(TokenizerJson, RefusesWhatIsBroken) {
  const auto vocab = [](const char* piece, const json& id) {
    return [=](json& document) { document["model"]["vocab"][piece] = id; };
  };
  expect_refusal(marked_json(), vocab("x", 3), "the id 3");
  expect_refusal(marked_json(), vocab("x", -1), "the id -1");
  expect_refusal(marked_json(), vocab("x", 4194304), "the id 4194304");
  expect_refusal(marked_json(), vocab("x", 1000000000000000000), "1000000000000000000");
  expect_refusal(marked_json(), vocab("x", "14"), "for the piece \"x\"");
  expect_refusal(marked_json(), vocab("x", 20), "no piece for the id 14 of 21");
  expect_refusal(marked_json(), vocab("", 14), "an empty piece");
  const auto merge = [](const json& value) {
    return [=](json& document) { document["model"]["merges"].push_back(value); };
  };
  expect_refusal(marked_json(), merge("a x"), "where \"x\" is no piece");
  expect_refusal(marked_json(), merge("b a"), "where \"ba\" is no piece");
  for (const json& value : {json("ab"), json("a b c"), json(" "), json(3), json::array({"a"}), json::array({"a", 1})}) {
    expect_refusal(marked_json(), merge(value), "merge");
  }
  expect_refusal(
      marked_json(), [](json& document) { document["model"]["unk_token"] = "<no>"; }, "the unk_token \"<no>\"");
  const auto added = [](const json& value) {
    return [=](json& document) { document["added_tokens"].push_back(value); };
  };
  expect_refusal(marked_json(), added({{"id", 16}, {"content", "<x>"}}), "the id 16");
  expect_refusal(marked_json(), added({{"id", 7}, {"content", "<x>"}}), "the id 7");
  expect_refusal(marked_json(), added({{"id", 14}, {"content", "ab"}}), "expected 10");
  expect_refusal(marked_json(), added({{"id", 1e12}, {"content", "<x>"}}), "without an id in range");
  expect_refusal(marked_json(), added({{"content", "<x>"}}), "without an id in range");
  expect_refusal(marked_json(), added(3), "added token");
  for (const char* key : {"model", "decoder", "normalizer", "pre_tokenizer", "post_processor"}) {
    expect_refusal(
        marked_json(), [=](json& document) { document[key] = 3; }, key);
  }
  for (const char* key : {"vocab", "merges"}) {
    expect_refusal(
        marked_json(), [=](json& document) { document["model"].erase(key); }, key);
  }
  const auto refused = [](std::string_view text) {
    return refusal_of([&] { (void)parse_tokenizer_json(text, "x.json", {}); }).find("x.json") != std::string::npos;
  };
  EXPECT_TRUE(refused(""));
  EXPECT_TRUE(refused("[]"));
  EXPECT_TRUE(refused("{\"model\": \"\xFF\"}"));
  EXPECT_TRUE(refused(R"({"model": {"vocab": {"a": 0, "a": 1}, "merges": []}})"));
}

// One value after another is replaced by something else: a refusal or a tokenizer, never anything worse.
TEST(TokenizerJson, EveryPartMayBeWrong) {
  for (const json& sound : {byte_level_json(), marked_json()}) {
    const json flat = sound.flatten();
    int number = 0;
    for (const auto& [path, value] : flat.items()) {
      if (path.starts_with("/model/vocab/") && number++ % 16 != 0) continue;
      for (const json& wrong : {json(nullptr), json(-1), json(1e300), json(""), json("\u2581"), json::array(),
                                json::object(), json(true)}) {
        json document = sound;
        document[json::json_pointer(path)] = wrong;
        const std::string message = refusal_of([&] {
          const auto tokenizer = parse_tokenizer_json(document.dump(), "x.json", {});
          (void)tokenizer->decode(tokenizer->encode("ab \u00E9<s>"));
        });
        EXPECT_EQ(message.find('\n'), std::string::npos) << message;
      }
    }
  }
}

// Both came to gigabytes out of a file of two kilobytes.
TEST(TokenizerJson, ReplacementsMayNotMakeATextLongerAndLonger) {
  const json longer = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", std::string(40, 'a')}};
  const std::unique_ptr<Tokenizer> encoder = load(marked_json(), [&](json& document) {
    document["normalizer"] = {{"type", "Sequence"}, {"normalizers", std::vector<json>(12, longer)}};
  });
  EXPECT_EQ(encoder->encode("b").size(), 1U);
  EXPECT_NE(refusal_of([&] { (void)encoder->encode("bab"); }).find("longer and longer"), std::string::npos);

  const std::unique_ptr<Tokenizer> decoder = load(marked_json(), [&](json& document) {
    document["decoder"]["decoders"] = std::vector<json>(12, longer);
    document["decoder"]["decoders"].push_back(step("Fuse"));
  });
  EXPECT_NE(refusal_of([&] { (void)decoder->decode(decoder->encode("a")); }).find("longer and longer"),
            std::string::npos);

  const std::unique_ptr<Tokenizer> prepender = load(marked_json(), [&](json& document) {
    const json prepend = {{"type", "Prepend"}, {"prepend", std::string(4000, 'a')}};
    document["normalizer"] = {{"type", "Sequence"}, {"normalizers", std::vector<json>(20, prepend)}};
  });
  EXPECT_NE(refusal_of([&] { (void)prepender->encode("a"); }).find("longer and longer"), std::string::npos);
}

TEST(TokenizerJson, TheMarkForSpacesIsOneCharacter) {
  for (const std::string mark : {"", "aa", "\u2581\u2581"}) {
    expect_refusal(
        marked_json(),
        [&](json& document) {
          document["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", mark}};
        },
        "one character");
  }
}

TEST(Tiktoken, ReadsRanks) {
  const Vocabulary vocabulary = read_tiktoken_ranks("IQ== 0\nIiM= 2\n/+8A 1\n\n", "x");
  EXPECT_EQ(vocabulary.size(), 3);
  EXPECT_EQ(vocabulary.find("!"), 0);
  EXPECT_EQ(vocabulary.find(std::string("\xFF\xEF\0", 3)), 1);
  EXPECT_EQ(vocabulary.find("\"#"), 2);
}

TEST(Tiktoken, RefusesBrokenLines) {
  for (const char* text :
       {"IQ==", "IQ== ", "IQ== x", "IQ== 0 0", "IQ== -1", "IQ== 99999999999", "I 0", "IQ= 0", "I!== 0", " 0", "IR== 0",
        "=Q== 0", "IQ== 0\nIQ== 1", "IQ== 0\nIg== 0", "IQ== 1", "IQ== 0x", "IQ==\t0", "==== 0"}) {
    const std::string message = refusal_of([&] { (void)read_tiktoken_ranks(text, "x.model"); });
    EXPECT_NE(message.find("x.model"), std::string::npos) << text << ": " << message;
  }
}

TEST(Tiktoken, IsToldByItsFirstLine) {
  EXPECT_TRUE(is_tiktoken_text("IQ== 0\n"));
  EXPECT_TRUE(is_tiktoken_text("AAAA 0"));
  for (const std::string text : {"", "IQ==", "IQ== ", "IQ== x", "\n\x0E", "{\"a\": 1}", "a b", "== 0", "\n\x05<unk>"}) {
    EXPECT_FALSE(is_tiktoken_text(text)) << testing::PrintToString(text);
  }
}

TEST(TokenizerJson, AMegabyteWithoutSpacesIsNotQuadratic) {
  const auto start = std::chrono::steady_clock::now();
  for (const json& document : {byte_level_json(), marked_json()}) {
    const auto tokenizer = load(document);
    for (const char* unit : {"a", "ab", "abc", "\u20AC"}) {
      std::string text;
      while (text.size() < std::size_t{1} << 20U) text += unit;
      EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
    }
  }
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 60.0);
}

}  // namespace
}  // namespace vesper
