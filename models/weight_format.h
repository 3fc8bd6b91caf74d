// What a run holds its matrices in: the checkpoint's own type, or 4 bits (models/int4.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/int4.h"

namespace vesper {

struct ExpectedWeight;

// kInt4: the matrices of the layers are quantised while they are loaded; embedding, head and norms stay as they are.
// kInt4Head: the head too; one that is tied to the embedding is quantised beside it.
enum class WeightFormat : std::uint8_t { kStored, kInt4, kInt4Head };

// "stored", "int4", "int4,head", as --weights has them.
std::string_view weight_format_name(WeightFormat format);
// An unknown name is an input error that lists the known ones.
WeightFormat weight_format_of(const std::string& name);

// Rows of a quantised matrix that come from one tensor: q, k and v, or gate and up, are parts of one matrix.
struct Int4Part {
  std::size_t weight = 0;   // the tensor, by its number among the expected weights
  std::int64_t offset = 0;  // of the matrix, in bytes
  std::int64_t rows = 0;    // of the matrix
  std::int64_t columns = 0;
  std::int64_t first_row = 0;
  bool beside = false;  // the tensor itself stays too: a tied head, made of the embedding

  [[nodiscard]] Int4Matrix matrix(void* storage) const {
    return {.data = static_cast<std::byte*>(storage) + offset, .rows = rows, .columns = columns};
  }
};

// The quantised matrices of a model, one after the other in one piece of memory, each at a multiple of 256 bytes.
struct Int4Layout {
  std::vector<Int4Part> parts;  // in the order of their tensors
  std::int64_t bytes = 0;

  // The part that a tensor becomes, or nullptr.
  [[nodiscard]] const Int4Part* of(std::size_t weight) const;
  // Whether that tensor itself is not held.
  [[nodiscard]] bool replaces(std::size_t weight) const;
};
// Of the quantised matrices that a layout of a model's `expected` weights would hold for `format`.
Int4Layout lay_out_int4(std::span<const ExpectedWeight> expected, bool tied_head, WeightFormat format);

}  // namespace vesper
