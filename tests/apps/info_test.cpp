// vesper info: what a run would hold, without holding it.
#include <nlohmann/json.hpp>

#include "tests/apps/run_vesper.h"

namespace vesper {
namespace {

TEST(Info, TellsTheModelAndAPlanWhosePartsAddUp) {
  const RunResult result = run_well({"info", "--model", demo_model(), "--device", "cpu", "--max-context", "100",
                                     "--max-seqs", "3", "--page-tokens", "32", "--json"});
  const auto document = nlohmann::json::parse(result.out);
  const auto& model = document.at("model");
  EXPECT_EQ(model.at("architecture"), "LlamaForCausalLM");
  EXPECT_EQ(model.at("layers"), 8);
  EXPECT_EQ(model.at("heads"), 4);
  EXPECT_EQ(model.at("kv_heads"), 2);
  EXPECT_EQ(model.at("head_dim"), 64);
  EXPECT_EQ(model.at("vocab"), 4096);
  EXPECT_EQ(document.at("device").at("kind"), "cpu");
  EXPECT_NE(document.at("tokenizer").get<std::string>().find("4096 pieces"), std::string::npos);
  EXPECT_EQ(document.at("attention"),
            nlohmann::json::parse(R"([{"layers": "0-7", "backend": "dense", "side_table_bytes_a_layer": 0}])"));
  const auto& memory = document.at("memory");
  EXPECT_EQ(memory.at("max_context"), 100);
  EXPECT_EQ(memory.at("max_seqs"), 3);
  EXPECT_EQ(memory.at("kv_pages"), 3 * 4);  // 100 tokens in pages of 32
  // K and V, f32, of every page.
  EXPECT_EQ(memory.at("parts").at("KV cache"), 2 * 8 * 2 * 64 * 4 * 12 * 32);
  std::int64_t sum = 0;
  for (const auto& [name, bytes] : memory.at("parts").items()) sum += bytes.get<std::int64_t>();
  EXPECT_EQ(memory.at("total_bytes"), sum);
}

TEST(Info, IsReadWithoutJson) {
  const RunResult result = run_well(
      {"info", "--model", "synthetic:llama-3.1-8b", "--device", "cpu", "--max-context", "16", "--log-level", "off"});
  EXPECT_EQ(result.err, "");
  for (const char* part : {"32 layers", "8 KV heads", "8030.26 M parameters", "layers 0-31: dense", "KV cache",
                           "weights", "tokenizer   none"}) {
    EXPECT_NE(result.out.find(part), std::string::npos) << "no \"" << part << "\" in:\n" << result.out;
  }
}

// Page bounds of a layer: f32 on the CPU, or a byte a channel and a bf16 scale for every 32.
TEST(Info, CountsPageBoundsInTheirBits) {
  const auto tables_of = [](const std::string& spec) {
    const RunResult result = run_well({"info", "--model", "synthetic:llama-2-7b", "--device", "cpu", "--max-context",
                                       "4096", "--attention", spec, "--json"});
    return nlohmann::json::parse(result.out).at("attention").back().at("side_table_bytes_a_layer").get<std::int64_t>();
  };
  const std::int64_t pages = 4096 / 16;
  EXPECT_EQ(tables_of("quest"), pages * 32 * 2 * 128 * 4);
  EXPECT_EQ(tables_of("quest:bounds=int8"), pages * 32 * 2 * (128 + 4 * 2));
}

// The 8B model's layers hold 6 979 321 856 weights in matrices, all in whole spans; 4.125 bits each.
TEST(Info, PlansWhatIsQuantised) {
  const auto weights_of = [](const std::string& format) {
    const RunResult result = run_well({"info", "--model", "synthetic:llama-3.1-8b", "--device", "cpu", "--max-context",
                                       "16", "--weights", format, "--json"});
    const auto document = nlohmann::json::parse(result.out);
    EXPECT_EQ(document.at("weights"), format);
    return document.at("memory").at("parts").at("weights").get<std::int64_t>();
  };
  const std::int64_t layers = 6'979'321'856;
  const std::int64_t head = 128256LL * 4096;
  const std::int64_t stored = weights_of("stored");
  EXPECT_EQ(weights_of("int4"), stored - layers * 2 + layers * 33 / 64);
  EXPECT_EQ(weights_of("int4,head"), stored - (layers + head) * 2 + (layers + head) * 33 / 64);
}

TEST(Info, SaysWhichContextItChose) {
  const RunResult result = run_well({"info", "--model", "synthetic:tiny", "--device", "cpu"});
  EXPECT_NE(result.out.find("1 sequence of 8192 tokens"), std::string::npos) << result.out;
}

}  // namespace
}  // namespace vesper
