// generation_config.json: what it says, and what it may not say.
#include "models/generation_config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "models/model_config.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

GenerationConfig parsed(const char* text) {
  return parse_generation_config(Json::parse(text), 100, "generation_config.json");
}

TEST(GenerationConfig, SaysHowAnswersEndAndAreDrawn) {
  const GenerationConfig drawn = parsed(
      R"({"eos_token_id": [1, 8, 9], "do_sample": true, "temperature": 0.6, "top_p": 0.9, "transformers_version": "4"})");
  EXPECT_EQ(drawn.eos_ids, (std::vector<int>{1, 8, 9}));
  EXPECT_TRUE(drawn.do_sample);
  EXPECT_FLOAT_EQ(drawn.temperature, 0.6F);
  EXPECT_FLOAT_EQ(drawn.top_p, 0.9F);
  EXPECT_EQ(drawn.top_k, 50) << "transformers' default";
  EXPECT_TRUE(drawn.ignored.empty());
  EXPECT_EQ(parsed(R"({"eos_token_id": 7})").eos_ids, std::vector<int>{7});
  EXPECT_EQ(parsed(R"({"eos_token_id": null, "do_sample": null})").eos_ids, std::vector<int>{});
  EXPECT_EQ(parsed(R"({"do_sample": true, "top_k": 0})").top_k, 0);
  EXPECT_FALSE(parsed(R"({"temperature": 0.6, "top_k": 20})").do_sample);
}

TEST(GenerationConfig, NamesWhatIsNotSupported) {
  EXPECT_EQ(parsed(R"({"repetition_penalty": 1.05, "num_beams": 1, "min_p": null, "typical_p": 1.0})").ignored,
            std::vector<std::string>{"repetition_penalty 1.05"});
}

TEST(GenerationConfig, RefusesWrongValuesByKey) {
  const std::vector<std::pair<const char*, std::vector<std::string_view>>> cases = {
      {R"({"eos_token_id": 100})", {"\"eos_token_id\"", "100", "0 to 99"}},
      {R"({"eos_token_id": [1, -1]})", {"\"eos_token_id\"", "-1"}},
      {R"({"eos_token_id": "</s>"})", {"\"eos_token_id\"", "\"</s>\""}},
      {R"({"do_sample": 1})", {"\"do_sample\"", "true or false"}},
      {R"({"do_sample": true, "temperature": -1})", {"\"temperature\"", "-1"}},
      {R"({"do_sample": true, "temperature": "hot"})", {"\"temperature\"", "\"hot\""}},
      {R"({"do_sample": true, "top_p": 1.5})", {"\"top_p\"", "1.5"}},
      {R"({"do_sample": true, "top_k": 2.5})", {"\"top_k\"", "2.5"}},
      {R"([])", {"JSON of type array", "an object"}},
  };
  for (const auto& [text, parts] : cases) {
    const std::string message = refusal([text = text] { (void)parsed(text); });
    for (const std::string_view part : parts)
      EXPECT_NE(message.find(part), std::string::npos) << text << ": " << message;
  }
  EXPECT_NE(refusal([] {
              (void)parsed(("{\"eos_token_id\": [1" + std::string(4000, ' ') + "]}").c_str());
              (void)parse_generation_config({{"eos_token_id", std::vector<int>(2000, 1)}}, 100, "f");
            }).find("2000 ids"),
            std::string::npos);
}

TEST(GenerationConfig, ItsEndIdsTakeThePlaceOfTheModels) {
  const TempFolder folder;
  write_file(folder / "config.json",
             R"({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 64,
                 "num_attention_heads": 2, "intermediate_size": 16, "eos_token_id": 2})");
  EXPECT_EQ(load_model_config(folder.path()).eos_ids, std::vector<int>{2});
  write_file(folder / "generation_config.json", R"({"bos_token_id": 1})");
  EXPECT_EQ(load_model_config(folder.path()).eos_ids, std::vector<int>{2});
  write_file(folder / "generation_config.json", R"({"eos_token_id": [3, 4]})");
  EXPECT_EQ(load_model_config(folder.path()).eos_ids, (std::vector<int>{3, 4}));
}

}  // namespace
}  // namespace vesper
