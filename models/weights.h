// The weights of a model on a device, wherever they came from.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/core/buffer.h"
#include "engine/core/exec.h"
#include "models/linear.h"
#include "models/model_config.h"
#include "models/safetensors.h"
#include "models/weight_format.h"

namespace vesper {

struct LayerWeights {
  TensorRef attention_norm;  // [hidden]
  LinearWeight qkv;          // [(heads + 2 kv_heads) * head_dim, hidden]: q, k, v
  LinearWeight o;            // [hidden, heads * head_dim]
  TensorRef ffn_norm;        // [hidden]
  LinearWeight gate_up;      // [2 ffn, hidden]: gate, up
  LinearWeight down;         // [hidden, ffn]
};

// Views, and the memory that they look into: mapped files on the CPU, one device buffer on CUDA. Move-only.
struct ModelWeights {
  TensorRef embedding;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  TensorRef final_norm;          // [hidden]
  LinearWeight head;             // [vocab, hidden]; the embedding where tied
  DType dtype = DType::kF32;     // of the embedding: on CUDA what activations and KV run in
  std::int64_t bytes = 0;        // all weights, tied ones once
  std::int64_t panel_bytes = 0;  // what LinearContext takes to multiply 4-bit matrices by many rows

  std::vector<SafetensorsFile> files;
  Buffer storage;
};

// Reports loading: bytes done of bytes in all. Called from the loading thread.
using Progress = std::function<void(std::int64_t done_bytes, std::int64_t total_bytes)>;

// What the device will hold, before anything is allocated: for the memory plan. Reads only headers.
struct WeightsPlan {
  DType dtype = DType::kBf16;  // bf16 on CUDA for f32 files
  std::int64_t device_bytes = 0;
  std::int64_t panel_bytes = 0;  // what LinearContext takes to multiply 4-bit matrices by many rows
};
WeightsPlan plan_weights(const std::string& folder, const ModelConfig& config, DeviceKind device,
                         WeightFormat format = WeightFormat::kStored);
WeightsPlan plan_synthetic_weights(const ModelConfig& config, DeviceKind device,
                                   WeightFormat format = WeightFormat::kStored);

// Opens, checks and loads FOLDER/model.safetensors or the shards of FOLDER/model.safetensors.index.json. All matrices
// must share one type. On the CPU the files stay mapped, each tensor of its own type, and nothing is copied, save
// tensors that a header of odd length leaves unaligned for their type; `progress` is called for what is quantised. On
// CUDA they are read and converted to the 16-bit type by the CPU's threads into two pinned staging buffers, overlapped
// with the copies (models/uploader.h); done when this returns.
// What `format` quantises is made from the stored values, so that it has the same bits on both. Ignored tensors are
// logged in one line. Throws input errors for everything that a wrong folder can hold.
ModelWeights load_weights(const std::string& folder, const ModelConfig& config, const Exec& exec,
                          const Progress& progress, WeightFormat format = WeightFormat::kStored);

// Weights drawn from a seed, filled on the device (queued on CUDA): Philox, uniform with the variance that keeps
// activations near one; in config.dtype, on CUDA bf16 for f32, and quantised from that. The same seed gives the same
// values on CPU and CUDA.
ModelWeights synthetic_weights(const ModelConfig& config, std::uint64_t seed, const Exec& exec,
                               WeightFormat format = WeightFormat::kStored);

}  // namespace vesper
