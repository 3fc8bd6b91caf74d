// Weights on a GPU hold what the files say.
#include <algorithm>

#include "models/weights.h"
#include "tests/gpu.h"
#include "tests/models/tiny_checkpoint.h"

namespace vesper {
namespace {

std::vector<std::byte> read_back(const Exec& exec, const TensorRef& tensor) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(tensor.bytes()));
  copy_bytes(exec, bytes.data(), tensor.data, tensor.bytes());
  Event done;
  done.record(exec);
  done.synchronize();
  return bytes;
}

// The bytes of one tensor after another, in the 16-bit type that the device runs in.
std::vector<std::byte> converted(const TinyCheckpoint& tiny, const std::vector<std::string>& names, DType dtype) {
  std::vector<std::byte> all;
  for (const std::string& name : names) {
    const TinyTensor& tensor = tiny.tensors.at(name);
    if (tensor.dtype == dtype) {
      all.insert(all.end(), tensor.bytes.begin(), tensor.bytes.end());
      continue;
    }
    for (const float value : tensor.values()) {
      const std::uint16_t bits = dtype == DType::kBf16 ? to_bf16(value).bits : to_f16(value).bits;
      all.push_back(static_cast<std::byte>(bits & 0xFFU));
      all.push_back(static_cast<std::byte>(bits >> 8));
    }
  }
  return all;
}

void expect_tensor(const Exec& exec, const TensorRef& found, const TinyCheckpoint& tiny,
                   const std::vector<std::string>& names, DType dtype) {
  EXPECT_EQ(found.dtype, dtype) << names[0];
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(found.data) % 256, 0U) << names[0];
  std::int64_t rows = 0;
  for (const std::string& name : names) rows += tiny.tensors.at(name).shape[0];
  EXPECT_EQ(found.shape[0], rows) << names[0];
  if (found.rank == 2) {
    EXPECT_EQ(found.shape[1], tiny.tensors.at(names[0]).shape[1]) << names[0];
  }
  const std::vector<std::byte> bytes = read_back(exec, found);
  const std::vector<std::byte> expected = converted(tiny, names, dtype);
  ASSERT_EQ(bytes.size(), expected.size()) << names[0];
  const auto [at, unused] = std::mismatch(bytes.begin(), bytes.end(), expected.begin());
  EXPECT_EQ(at, bytes.end()) << names[0] << " differs from byte " << at - bytes.begin() << " of " << bytes.size();
}

void expect_weights(const Exec& exec, const ModelWeights& weights, const TinyCheckpoint& tiny, DType dtype) {
  EXPECT_EQ(weights.dtype, dtype);
  EXPECT_TRUE(weights.files.empty()) << "the files are no longer needed";
  const auto expect_matrix = [&](const LinearWeight& found, const std::vector<std::string>& names) {
    EXPECT_EQ(found.count, 1) << names[0];
    expect_tensor(exec, found.blocks[0], tiny, names, dtype);
  };
  expect_tensor(exec, weights.embedding, tiny, {"model.embed_tokens.weight"}, dtype);
  expect_tensor(exec, weights.final_norm, tiny, {"model.norm.weight"}, dtype);
  expect_matrix(weights.head, {tiny.config.tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"});
  ASSERT_EQ(weights.layers.size(), static_cast<std::size_t>(tiny.config.layers));
  for (std::size_t l = 0; l < weights.layers.size(); ++l) {
    const LayerWeights& layer = weights.layers[l];
    const std::string prefix = "model.layers." + std::to_string(l) + ".";
    const std::string attention = prefix + "self_attn.";
    expect_tensor(exec, layer.attention_norm, tiny, {prefix + "input_layernorm.weight"}, dtype);
    expect_tensor(exec, layer.ffn_norm, tiny, {prefix + "post_attention_layernorm.weight"}, dtype);
    expect_matrix(layer.qkv, {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"});
    expect_matrix(layer.o, {attention + "o_proj.weight"});
    expect_matrix(layer.gate_up, {prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"});
    expect_matrix(layer.down, {prefix + "mlp.down_proj.weight"});
  }
}

// Loads, and holds progress and plan against the files.
ModelWeights load(const TempFolder& folder, const TinyCheckpoint& tiny, const Exec& exec) {
  std::vector<std::int64_t> done;
  std::int64_t total = 0;
  ModelWeights weights =
      load_weights(folder.path(), tiny.config, exec, [&](std::int64_t done_bytes, std::int64_t total_bytes) {
        done.push_back(done_bytes);
        total = total_bytes;
      });
  std::int64_t stored_bytes = 0;
  for (const auto& [name, tensor] : tiny.tensors) stored_bytes += static_cast<std::int64_t>(tensor.bytes.size());
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_EQ(total, stored_bytes);
  EXPECT_FALSE(done.empty());
  if (!done.empty()) {
    EXPECT_EQ(done.back(), total);
  }
  EXPECT_EQ(weights.storage.bytes(), plan_weights(folder.path(), tiny.config, DeviceKind::kCuda).device_bytes);
  return weights;
}

TEST(WeightsCuda, HoldWhatTheFileSays) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    const TempFolder folder;
    const TinyCheckpoint tiny(TinyCheckpoint::shape(), dtype);
    tiny.write_single(folder);
    expect_weights(stream.exec(), load(folder, tiny, stream.exec()), tiny, dtype);
  }
}

TEST(WeightsCuda, RoundF32ToBf16) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const TempFolder folder;
  ModelConfig config = TinyCheckpoint::shape();
  config.tied_embeddings = true;
  const TinyCheckpoint tiny(config, DType::kF32);
  tiny.write_single(folder);
  expect_weights(stream.exec(), load(folder, tiny, stream.exec()), tiny, DType::kBf16);
}

TEST(WeightsCuda, NormsTakeTheTypeOfTheMatrices) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  for (const DType matrices : {DType::kBf16, DType::kF16}) {
    const TempFolder folder;
    TinyCheckpoint tiny(TinyCheckpoint::shape(), matrices);
    std::uint32_t number = 200;
    for (auto& [name, tensor] : tiny.tensors) {
      if (tensor.shape.size() != 1) continue;
      const DType other = matrices == DType::kBf16 ? DType::kF16 : DType::kBf16;
      tensor = tiny_tensor(number % 2 == 0 ? DType::kF32 : other, tensor.shape, number);
      ++number;
    }
    tiny.write_single(folder);
    expect_weights(stream.exec(), load(folder, tiny, stream.exec()), tiny, matrices);
  }
}

TEST(WeightsCuda, ComeFromShards) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const TempFolder folder;
  const TinyCheckpoint tiny(TinyCheckpoint::shape(), DType::kBf16);
  tiny.write_shards(folder);
  expect_weights(stream.exec(), load(folder, tiny, stream.exec()), tiny, DType::kBf16);
}

// 48 000 x 1024 in f32 is 98 MB of bf16: four fillings of the two staging buffers of 32 MB, the last one partial.
TEST(WeightsCuda, CrossTheStagingBuffers) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const TempFolder folder;
  ModelConfig config = TinyCheckpoint::shape();
  config.vocab = 48000;
  config.hidden = 1024;
  config.tied_embeddings = true;
  const TinyCheckpoint tiny(config, DType::kF32);
  tiny.write_single(folder);
  expect_weights(stream.exec(), load(folder, tiny, stream.exec()), tiny, DType::kBf16);
}

// All matrices of two sets of weights, on the device and on the CPU, byte for byte.
void expect_int4(const Exec& exec, const ModelWeights& cuda, const ModelWeights& cpu, bool head) {
  const auto same = [&](const LinearWeight& found, const LinearWeight& expected, const std::string& what) {
    ASSERT_TRUE(found.is_int4() && expected.is_int4()) << what;
    ASSERT_EQ(found.rows(), expected.rows()) << what;
    ASSERT_EQ(found.columns(), expected.columns()) << what;
    const std::vector<std::byte> bytes = read_back(exec, tensor_ref(found.int4.data, DType::kU8, found.bytes()));
    const auto* from = expected.int4.data;
    const auto [at, unused] = std::mismatch(bytes.begin(), bytes.end(), from);
    EXPECT_EQ(at, bytes.end()) << what << " differs from byte " << at - bytes.begin() << " of " << bytes.size();
  };
  ASSERT_EQ(cuda.layers.size(), cpu.layers.size());
  for (std::size_t l = 0; l < cpu.layers.size(); ++l) {
    same(cuda.layers[l].qkv, cpu.layers[l].qkv, "qkv of layer " + std::to_string(l));
    same(cuda.layers[l].o, cpu.layers[l].o, "o of layer " + std::to_string(l));
    same(cuda.layers[l].gate_up, cpu.layers[l].gate_up, "gate and up of layer " + std::to_string(l));
    same(cuda.layers[l].down, cpu.layers[l].down, "down of layer " + std::to_string(l));
  }
  EXPECT_EQ(cuda.head.is_int4(), head);
  if (head) same(cuda.head, cpu.head, "head");
}

TEST(Int4WeightsCuda, AreThoseOfTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const WeightFormat format : {WeightFormat::kInt4, WeightFormat::kInt4Head}) {
      for (const bool tied : {false, true}) {
        const TempFolder folder;
        ModelConfig config = TinyCheckpoint::shape();
        config.tied_embeddings = tied;
        const TinyCheckpoint tiny(config, dtype);
        tiny.write_single(folder);
        std::int64_t done = 0;
        std::int64_t total = 0;
        const auto progress = [&](std::int64_t done_bytes, std::int64_t total_bytes) {
          done = done_bytes;
          total = total_bytes;
        };
        const ModelWeights cuda = load_weights(folder.path(), config, stream.exec(), progress, format);
        EXPECT_EQ(done, total);
        const ModelWeights cpu = load_weights(folder.path(), config, Exec{}, nullptr, format);
        expect_int4(stream.exec(), cuda, cpu, format == WeightFormat::kInt4Head);
        const DType held = dtype == DType::kF32 ? DType::kBf16 : dtype;
        expect_tensor(stream.exec(), cuda.embedding, tiny, {"model.embed_tokens.weight"}, held);
        expect_tensor(stream.exec(), cuda.final_norm, tiny, {"model.norm.weight"}, held);
        const WeightsPlan plan = plan_weights(folder.path(), config, DeviceKind::kCuda, format);
        EXPECT_EQ(cuda.storage.bytes(), plan.device_bytes);
        EXPECT_EQ(cuda.panel_bytes, plan.panel_bytes);
      }
    }
  }
}

// gate of 24 000 x 1024 in f32 is 98 MB: three panels of 32 MiB and a rest.
TEST(Int4WeightsCuda, CrossThePanels) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const TempFolder folder;
  ModelConfig config = TinyCheckpoint::shape();
  config.layers = 1;
  config.ffn = 24000;
  config.hidden = 1024;
  const TinyCheckpoint tiny(config, DType::kF32);
  tiny.write_single(folder);
  const ModelWeights cuda = load_weights(folder.path(), config, stream.exec(), nullptr, WeightFormat::kInt4);
  expect_int4(stream.exec(), cuda, load_weights(folder.path(), config, Exec{}, nullptr, WeightFormat::kInt4), false);
}

TEST(SyntheticInt4WeightsCuda, AreThoseOfTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    ModelConfig config = synthetic_model_config("tiny");
    config.dtype = dtype;
    expect_int4(stream.exec(), synthetic_weights(config, 7, stream.exec(), WeightFormat::kInt4Head),
                synthetic_weights(config, 7, Exec{}, WeightFormat::kInt4Head), true);
  }
}

TEST(SyntheticWeightsCuda, AreThoseOfTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    ModelConfig config = synthetic_model_config("tiny");
    config.dtype = dtype;
    const ModelWeights cpu = synthetic_weights(config, 7, Exec{});
    const ModelWeights cuda = synthetic_weights(config, 7, stream.exec());
    ASSERT_EQ(cuda.storage.bytes(), cpu.storage.bytes());
    const auto same = [&](const TensorRef& found, const TensorRef& expected, const char* what) {
      EXPECT_EQ(found.dtype, dtype) << what;
      const std::vector<std::byte> bytes = read_back(stream.exec(), found);
      ASSERT_EQ(found.bytes(), expected.bytes()) << what;
      EXPECT_EQ(std::memcmp(bytes.data(), expected.data, bytes.size()), 0) << what;
    };
    same(cuda.embedding, cpu.embedding, "embedding");
    same(cuda.final_norm, cpu.final_norm, "final norm");
    same(cuda.head.blocks[0], cpu.head.blocks[0], "head");
    for (std::size_t l = 0; l < cpu.layers.size(); ++l) {
      same(cuda.layers[l].attention_norm, cpu.layers[l].attention_norm, "attention norm");
      same(cuda.layers[l].qkv.blocks[0], cpu.layers[l].qkv.blocks[0], "qkv");
      same(cuda.layers[l].o.blocks[0], cpu.layers[l].o.blocks[0], "o");
      same(cuda.layers[l].ffn_norm, cpu.layers[l].ffn_norm, "ffn norm");
      same(cuda.layers[l].gate_up.blocks[0], cpu.layers[l].gate_up.blocks[0], "gate and up");
      same(cuda.layers[l].down.blocks[0], cpu.layers[l].down.blocks[0], "down");
    }
  }
}

}  // namespace
}  // namespace vesper
