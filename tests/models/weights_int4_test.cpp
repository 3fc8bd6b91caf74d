// Weights that are quantised while they are loaded or drawn hold what the stored ones, quantised, hold.
#include <gtest/gtest.h>

#include "models/weights.h"
#include "tests/models/int4_reference.h"
#include "tests/models/tiny_checkpoint.h"

namespace vesper {
namespace {

const Exec kCpu;

// The tensors as rows of one matrix, quantised.
HostInt4 quantised(const TinyCheckpoint& tiny, const std::vector<std::string>& names) {
  std::vector<float> values;
  for (const std::string& name : names) {
    const std::vector<float> part = tiny.tensors.at(name).values();
    values.insert(values.end(), part.begin(), part.end());
  }
  const std::int64_t columns = tiny.tensors.at(names[0]).shape[1];
  return HostInt4::quantised(values, static_cast<std::int64_t>(values.size()) / columns, columns);
}

void expect_int4(const LinearWeight& found, const HostInt4& expected, const std::string& what) {
  ASSERT_TRUE(found.is_int4()) << what;
  EXPECT_EQ(found.count, 0) << what;
  ASSERT_EQ(found.rows(), expected.matrix.rows) << what;
  ASSERT_EQ(found.columns(), expected.matrix.columns) << what;
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(found.int4.data) % 256, 0U) << what;
  EXPECT_EQ(std::memcmp(found.int4.data, expected.bytes.data(), expected.bytes.size()), 0) << what;
}

void expect_layers(const ModelWeights& weights, const TinyCheckpoint& tiny) {
  for (std::size_t l = 0; l < weights.layers.size(); ++l) {
    const LayerWeights& layer = weights.layers[l];
    const std::string prefix = "model.layers." + std::to_string(l) + ".";
    const std::string attention = prefix + "self_attn.";
    const std::string mlp = prefix + "mlp.";
    expect_int4(
        layer.qkv,
        quantised(tiny, {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"}),
        prefix + "qkv");
    expect_int4(layer.o, quantised(tiny, {attention + "o_proj.weight"}), prefix + "o");
    expect_int4(layer.gate_up, quantised(tiny, {mlp + "gate_proj.weight", mlp + "up_proj.weight"}), prefix + "gate_up");
    expect_int4(layer.down, quantised(tiny, {mlp + "down_proj.weight"}), prefix + "down");
    EXPECT_EQ(layer.ffn_norm.dtype, tiny.tensors.at(prefix + "post_attention_layernorm.weight").dtype);
  }
}

std::int64_t layer_bytes(const ModelWeights& weights) {
  std::int64_t total = 0;
  for (const LayerWeights& layer : weights.layers) {
    total += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
    total += layer.attention_norm.bytes() + layer.ffn_norm.bytes();
  }
  return total;
}

TEST(Int4Weights, AreTheStoredOnesQuantised) {
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const TempFolder folder;
    const TinyCheckpoint tiny(TinyCheckpoint::shape(), dtype);
    tiny.write_shards(folder);
    std::int64_t last_done = 0;
    std::int64_t total = 0;
    const ModelWeights weights = load_weights(
        folder.path(), tiny.config, kCpu,
        [&](std::int64_t done_bytes, std::int64_t total_bytes) {
          EXPECT_GT(done_bytes, last_done);
          last_done = done_bytes;
          total = total_bytes;
        },
        WeightFormat::kInt4);
    EXPECT_GT(total, 0);
    EXPECT_EQ(last_done, total);
    expect_layers(weights, tiny);
    EXPECT_FALSE(weights.head.is_int4());
    EXPECT_EQ(weights.dtype, dtype);
    EXPECT_EQ(weights.bytes,
              layer_bytes(weights) + weights.embedding.bytes() + weights.head.bytes() + weights.final_norm.bytes());
    EXPECT_EQ(weights.panel_bytes, 80 * 24 * 2) << "gate and up";
    const std::vector<ExpectedWeight> all = expected_weights(tiny.config);
    const Int4Layout int4 = lay_out_int4(all, false, WeightFormat::kInt4);
    EXPECT_EQ(int4.bytes, weights.storage.bytes());
    const WeightsPlan cpu = plan_weights(folder.path(), tiny.config, DeviceKind::kCpu, WeightFormat::kInt4);
    const std::int64_t norms = (2 * 2 + 1) * weights.final_norm.bytes();
    EXPECT_EQ(cpu.device_bytes, int4.bytes + weights.embedding.bytes() + weights.head.bytes() + norms);
    EXPECT_EQ(cpu.panel_bytes, 0);
    const WeightsPlan cuda = plan_weights(folder.path(), tiny.config, DeviceKind::kCuda, WeightFormat::kInt4);
    EXPECT_EQ(cuda.device_bytes, lay_out(all, DType::kF16, int4).bytes);
    EXPECT_EQ(cuda.panel_bytes, weights.panel_bytes);
  }
}

TEST(Int4Weights, TakeInTheHeadWhereAsked) {
  for (const bool tied : {false, true}) {
    const TempFolder folder;
    ModelConfig config = TinyCheckpoint::shape();
    config.tied_embeddings = tied;
    const TinyCheckpoint tiny(config, DType::kBf16);
    tiny.write_single(folder);
    const ModelWeights weights = load_weights(folder.path(), config, kCpu, nullptr, WeightFormat::kInt4Head);
    expect_layers(weights, tiny);
    expect_int4(weights.head, quantised(tiny, {tied ? "model.embed_tokens.weight" : "lm_head.weight"}), "head");
    EXPECT_EQ(weights.embedding.data, weights.files[0].find("model.embed_tokens.weight")->data);
    EXPECT_EQ(weights.bytes,
              layer_bytes(weights) + weights.embedding.bytes() + weights.head.bytes() + weights.final_norm.bytes());
    const ModelWeights stored_head = load_weights(folder.path(), config, kCpu, nullptr, WeightFormat::kInt4);
    EXPECT_FALSE(stored_head.head.is_int4());
    EXPECT_EQ(stored_head.head.blocks[0].data == stored_head.embedding.data, tied);
  }
}

// A header of odd length: what is quantised comes from an aligned copy.
TEST(Int4Weights, SurviveAnUnalignedHeader) {
  const TempFolder folder;
  const TinyCheckpoint tiny(TinyCheckpoint::shape(), DType::kF32);
  tiny.write_single(folder);
  std::string bytes = read_file(folder / "model.safetensors");
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  bytes.insert(8 + length, 1, ' ');
  ++length;
  std::memcpy(bytes.data(), &length, 8);
  write_file(folder / "model.safetensors", bytes);
  expect_layers(load_weights(folder.path(), tiny.config, kCpu, nullptr, WeightFormat::kInt4), tiny);
}

TEST(SyntheticInt4Weights, AreTheDrawnOnesQuantised) {
  for (const bool tied : {false, true}) {
    ModelConfig config = synthetic_model_config("tiny");
    config.tied_embeddings = tied;
    const ModelWeights drawn = synthetic_weights(config, 3, kCpu);
    const ModelWeights weights = synthetic_weights(config, 3, kCpu, WeightFormat::kInt4Head);
    EXPECT_EQ(weights.storage.bytes(),
              plan_synthetic_weights(config, DeviceKind::kCpu, WeightFormat::kInt4Head).device_bytes);
    const auto expect_same = [&](const LinearWeight& found, const LinearWeight& from, const std::string& what) {
      const auto values = from.blocks[0].as<const bf16, 2>();
      std::vector<float> exact(static_cast<std::size_t>(values.size()));
      for (std::size_t i = 0; i < exact.size(); ++i) exact[i] = to_float(values.data()[i]);
      expect_int4(found, HostInt4::quantised(exact, from.rows(), from.columns()), what);
    };
    expect_same(weights.head, drawn.head, "head");
    for (std::size_t l = 0; l < drawn.layers.size(); ++l) {
      expect_same(weights.layers[l].qkv, drawn.layers[l].qkv, "qkv");
      expect_same(weights.layers[l].o, drawn.layers[l].o, "o");
      expect_same(weights.layers[l].gate_up, drawn.layers[l].gate_up, "gate_up");
      expect_same(weights.layers[l].down, drawn.layers[l].down, "down");
    }
    EXPECT_EQ(
        std::memcmp(weights.embedding.data, drawn.embedding.data, static_cast<std::size_t>(drawn.embedding.bytes())),
        0);
  }
}

}  // namespace
}  // namespace vesper
