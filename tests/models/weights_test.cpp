#include "models/weights.h"

#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <filesystem>
#include <sstream>

#include "models/checkpoint.h"
#include "tests/models/tiny_checkpoint.h"

namespace vesper {
namespace {

const Exec kCpu;

class Weights : public testing::Test {
 protected:
  [[nodiscard]] ModelWeights load(const ModelConfig& config) const {
    return load_weights(folder_.path(), config, kCpu, nullptr);
  }
  // Of loading and of planning alike.
  [[nodiscard]] std::string load_refusal(const ModelConfig& config) const {
    std::string message = refusal([&] { (void)load(config); });
    EXPECT_EQ(refusal([&] { (void)plan_weights(folder_.path(), config, DeviceKind::kCuda); }), message);
    expect_names(message, {folder_.path()});
    return message;
  }
  [[nodiscard]] std::string refusal_of(const TinyCheckpoint& checkpoint) const {
    checkpoint.write_single(folder_);
    return load_refusal(checkpoint.config);
  }

  TempFolder folder_;
  TinyCheckpoint tiny_{TinyCheckpoint::shape(), DType::kBf16};
};

void expect_tensor(const TensorRef& found, const TinyTensor& expected, const std::string& name) {
  EXPECT_EQ(found.dtype, expected.dtype) << name;
  EXPECT_EQ(found.rank, static_cast<int>(expected.shape.size())) << name;
  for (std::size_t d = 0; d < expected.shape.size(); ++d) EXPECT_EQ(found.shape[d], expected.shape[d]) << name;
  ASSERT_EQ(found.bytes(), static_cast<std::int64_t>(expected.bytes.size())) << name;
  EXPECT_EQ(std::memcmp(found.data, expected.bytes.data(), expected.bytes.size()), 0) << name;
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(found.data) % static_cast<std::uintptr_t>(dtype_bytes(found.dtype)), 0U)
      << name;
}

// The parts of a matrix one after the other, whether or not they became one block.
void expect_matrix(const LinearWeight& found, const TinyCheckpoint& tiny, const std::vector<std::string>& names) {
  std::vector<std::byte> expected;
  std::int64_t rows = 0;
  for (const std::string& name : names) {
    const TinyTensor& part = tiny.tensors.at(name);
    expected.insert(expected.end(), part.bytes.begin(), part.bytes.end());
    rows += part.shape[0];
    EXPECT_EQ(found.columns(), part.shape[1]) << name;
    EXPECT_EQ(found.blocks[0].dtype, part.dtype) << name;
  }
  EXPECT_EQ(found.rows(), rows) << names[0];
  std::vector<std::byte> bytes;
  for (int b = 0; b < found.count; ++b) {
    const TensorRef& block = found.blocks[static_cast<std::size_t>(b)];
    const auto* data = static_cast<const std::byte*>(block.data);
    bytes.insert(bytes.end(), data, data + block.bytes());
  }
  EXPECT_EQ(bytes, expected) << names[0];
}

void expect_weights(const ModelWeights& weights, const TinyCheckpoint& tiny) {
  expect_tensor(weights.embedding, tiny.tensors.at("model.embed_tokens.weight"), "embedding");
  expect_tensor(weights.final_norm, tiny.tensors.at("model.norm.weight"), "final norm");
  const bool tied = tiny.config.tied_embeddings;
  expect_matrix(weights.head, tiny, {tied ? "model.embed_tokens.weight" : "lm_head.weight"});
  ASSERT_EQ(weights.layers.size(), static_cast<std::size_t>(tiny.config.layers));
  for (std::size_t l = 0; l < weights.layers.size(); ++l) {
    const LayerWeights& layer = weights.layers[l];
    const std::string prefix = "model.layers." + std::to_string(l) + ".";
    expect_tensor(layer.attention_norm, tiny.tensors.at(prefix + "input_layernorm.weight"), prefix);
    expect_tensor(layer.ffn_norm, tiny.tensors.at(prefix + "post_attention_layernorm.weight"), prefix);
    const std::string attention = prefix + "self_attn.";
    expect_matrix(layer.qkv, tiny,
                  {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"});
    expect_matrix(layer.o, tiny, {attention + "o_proj.weight"});
    expect_matrix(layer.gate_up, tiny, {prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"});
    expect_matrix(layer.down, tiny, {prefix + "mlp.down_proj.weight"});
  }
  std::int64_t bytes = 0;
  for (const auto& [name, tensor] : tiny.tensors) bytes += static_cast<std::int64_t>(tensor.bytes.size());
  EXPECT_EQ(weights.bytes, bytes);
}

TEST(WeightTable, HasEveryParameterOnce) {
  ModelConfig config = TinyCheckpoint::shape();
  const std::vector<ExpectedWeight> all = expected_weights(config);
  EXPECT_EQ(all.size(), 3U + 9U * 2U);
  EXPECT_EQ(all.front().name, "model.embed_tokens.weight");
  EXPECT_EQ(all.back().name, "lm_head.weight");
  EXPECT_EQ(all[4].name, "model.layers.0.self_attn.v_proj.weight");
  EXPECT_EQ(all[4].shape_in_words(), "[kv_rows 16, hidden 24]");
  config.tied_embeddings = true;
  EXPECT_EQ(expected_weights(config).back().name, "model.norm.weight");
}

TEST(WeightTable, ShardsOutputsBeforeInputs) {
  for (const WeightRule& rule : llama_weight_table()) {
    const bool splits_outputs =
        rule.shape[0] == Extent::kQRows || rule.shape[0] == Extent::kKvRows || rule.shape[0] == Extent::kFfn;
    const bool splits_inputs = rule.shape[1] == Extent::kQRows || rule.shape[1] == Extent::kFfn;
    EXPECT_EQ(rule.shard, splits_outputs  ? ShardRule::kRows
                          : splits_inputs ? ShardRule::kColumns
                                          : ShardRule::kNone)
        << rule.name;
  }
}

TEST(WeightTable, LaysPartsOfAMatrixSideBySide) {
  const std::vector<ExpectedWeight> all = expected_weights(TinyCheckpoint::shape());
  const WeightsLayout layout = lay_out(all, DType::kBf16);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const std::int64_t end = i == 0 ? 0 : layout.offsets[i - 1] + all[i - 1].elements() * 2;
    const bool continues = all[i].name.find("k_proj") != std::string::npos ||
                           all[i].name.find("v_proj") != std::string::npos ||
                           all[i].name.find("up_proj") != std::string::npos;
    EXPECT_EQ(layout.offsets[i], continues ? end : (end + 255) / 256 * 256) << all[i].name;
  }
  EXPECT_EQ(layout.bytes, layout.offsets.back() + all.back().elements() * 2);
}

TEST_F(Weights, StayWhereTheyLieInTheFile) {
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const TinyCheckpoint tiny(TinyCheckpoint::shape(), dtype);
    tiny.write_single(folder_);
    const ModelWeights weights = load(tiny.config);
    expect_weights(weights, tiny);
    EXPECT_EQ(weights.dtype, dtype);
    EXPECT_EQ(weights.storage.bytes(), 0) << "nothing is copied";
    EXPECT_EQ(weights.embedding.data, weights.files[0].find("model.embed_tokens.weight")->data);
  }
}

TEST_F(Weights, SurviveAMoveAndAnUnalignedHeader) {
  tiny_.write_single(folder_);
  std::string bytes = read_file(folder_ / "model.safetensors");
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  ASSERT_EQ(length % 8, 0U);
  bytes.insert(8 + length, 1, ' ');
  ++length;
  std::memcpy(bytes.data(), &length, 8);
  write_file(folder_ / "model.safetensors", bytes);
  ModelWeights weights = load(tiny_.config);
  const ModelWeights moved = std::move(weights);
  EXPECT_GT(moved.storage.bytes(), 0);
  expect_weights(moved, tiny_);
}

TEST_F(Weights, ComeFromShardsWhichMayBeSymbolicLinks) {
  namespace fs = std::filesystem;
  tiny_.write_shards(folder_);
  fs::create_directory(folder_ / "blobs");
  fs::rename(folder_ / "model-2.safetensors", folder_ / "blobs/5f3a");
  fs::create_symlink("blobs/5f3a", folder_ / "model-2.safetensors");
  expect_weights(load(tiny_.config), tiny_);
}

// Mistral's folders hold all weights twice, the second time under its own names; indices carry whatever they like.
TEST_F(Weights, ComeFromShardsBesideFilesThatTheIndexDoesNotName) {
  nlohmann::json index = tiny_.write_shards(folder_);
  index["metadata"] = {{"total_size", "none"}, {"format", "pt"}, {"total_parameters", 7}, {"notes", {1, 2}}};
  index["mlx"] = true;
  TinyCheckpoint::write_index(folder_, index);
  write_file(folder_ / "consolidated.safetensors", "not even a safetensors file");
  write_file(folder_ / "params.json", "{}");
  write_file(folder_ / "pytorch_model.bin", "pickled");
  expect_weights(load(tiny_.config), tiny_);
}

TEST_F(Weights, OfATiedModelShareTheEmbedding) {
  ModelConfig config = TinyCheckpoint::shape();
  config.tied_embeddings = true;
  const TinyCheckpoint tied(config, DType::kF16);
  tied.write_single(folder_);
  const ModelWeights weights = load(config);
  expect_weights(weights, tied);
  EXPECT_EQ(weights.head.blocks[0].data, weights.embedding.data);
}

TEST_F(Weights, NormsMayHaveAnotherType) {
  tiny_.tensors["model.norm.weight"] = tiny_tensor(DType::kF32, {24}, 99);
  tiny_.write_single(folder_);
  expect_weights(load(tiny_.config), tiny_);
}

TEST_F(Weights, IgnoreFrequenciesAndATiedHeadWithOneLine) {
  std::ostringstream log;
  const auto before = spdlog::default_logger();
  spdlog::set_default_logger(
      std::make_shared<spdlog::logger>("test", std::make_shared<spdlog::sinks::ostream_sink_mt>(log)));
  TinyCheckpoint old = tiny_;
  old.config.tied_embeddings = true;
  old.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tiny_tensor(DType::kF32, {4}, 50);
  old.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = tiny_tensor(DType::kF32, {4}, 50);
  old.write_single(folder_);
  (void)plan_weights(folder_.path(), old.config, DeviceKind::kCpu);
  const ModelWeights weights = load(old.config);
  spdlog::set_default_logger(before);
  EXPECT_EQ(weights.head.blocks[0].data, weights.embedding.data);
  const std::string line = log.str();
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1) << line;
  EXPECT_NE(line.find("2 rotary_emb.inv_freq"), std::string::npos) << line;
  EXPECT_NE(line.find("lm_head.weight"), std::string::npos) << line;
}

TEST_F(Weights, ArePlannedFromHeaders) {
  tiny_.write_single(folder_);
  const std::vector<ExpectedWeight> all = expected_weights(tiny_.config);
  const WeightsPlan cuda = plan_weights(folder_.path(), tiny_.config, DeviceKind::kCuda);
  EXPECT_EQ(cuda.dtype, DType::kBf16);
  EXPECT_EQ(cuda.device_bytes, lay_out(all, DType::kBf16).bytes);
  EXPECT_EQ(plan_weights(folder_.path(), tiny_.config, DeviceKind::kCpu).device_bytes, load(tiny_.config).bytes);
  TinyCheckpoint(tiny_.config, DType::kF32).write_single(folder_);
  EXPECT_EQ(plan_weights(folder_.path(), tiny_.config, DeviceKind::kCuda).dtype, DType::kBf16);
  EXPECT_EQ(plan_weights(folder_.path(), tiny_.config, DeviceKind::kCuda).device_bytes, cuda.device_bytes);
  EXPECT_EQ(plan_weights(folder_.path(), tiny_.config, DeviceKind::kCpu).dtype, DType::kF32);
}

TEST_F(Weights, RefuseMissingAndExtraTensors) {
  TinyCheckpoint wrong = tiny_;
  wrong.tensors.erase("model.layers.1.mlp.up_proj.weight");
  expect_names(refusal_of(wrong), {"\"model.layers.1.mlp.up_proj.weight\"", "no tensor"});
  wrong = tiny_;
  wrong.tensors["model.layers.0.self_attn.q_proj.bias"] = tiny_tensor(DType::kBf16, {32}, 70);
  expect_names(refusal_of(wrong), {"\"model.layers.0.self_attn.q_proj.bias\"", "only tensors of the model"});
  wrong = tiny_;
  wrong.config.layers = 3;
  expect_names(refusal_of(wrong), {"\"model.layers.2.input_layernorm.weight\"", "and 6 more"});
  wrong.config.layers = 1;
  expect_names(refusal_of(wrong), {"\"model.layers.1.input_layernorm.weight\"", "and 6 more"});
}

TEST_F(Weights, RefuseAMissingHeadUnlessItIsTied) {
  tiny_.tensors.erase("lm_head.weight");
  expect_names(refusal_of(tiny_), {"\"lm_head.weight\""});
  tiny_.config.tied_embeddings = true;
  (void)load(tiny_.config);
}

TEST_F(Weights, RefuseShapesThatContradictTheConfig) {
  TinyCheckpoint wrong = tiny_;
  wrong.config.kv_heads = 4;
  expect_names(refusal_of(wrong),
               {"\"model.layers.0.self_attn.k_proj.weight\"", "[16, 24]", "[kv_rows 32, hidden 24]"});
  wrong = tiny_;
  wrong.tensors["model.norm.weight"] = tiny_tensor(DType::kBf16, {24, 1}, 70);
  expect_names(refusal_of(wrong), {"\"model.norm.weight\"", "[24, 1]", "[hidden 24]"});
}

TEST_F(Weights, RefuseTypesThatAreNotOneFloatingType) {
  TinyCheckpoint wrong = tiny_;
  wrong.tensors["lm_head.weight"] = tiny_tensor(DType::kI32, {50, 24}, 70);
  expect_names(refusal_of(wrong), {"\"lm_head.weight\"", "i32", "f32, bf16 or f16"});
  wrong.tensors["lm_head.weight"] = tiny_tensor(DType::kF16, {50, 24}, 70);
  expect_names(refusal_of(wrong), {"\"lm_head.weight\"", "f16", "bf16 as in \"model.embed_tokens.weight\""});
}

TEST_F(Weights, RefuseAFolderWithoutSafetensors) {
  expect_names(load_refusal(tiny_.config), {"model.safetensors or model.safetensors.index.json"});
  write_file(folder_ / "pytorch_model.bin", "PK");
  expect_names(load_refusal(tiny_.config), {"only PyTorch files", "python3 -c", "save_pretrained('" + folder_.path()});
}

TEST_F(Weights, RefuseAWrongFileByItsName) {
  tiny_.write_shards(folder_);
  const std::string bytes = read_file(folder_ / "model-3.safetensors");
  write_file(folder_ / "model-3.safetensors", bytes.substr(0, bytes.size() - 1));
  expect_names(load_refusal(tiny_.config), {"model-3.safetensors", "truncated"});
}

TEST_F(Weights, RefuseAnIndexThatIsWrongInItself) {
  const std::string index_path = folder_ / "model.safetensors.index.json";
  const auto refusal_of_index = [&](const std::string& text) {
    write_file(index_path, text);
    std::string message = load_refusal(tiny_.config);
    expect_names(message, {index_path});
    return message;
  };
  expect_names(refusal_of_index("[]"), {"weight_map"});
  expect_names(refusal_of_index("{}"), {"weight_map"});
  expect_names(refusal_of_index(R"({"weight_map":[]})"), {"weight_map"});
  expect_names(refusal_of_index(R"({"weight_map":{}})"), {"weight_map"});
  expect_names(refusal_of_index(R"({"weight_map":{"a":"x","a":"y"}})"), {"\"a\" twice"});
  expect_names(refusal_of_index(std::string(10000, '[')), {"nested deeper"});
  expect_names(refusal_of_index(R"({"weight_map":{"a":5}})"), {"\"a\"", "the shard 5"});
  for (const char* shard : {"../x.safetensors", "a/b", "/etc/passwd", "", ".", "..", "x\\u0000y"}) {
    expect_names(refusal_of_index(R"({"weight_map":{"a":")" + std::string(shard) + "\"}}"),
                 {"\"a\"", shard, "without path parts"});
  }
  expect_names(refusal_of_index(R"({"weight_map":{"a":"gone.safetensors"}})"),
               {"\"gone.safetensors\"", "not in the folder"});
}

TEST_F(Weights, RefuseAnIndexThatDoesNotAgreeWithItsShards) {
  const nlohmann::json index = tiny_.write_shards(folder_);
  nlohmann::json wrong = index;
  wrong["weight_map"]["model.extra.weight"] = "model-1.safetensors";
  TinyCheckpoint::write_index(folder_, wrong);
  expect_names(load_refusal(tiny_.config), {"model-1.safetensors", "no tensor \"model.extra.weight\""});
  wrong = index;
  wrong["weight_map"].erase("model.norm.weight");
  TinyCheckpoint::write_index(folder_, wrong);
  expect_names(load_refusal(tiny_.config), {"\"model.norm.weight\"", "only tensors that"});
  wrong = index;
  const std::string there = index["weight_map"]["lm_head.weight"];
  const std::string elsewhere = there == "model-1.safetensors" ? "model-2.safetensors" : "model-1.safetensors";
  wrong["weight_map"]["lm_head.weight"] = elsewhere;
  TinyCheckpoint::write_index(folder_, wrong);
  expect_names(load_refusal(tiny_.config), {"\"lm_head.weight\"", there, elsewhere});
}

TEST_F(Weights, NameAShardBehindADanglingLink) {
  tiny_.write_shards(folder_);
  std::filesystem::remove(folder_ / "model-1.safetensors");
  std::filesystem::create_symlink("blobs/gone", folder_ / "model-1.safetensors");
  expect_names(load_refusal(tiny_.config), {"model-1.safetensors", "No such file"});
}

// Mean and variance of a 16-bit matrix's values.
struct Moments {
  double mean = 0.0;
  double variance = 0.0;
};
Moments moments(const TensorRef& tensor) {
  const auto values = tensor.as<const bf16, 2>();
  Moments found;
  for (std::int64_t i = 0; i < values.size(); ++i) {
    const double value = to_float(values.data()[i]);
    found.mean += value / static_cast<double>(values.size());
    found.variance += value * value / static_cast<double>(values.size());
  }
  found.variance -= found.mean * found.mean;
  return found;
}

TEST(SyntheticWeights, KeepUnitVariance) {
  const ModelConfig config = synthetic_model_config("tiny");
  const ModelWeights weights = synthetic_weights(config, 3, kCpu);
  EXPECT_EQ(weights.dtype, DType::kBf16);
  EXPECT_EQ(weights.storage.bytes(), plan_synthetic_weights(config, DeviceKind::kCpu).device_bytes);
  EXPECT_EQ(weights.bytes, config.parameters() * 2);
  const auto expect_variance = [](const TensorRef& tensor, double variance, const char* what) {
    const Moments found = moments(tensor);
    // n draws: the mean deviates by sqrt(variance / n), the variance of a uniform draw by variance * sqrt(0.8 / n).
    const auto n = static_cast<double>(tensor.size());
    EXPECT_NEAR(found.mean, 0.0, 5.0 * std::sqrt(variance / n)) << what;
    EXPECT_NEAR(found.variance, variance, variance * (5.0 * std::sqrt(0.8 / n) + 0x1p-8)) << what;
  };
  expect_variance(weights.embedding, 1.0, "embedding");
  expect_variance(weights.head.blocks[0], 1.0 / config.hidden, "head");
  for (const LayerWeights& layer : weights.layers) {
    EXPECT_EQ(layer.qkv.count, 1);
    EXPECT_EQ(layer.qkv.rows(), config.q_rows() + 2 * config.kv_rows());
    EXPECT_EQ(layer.gate_up.count, 1);
    EXPECT_EQ(layer.gate_up.rows(), 2 * config.ffn);
    expect_variance(layer.qkv.blocks[0], 1.0 / config.hidden, "qkv");
    expect_variance(layer.o.blocks[0], 1.0 / config.q_rows(), "o");
    expect_variance(layer.gate_up.blocks[0], 1.0 / config.hidden, "gate_up");
    expect_variance(layer.down.blocks[0], 1.0 / config.ffn, "down");
    for (std::int64_t i = 0; i < config.hidden; ++i) {
      ASSERT_EQ(to_float((layer.ffn_norm.as<const bf16, 1>()(i))), 1.0F);
      ASSERT_EQ(to_float((layer.attention_norm.as<const bf16, 1>()(i))), 1.0F);
    }
  }
}

TEST(SyntheticWeights, FollowFromTheSeed) {
  const ModelConfig config = synthetic_model_config("tiny");
  const auto bytes_of = [](const TensorRef& tensor) {
    const auto* data = static_cast<const std::byte*>(tensor.data);
    return std::vector<std::byte>(data, data + tensor.bytes());
  };
  const ModelWeights first = synthetic_weights(config, 3, kCpu);
  const ModelWeights again = synthetic_weights(config, 3, kCpu);
  const ModelWeights other = synthetic_weights(config, 4, kCpu);
  EXPECT_EQ(bytes_of(first.layers[1].o.blocks[0]), bytes_of(again.layers[1].o.blocks[0]));
  EXPECT_NE(bytes_of(first.layers[1].o.blocks[0]), bytes_of(other.layers[1].o.blocks[0]));
  EXPECT_NE(bytes_of(first.layers[1].o.blocks[0]), bytes_of(first.layers[2].o.blocks[0]));
}

}  // namespace
}  // namespace vesper
