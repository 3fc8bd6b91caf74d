// out = x W^T on the CPU; see models/linear.h. The work is cut into tiles of rows x tokens; the inner loops are in
// models/linear_lanes.cpp.
#include <algorithm>
#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>

#include "engine/core/lanes.h"
#include "engine/core/parallel.h"
#include "models/linear.h"
#include "models/linear_lanes.h"

namespace vesper::cpu {
namespace {

// A tile's weights are read once from memory and then, for each few tokens, from the second-level cache.
constexpr std::int64_t kTileBytes = 128 << 10;
constexpr std::int64_t kTileTokens = 96;
// Fewer multiplications than this, about 10 us of one thread, are not worth a second thread.
constexpr std::int64_t kThreadProducts = 128 << 10;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

void linear(TensorView<const float, 2> x, const LinearWeight& weight, TensorView<float, 2> out) {
  const std::int64_t tokens = x.shape(0);
  const std::int64_t columns = x.shape(1);
  assert(weight.columns() == columns && weight.rows() == out.shape(1) && out.shape(0) == tokens);
  const int count = weight.is_int4() ? 1 : weight.count;
  const auto rows_of = [&](std::size_t b) { return weight.is_int4() ? weight.int4.rows : weight.blocks[b].shape[0]; };
  // Rows a tile: within kTileBytes, and enough tiles to keep all threads busy to the end; a multiple of 8, which the
  // inner loops divide, or of the rows of a cell.
  const std::int64_t row_bytes =
      weight.is_int4() ? weight.int4.band_bytes() / kInt4CellRows : columns * dtype_bytes(weight.blocks[0].dtype);
  const std::int64_t unit = weight.is_int4() ? kInt4CellRows : 8;
  const std::int64_t most_rows = kTileBytes / row_bytes;
  const std::int64_t fair_rows = weight.rows() / (std::int64_t{8} * cpu_threads());
  const std::int64_t tile_rows = std::max(unit, std::min(most_rows, fair_rows) / unit * unit);
  const std::int64_t token_tiles = divide_up(tokens, kTileTokens);

  std::array<std::int64_t, 4> first_tile = {};  // of each block of rows
  for (std::size_t b = 0; b < static_cast<std::size_t>(count); ++b) {
    first_tile[b + 1] = first_tile[b] + divide_up(rows_of(b), tile_rows) * token_tiles;
  }
  const std::int64_t tiles = first_tile[static_cast<std::size_t>(count)];
  const std::int64_t grain = kThreadProducts / (tile_rows * std::min(tokens, kTileTokens) * columns);
  const auto multiply = has_avx2() ? avx2::multiply : baseline::multiply;

  parallel_for(tiles, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::size_t b = 0;
      std::int64_t block_row = 0;
      for (; i >= first_tile[b + 1]; ++b) block_row += rows_of(b);
      const std::int64_t r = (i - first_tile[b]) / token_tiles * tile_rows;
      const std::int64_t t = (i - first_tile[b]) % token_tiles * kTileTokens;
      const void* first = weight.is_int4() ? weight.int4.data : weight.blocks[b].data;
      multiply({.x = x.data() + t * columns,
                .tokens = std::min(kTileTokens, tokens - t),
                .columns = columns,
                .weight = static_cast<const std::byte*>(first) + r * row_bytes,
                .dtype = weight.blocks[b].dtype,
                .is_int4 = weight.is_int4(),
                .rows = std::min(tile_rows, rows_of(b) - r),
                .out = out.data() + t * out.shape(1) + block_row + r,
                .out_stride = out.shape(1)});
    }
  });
}

}  // namespace vesper::cpu
