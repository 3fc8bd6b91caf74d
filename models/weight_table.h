// The tensors of a Llama checkpoint, declared once: name, shape, sharding, and where they go.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/model_config.h"
#include "models/weight_format.h"
#include "models/weights.h"

namespace vesper {

// An extent as the config names it. kAbsent ends the shape of a vector.
enum class Extent : std::uint8_t { kVocab, kHidden, kQRows, kKvRows, kFfn, kAbsent };

// What a rank holds under tensor parallelism: everything, a range of rows (of outputs), or of columns (of inputs; its
// product is then a partial sum).
enum class ShardRule : std::uint8_t { kNone, kRows, kColumns };

// A weight where it lies: a tensor, or the whole 4-bit matrix that it is a part of. The embedding may be both: its copy
// in 4 bits is the head.
struct PlacedWeight {
  TensorRef tensor;
  Int4Matrix int4;
};

// Stores a weight in its place; a matrix of several tensors grows by one block.
using Destination = void (*)(ModelWeights& weights, int layer, const PlacedWeight& placed);

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

// Where the expected weights lie in one buffer: first those that stay tensors, all in one type, each at a multiple of
// 256 bytes, but the parts of a matrix directly behind each other; then the quantised matrices.
struct WeightsLayout {
  DType dtype = DType::kBf16;
  std::vector<std::int64_t> offsets;  // in bytes, one an expected weight; 0 for what is quantised
  Int4Layout int4;
  std::int64_t int4_offset = 0;
  std::int64_t bytes = 0;
};
WeightsLayout lay_out(std::span<const ExpectedWeight> expected, DType dtype, Int4Layout int4 = {});

// The weight `i` of a buffer that is laid out so.
PlacedWeight laid_out_weight(const WeightsLayout& layout, std::span<const ExpectedWeight> expected, std::size_t i,
                             void* buffer);

// Weights that view `placed`, one an expected weight. Parts that lie side by side become one block; a tied head is the
// embedding. Sets all but `files` and `storage`.
ModelWeights place_weights(const ModelConfig& config, std::span<const ExpectedWeight> expected,
                           std::span<const PlacedWeight> placed);

}  // namespace vesper
