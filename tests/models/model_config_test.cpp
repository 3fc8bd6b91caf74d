#include "models/model_config.h"

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "engine/core/json.h"
#include "models/weight_table.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

ModelConfig parse(const std::string& text) {
  return parse_model_config(parse_json(text, "c/config.json"), "c/config.json");
}

// The refusal of a Llama config with one more key.
std::string refusal_with(const std::string& members) {
  const std::string message =
      refusal([&] { (void)parse(R"({"architectures":["LlamaForCausalLM"],)" + members + "}"); });
  expect_names(message, {"c/config.json"});
  return message;
}

TEST(ModelConfig, AbsentKeysTakeHuggingFacesDefaults) {
  const ModelConfig config = parse(R"({"architectures":["LlamaForCausalLM"]})");
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.layers, 32);
  EXPECT_EQ(config.hidden, 4096);
  EXPECT_EQ(config.heads, 32);
  EXPECT_EQ(config.kv_heads, 32);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.ffn, 11008);
  EXPECT_EQ(config.vocab, 32000);
  EXPECT_EQ(config.rms_eps, 1e-6F);
  EXPECT_EQ(config.rope_theta, 10000.0);
  EXPECT_EQ(config.max_positions, 2048);
  EXPECT_FALSE(config.tied_embeddings);
  EXPECT_EQ(config.dtype, DType::kF32);
  EXPECT_EQ(config.bos_id, 1);
  EXPECT_EQ(config.eos_ids, std::vector<int>{2});
  EXPECT_EQ(config.parameters(), 6'738'415'616);  // Llama 2 7B
}

TEST(ModelConfig, ReadsBothGenerationsOfKeys) {
  const ModelConfig old = parse(R"({"architectures":["LlamaForCausalLM"],"hidden_size":96,"num_attention_heads":6,
      "num_key_value_heads":2,"head_dim":64,"rope_theta":500000,"rope_scaling":null,"torch_dtype":"float16",
      "eos_token_id":[5,7],"bos_token_id":null,"tie_word_embeddings":true,"pretraining_tp":4,"hidden_act":"silu",
      "attention_bias":false,"mlp_bias":false,"quantization_config":null,"rms_norm_eps":1e-05})");
  EXPECT_EQ(old.q_rows(), 384);
  EXPECT_EQ(old.kv_rows(), 128);
  EXPECT_EQ(old.rope_theta, 500000.0);
  EXPECT_EQ(old.dtype, DType::kF16);
  EXPECT_EQ(old.eos_ids, (std::vector<int>{5, 7}));
  EXPECT_EQ(old.bos_id, -1);
  EXPECT_TRUE(old.tied_embeddings);
  EXPECT_EQ(old.rms_eps, 1e-5F);

  const ModelConfig recent = parse(R"({"model_type":"llama","dtype":"bfloat16","head_dim":null,"eos_token_id":null,
      "rope_parameters":{"rope_type":"default","rope_theta":1000000.0},"num_key_value_heads":null})");
  EXPECT_EQ(recent.architecture, "LlamaForCausalLM");
  EXPECT_EQ(recent.rope_theta, 1e6);
  EXPECT_EQ(recent.dtype, DType::kBf16);
  EXPECT_EQ(recent.head_dim, 128);
  EXPECT_EQ(recent.kv_heads, 32);
  EXPECT_TRUE(recent.eos_ids.empty());
}

TEST(ModelConfig, RefusesAnotherArchitectureAndListsTheKnown) {
  expect_names(refusal([] { (void)parse(R"({"architectures":["MistralForCausalLM"]})"); }),
               {"c/config.json", "\"MistralForCausalLM\"", "one of: LlamaForCausalLM"});
  expect_names(refusal([] { (void)parse(R"({"model_type":"qwen2"})"); }), {"\"qwen2\"", "one of: LlamaForCausalLM"});
  expect_names(refusal([] { (void)parse("{}"); }), {"architectures", "one of: LlamaForCausalLM"});
  expect_names(refusal([] { (void)parse(R"({"architectures":"LlamaForCausalLM"})"); }), {"architectures", "a list"});
  expect_names(refusal([] { (void)parse("[]"); }), {"c/config.json", "array", "an object"});
}

TEST(ModelConfig, RefusesByNameWhatIsNotSupported) {
  expect_names(refusal_with(R"("rope_scaling":{"rope_type":"llama3","factor":8.0})"), {"rope_scaling", "llama3"});
  expect_names(refusal_with(R"("rope_scaling":{"type":"linear","factor":2.0})"), {"rope_scaling", "linear"});
  expect_names(refusal_with(R"("rope_scaling":{"factor":2.0})"), {"rope_scaling", "null"});
  expect_names(refusal_with(R"("rope_scaling":2)"), {"rope_scaling", "an object or null"});
  expect_names(refusal_with(R"("rope_parameters":{"rope_type":"yarn","rope_theta":1e4})"), {"rope_parameters", "yarn"});
  expect_names(refusal_with(R"("rope_parameters":{"partial_rotary_factor":0.5})"), {"partial_rotary_factor", "0.5"});
  expect_names(refusal_with(R"("partial_rotary_factor":0.5)"), {"partial_rotary_factor", "0.5"});
  expect_names(refusal_with(R"("attention_bias":true)"), {"attention_bias", "true", "biases"});
  expect_names(refusal_with(R"("mlp_bias":true)"), {"mlp_bias", "true", "biases"});
  expect_names(refusal_with(R"("hidden_act":"gelu")"), {"hidden_act", "gelu", "silu"});
  expect_names(refusal_with(R"("quantization_config":{"bits":4})"), {"quantization_config"});
  expect_names(refusal_with(R"("torch_dtype":"float64")"), {"torch_dtype", "float64", "bfloat16, float16 or float32"});
}

TEST(ModelConfig, RefusesWrongTypesAndRanges) {
  for (const char* key : {"num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
                          "num_key_value_heads", "head_dim", "max_position_embeddings"}) {
    for (const char* value : {"0", "-1", "1.5", "\"8\"", "true", "[8]", "1000000000", "18446744073709551615"}) {
      expect_names(refusal_with(std::string("\"").append(key).append("\":").append(value)),
                   {key, value, "an integer from"});
    }
  }
  expect_names(refusal_with(R"("num_hidden_layers":1025)"), {"num_hidden_layers", "1025", "1024"});
  for (const char* value : {"0", "-1e-5", "2", "\"1e-5\"", "null"}) {
    expect_names(refusal_with(std::string("\"rms_norm_eps\":").append(value)), {"rms_norm_eps", "a number above 0"});
  }
  expect_names(refusal_with(R"("rope_theta":0)"), {"rope_theta", "a number above 0"});
  expect_names(refusal_with(R"("rope_parameters":{"rope_theta":"x"})"), {"rope_parameters", "rope_theta", "\"x\""});
  expect_names(refusal_with(R"("tie_word_embeddings":1)"), {"tie_word_embeddings", "true or false"});
  expect_names(refusal_with(R"("vocab_size":100,"eos_token_id":100)"), {"eos_token_id", "100", "from 0 to 99"});
  expect_names(refusal_with(R"("eos_token_id":[2,"x"])"), {"eos_token_id", "\"x\""});
  expect_names(refusal_with(R"("bos_token_id":-1)"), {"bos_token_id", "-1"});
}

TEST(ModelConfig, RefusesHeadsThatDoNotDivide) {
  expect_names(refusal_with(R"("num_attention_heads":6,"num_key_value_heads":4,"head_dim":64)"),
               {"num_attention_heads 6", "num_key_value_heads 4"});
  expect_names(refusal_with(R"("num_attention_heads":6,"hidden_size":64)"),
               {"num_attention_heads 6", "hidden_size 64", "head_dim"});
  expect_names(refusal_with(R"("num_attention_heads":2,"hidden_size":6)"), {"head_dim", "3", "an even number"});
}

TEST(ModelConfig, NamesAFolderWithoutAConfig) {
  const TempFolder folder;
  expect_names(refusal([&] { (void)load_model_config(folder / "absent"); }), {folder / "absent", "no such folder"});
  expect_names(refusal([&] { (void)load_model_config(folder.path()); }), {folder.path(), "no config.json"});
  write_file(folder / "config.json", R"({"hidden_size":1,"hidden_size":2})");
  expect_names(refusal([&] { (void)load_model_config(folder.path()); }),
               {folder / "config.json", "\"hidden_size\" twice"});
  expect_names(refusal([&] { (void)load_model_config(folder / "config.json"); }), {"no folder"});
}

TEST(SyntheticModels, HaveTheirPublishedSizes) {
  EXPECT_EQ(synthetic_model_config("llama-2-7b").parameters(), 6'738'415'616);
  EXPECT_EQ(synthetic_model_config("llama-3.1-8b").parameters(), 8'030'261'248);
  EXPECT_EQ(synthetic_model_config("llama-3.2-1b").parameters(), 1'235'814'400);
  const ModelConfig tiny = synthetic_model_config("tiny");
  EXPECT_EQ(tiny.heads / tiny.kv_heads, 2);
  EXPECT_EQ(tiny.head_dim, 64);
}

TEST(SyntheticModels, AnUnknownNameListsTheKnown) {
  for (const char* name : {"llama-9", "", "../models/tiny", "tiny.json"}) {
    expect_names(refusal([&] { (void)synthetic_model_config(name); }),
                 {name, "one of: llama-2-7b, llama-3.1-8b, llama-3.2-1b, tiny"});
  }
}

TEST(SyntheticModels, VesperConfigsComesFirst) {
  const TempFolder folder;
  setenv("VESPER_CONFIGS", folder.path().c_str(), 1);
  expect_names(refusal([] { (void)synthetic_model_config("mine"); }), {folder / "models", "VESPER_CONFIGS"});
  std::filesystem::create_directory(folder / "models");
  write_file(folder / "models/mine.json", R"({"model_type":"llama","vocab_size":77})");
  EXPECT_EQ(synthetic_model_config("mine").vocab, 77);
  unsetenv("VESPER_CONFIGS");
}

}  // namespace
}  // namespace vesper
