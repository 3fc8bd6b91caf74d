#include "models/model_config.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "engine/core/json.h"
#include "models/weight_table.h"
#include "tests/models/files.h"
#include "tests/source_dir.h"

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
  EXPECT_EQ(config.rope.theta, 10000.0);
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
  EXPECT_EQ(old.rope.theta, 500000.0);
  EXPECT_EQ(old.dtype, DType::kF16);
  EXPECT_EQ(old.eos_ids, (std::vector<int>{5, 7}));
  EXPECT_EQ(old.bos_id, -1);
  EXPECT_TRUE(old.tied_embeddings);
  EXPECT_EQ(old.rms_eps, 1e-5F);

  const ModelConfig recent = parse(R"({"model_type":"llama","dtype":"bfloat16","head_dim":null,"eos_token_id":null,
      "rope_parameters":{"rope_type":"default","rope_theta":1000000.0},"num_key_value_heads":null})");
  EXPECT_EQ(recent.architecture, "LlamaForCausalLM");
  EXPECT_EQ(recent.rope.theta, 1e6);
  EXPECT_EQ(recent.dtype, DType::kBf16);
  EXPECT_EQ(recent.head_dim, 128);
  EXPECT_EQ(recent.kv_heads, 32);
  EXPECT_TRUE(recent.eos_ids.empty());
}

TEST(ModelConfig, MistralsAbsentKeysTakeMistralsDefaults) {
  const ModelConfig config = parse(R"({"architectures":["MistralForCausalLM"],"sliding_window":null})");
  EXPECT_EQ(config.architecture, "MistralForCausalLM");
  EXPECT_EQ(config.kv_heads, 8);
  EXPECT_EQ(config.ffn, 14336);
  EXPECT_EQ(config.max_positions, 131072);
  EXPECT_EQ(config.rms_eps, 1e-6F);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_EQ(config.parameters(), 7'241'732'096);  // Mistral 7B v0.1
  // As many KV heads as heads where the key is null, as in transformers; biases are no keys of this family.
  const ModelConfig null = parse(R"({"model_type":"mistral","sliding_window":null,"num_key_value_heads":null,
      "attention_bias":true})");
  EXPECT_EQ(null.architecture, "MistralForCausalLM");
  EXPECT_EQ(null.kv_heads, 32);
}

TEST(ModelConfig, RefusesAWindowThatHidesKeys) {
  const auto mistral = [](const std::string& members) {
    return parse(R"({"architectures":["MistralForCausalLM"],)" + members + "}");
  };
  expect_names(refusal([&] { (void)mistral(R"("sliding_window":4096,"max_position_embeddings":32768)"); }),
               {"c/config.json", "sliding_window", "4096", "null", "not supported"});
  // Absent it is 4096 in MistralConfig, which matters to longer contexts only.
  expect_names(refusal([&] { (void)mistral(R"("max_position_embeddings":4097)"); }),
               {"c/config.json", "sliding_window", "no such key", "4096", "4097 positions", "null"});
  EXPECT_EQ(mistral(R"("max_position_embeddings":4096)").max_positions, 4096);
  // LlamaConfig knows no windows.
  EXPECT_EQ(parse(R"({"model_type":"llama","sliding_window":4096})").layers, 32);
}

TEST(ModelConfig, RefusesAnotherArchitectureAndListsTheKnown) {
  const char* known = "one of: LlamaForCausalLM, MistralForCausalLM";
  expect_names(refusal([] { (void)parse(R"({"architectures":["MixtralForCausalLM"]})"); }),
               {"c/config.json", "\"MixtralForCausalLM\"", known});
  expect_names(refusal([] { (void)parse(R"({"model_type":"qwen2"})"); }), {"\"qwen2\"", known});
  expect_names(refusal([] { (void)parse("{}"); }), {"architectures", known});
  expect_names(refusal([] { (void)parse(R"({"architectures":"LlamaForCausalLM"})"); }), {"architectures", "a list"});
  expect_names(refusal([] { (void)parse("[]"); }), {"c/config.json", "array", "an object"});
}

// Keys and values as published folders have them, among many that mean nothing here.
TEST(ModelConfig, ReadsConfigsAsPublished) {
  const ModelConfig llama = parse(R"({"_name_or_path":"x","architectures":["LlamaForCausalLM"],"attention_bias":false,
      "attention_dropout":0.0,"bos_token_id":128000,"eos_token_id":[128001,128008,128009],"head_dim":64,
      "hidden_act":"silu","hidden_size":2048,"initializer_range":0.02,"intermediate_size":8192,
      "max_position_embeddings":131072,"mlp_bias":false,"model_type":"llama","num_attention_heads":32,
      "num_hidden_layers":16,"num_key_value_heads":8,"pretraining_tp":1,"rms_norm_eps":1e-05,
      "rope_scaling":{"factor":32.0,"high_freq_factor":4.0,"low_freq_factor":1.0,
      "original_max_position_embeddings":8192,"rope_type":"llama3"},"rope_theta":500000.0,"tie_word_embeddings":true,
      "torch_dtype":"bfloat16","transformers_version":"4.45.0.dev0","use_cache":true,"vocab_size":128256})");
  EXPECT_EQ(llama.eos_ids, (std::vector<int>{128001, 128008, 128009}));
  EXPECT_EQ(llama.rope.kind, RopeKind::kLlama3);
  EXPECT_EQ(llama.rope.original_positions, 8192);
  EXPECT_EQ(llama.max_positions, 131072);
  EXPECT_TRUE(llama.tied_embeddings);
  EXPECT_EQ(llama.parameters(), 1'235'814'400);

  const ModelConfig yarn = parse(R"({"_name_or_path":"x","architectures":["LlamaForCausalLM"],
      "auto_map":{"AutoModelForCausalLM":"modeling_llama_together_yarn.LlamaForCausalLM"},"bos_token_id":1,
      "eos_token_id":2,"hidden_size":4096,"max_position_embeddings":65536,"model_type":"llama","pad_token_id":0,
      "rms_norm_eps":1e-05,"rope_scaling":{"factor":16.0,"original_max_position_embeddings":4096,"type":"yarn",
      "finetuned":true},"tie_word_embeddings":false,"torch_dtype":"bfloat16","use_cache":true,"vocab_size":32000})");
  EXPECT_EQ(yarn.rope.kind, RopeKind::kYarn);
  EXPECT_EQ(yarn.max_positions, 65536);
  EXPECT_DOUBLE_EQ(yarn.rope.attention_factor, 0.1 * std::log(16.0) + 1.0);

  const ModelConfig mistral = parse(R"({"architectures":["MistralForCausalLM"],"attention_dropout":0.0,"head_dim":128,
      "max_position_embeddings":32768,"model_type":"mistral","num_key_value_heads":8,"rms_norm_eps":1e-05,
      "rope_theta":1000000.0,"sliding_window":null,"torch_dtype":"bfloat16","vocab_size":32768})");
  EXPECT_EQ(mistral.rope.theta, 1e6);
  EXPECT_EQ(mistral.vocab, 32768);
}

TEST(ModelConfig, RefusesByNameWhatIsNotSupported) {
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

TEST(SyntheticModels, HaveTheirPublishedSizesAndPositions) {
  struct Shape {
    const char* name;
    std::int64_t parameters;
    int max_positions;
    const char* rope;
  };
  for (const Shape& shape : {
           Shape{"llama-2-7b", 6'738'415'616, 4096, "theta 10000"},
           Shape{"llama-3.1-8b", 8'030'261'248, 131072, "theta 500000, llama3 x 8 beyond 8192"},
           Shape{"llama-3.2-1b", 1'235'814'400, 131072, "theta 500000, llama3 x 32 beyond 8192"},
           Shape{"llama-3.2-3b", 3'212'749'824, 131072, "theta 500000, llama3 x 32 beyond 8192"},
           Shape{"deepseek-r1-distill-llama-8b", 8'030'261'248, 131072, "theta 500000, llama3 x 8 beyond 8192"},
           Shape{"mistral-7b-v0.3", 7'248'023'552, 32768, "theta 1000000"},
           Shape{"yarn-llama-2-7b-64k", 6'738'415'616, 65536, "theta 10000, yarn x 16 beyond 4096"},
           Shape{"yarn-llama-2-7b-128k", 6'738'415'616, 131072, "theta 10000, yarn x 32 beyond 4096"},
       }) {
    const ModelConfig config = synthetic_model_config(shape.name);
    EXPECT_EQ(config.parameters(), shape.parameters) << shape.name;
    EXPECT_EQ(config.max_positions, shape.max_positions) << shape.name;
    EXPECT_EQ(describe(config.rope), shape.rope) << shape.name;
  }
  const ModelConfig tiny = synthetic_model_config("tiny");
  EXPECT_EQ(tiny.heads / tiny.kv_heads, 2);
  EXPECT_EQ(tiny.head_dim, 64);
}

// A misspelt key would silently mean a default, as it does in transformers: our own files may have known keys only.
TEST(SyntheticModels, HaveNoKeyThatIsNotRead) {
  const std::set<std::string> known = {
      "architectures",       "model_type",   "hidden_size",  "intermediate_size", "num_hidden_layers",
      "num_attention_heads", "head_dim",     "vocab_size",   "rms_norm_eps",      "num_key_value_heads",
      "rope_theta",          "rope_scaling", "torch_dtype",  "sliding_window",    "max_position_embeddings",
      "tie_word_embeddings", "bos_token_id", "eos_token_id", "hidden_act"};
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(source_dir() + "/configs/models")) {
    const Json shape = read_json_file(entry.path().string());
    for (const auto& [key, value] : shape.items()) EXPECT_TRUE(known.contains(key)) << entry.path() << ": " << key;
    for (const std::string& key : known) {
      if (key == "rope_scaling" || key == "sliding_window") continue;
      EXPECT_TRUE(shape.contains(key)) << entry.path() << " leaves " << key << " to a default";
    }
    ++files;
  }
  EXPECT_EQ(files, 9);
}

TEST(SyntheticModels, AnUnknownNameListsTheKnown) {
  for (const char* name : {"llama-9", "", "../models/tiny", "tiny.json"}) {
    expect_names(refusal([&] { (void)synthetic_model_config(name); }),
                 {name,
                  "one of: deepseek-r1-distill-llama-8b, llama-2-7b, llama-3.1-8b, llama-3.2-1b, llama-3.2-3b, "
                  "mistral-7b-v0.3, tiny, yarn-llama-2-7b-128k, yarn-llama-2-7b-64k"});
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
