// A checkpoint small enough to write in a test, whole or in shards, right or wrong.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "models/safetensors.h"
#include "models/weight_table.h"
#include "tests/models/files.h"

namespace vesper {

struct TinyTensor {
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;

  [[nodiscard]] std::vector<float> values() const {
    std::vector<float> all(bytes.size() / static_cast<std::size_t>(dtype_bytes(dtype)));
    for (std::size_t i = 0; i < all.size(); ++i) {
      const std::byte* at = bytes.data() + i * static_cast<std::size_t>(dtype_bytes(dtype));
      std::uint32_t bits = 0;
      std::memcpy(&bits, at, static_cast<std::size_t>(dtype_bytes(dtype)));
      const auto half = static_cast<std::uint16_t>(bits);
      all[i] = dtype == DType::kF32    ? std::bit_cast<float>(bits)
               : dtype == DType::kBf16 ? to_float(bf16{half})
                                       : to_float(f16{half});
    }
    return all;
  }
};

// Values that differ from element to element and from tensor to tensor and use all 24 bits of a float's mantissa.
inline TinyTensor tiny_tensor(DType dtype, std::vector<std::int64_t> shape, std::uint32_t number) {
  std::size_t size = 1;
  for (const std::int64_t extent : shape) size *= static_cast<std::size_t>(extent);
  const auto width = static_cast<std::size_t>(dtype_bytes(dtype));
  TinyTensor tensor{dtype, std::move(shape), std::vector<std::byte>(size * width)};
  std::uint32_t state = number * 2654435761U + 12345U;
  for (std::size_t i = 0; i < size; ++i) {
    state = state * 1664525U + 1013904223U;
    const float value = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-30F;
    std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    if (dtype == DType::kBf16) bits = to_bf16(value).bits;
    if (dtype == DType::kF16) bits = to_f16(value).bits;
    std::memcpy(tensor.bytes.data() + i * width, &bits, width);
  }
  return tensor;
}

struct TinyCheckpoint {
  ModelConfig config;
  std::map<std::string, TinyTensor> tensors;

  TinyCheckpoint(const ModelConfig& shape, DType dtype) : config(shape) {
    std::uint32_t number = 0;
    for (const ExpectedWeight& weight : expected_weights(config)) {
      tensors[weight.name] = tiny_tensor(dtype, weight.shape, number++);
    }
  }

  // Two layers; heads, KV heads, hidden, ffn and vocab all differ, and hidden is not heads * head_dim.
  static ModelConfig shape() {
    ModelConfig config;
    config.layers = 2;
    config.hidden = 24;
    config.heads = 4;
    config.kv_heads = 2;
    config.head_dim = 8;
    config.ffn = 40;
    config.vocab = 50;
    return config;
  }

  void write(const std::string& path, const std::vector<std::string>& names) const {
    std::vector<NamedTensor> all;
    for (const std::string& name : names) {
      const TinyTensor& tensor = tensors.at(name);
      all.push_back({name, tensor.dtype, tensor.shape, tensor.bytes.data()});
    }
    write_safetensors(path, all);
  }

  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, tensor] : tensors) all.push_back(name);
    return all;
  }

  void write_single(const TempFolder& folder) const { write(folder / "model.safetensors", names()); }

  // Tensor i goes to shard i mod 3. Returns the index, already written.
  nlohmann::json write_shards(const TempFolder& folder) const {
    nlohmann::json index = {{"metadata", {{"total_size", 1}}}};
    std::vector<std::vector<std::string>> shards(3);
    std::size_t i = 0;
    for (const std::string& name : names()) shards[i++ % 3].push_back(name);
    for (std::size_t s = 0; s < shards.size(); ++s) {
      const std::string file = "model-" + std::to_string(s + 1) + ".safetensors";
      write(folder / file, shards[s]);
      for (const std::string& name : shards[s]) index["weight_map"][name] = file;
    }
    write_index(folder, index);
    return index;
  }

  static void write_index(const TempFolder& folder, const nlohmann::json& index) {
    write_file(folder / "model.safetensors.index.json", index.dump());
  }
};

}  // namespace vesper
