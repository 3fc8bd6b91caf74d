// The tensors of a Llama checkpoint, declared once: name, shape, sharding, and where they go.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/model_config.h"
#include "models/weights.h"

namespace vesper {

// An extent as the config names it. kAbsent ends the shape of a vector.
enum class Extent : std::uint8_t { kVocab, kHidden, kQRows, kKvRows, kFfn, kAbsent };

// What a rank holds under tensor parallelism: everything, a range of rows (of outputs), or of columns (of inputs; its
// product is then a partial sum).
enum class ShardRule : std::uint8_t { kNone, kRows, kColumns };

// Stores a tensor in the weights; a matrix of several parts grows by one block.
using Destination = void (*)(ModelWeights& weights, int layer, const TensorRef& tensor);

struct WeightRule {
  std::string_view name;  // Hugging Face's; "{}" stands for the layer
  std::array<Extent, 2> shape;
  ShardRule shard;
  Destination destination;  // neighbours with one destination are parts of one matrix: q, k, v; gate, up

  [[nodiscard]] bool is_matrix() const { return shape[1] != Extent::kAbsent; }
  [[nodiscard]] bool is_per_layer() const { return name.find("{}") != std::string_view::npos; }
};

std::span<const WeightRule> llama_weight_table();

// One row of the table for one layer of one model.
struct ExpectedWeight {
  const WeightRule* rule = nullptr;
  int layer = 0;
  std::string name;
  std::vector<std::int64_t> shape;

  [[nodiscard]] std::int64_t elements() const;
  // "[q_rows 2048, hidden 4096]", for messages.
  [[nodiscard]] std::string shape_in_words() const;
};

// All tensors of the model: embedding, layers in order, final norm, and the head unless it is tied.
std::vector<ExpectedWeight> expected_weights(const ModelConfig& config);

// Where the expected weights lie in one buffer, all in one type: each at a multiple of 256 bytes, but the parts of a
// matrix directly behind each other.
struct WeightsLayout {
  DType dtype = DType::kBf16;
  std::vector<std::int64_t> offsets;  // in bytes, one an expected weight
  std::int64_t bytes = 0;
};
WeightsLayout lay_out(std::span<const ExpectedWeight> expected, DType dtype);

// The tensor `i` of a buffer that is laid out so.
TensorRef laid_out_tensor(const WeightsLayout& layout, std::span<const ExpectedWeight> expected, std::size_t i,
                          void* buffer);

// Weights that view `tensors`, one an expected weight. Parts that lie side by side become one block; a tied head is the
// embedding. Sets all but `files` and `storage`.
ModelWeights place_weights(const ModelConfig& config, std::span<const ExpectedWeight> expected,
                           std::span<const TensorRef> tensors);

}  // namespace vesper
