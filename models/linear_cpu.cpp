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
  // Rows a tile: within kTileBytes, and enough tiles to keep all threads busy to the end; a multiple of 8, which the
  // inner loops divide.
  const std::int64_t most_rows = kTileBytes / (columns * dtype_bytes(weight.blocks[0].dtype));
  const std::int64_t fair_rows = weight.rows() / (std::int64_t{8} * cpu_threads());
  const std::int64_t tile_rows = std::max<std::int64_t>(8, std::min(most_rows, fair_rows) / 8 * 8);
  const std::int64_t token_tiles = divide_up(tokens, kTileTokens);

  std::array<std::int64_t, 4> first_tile = {};  // of each block of rows
  for (int b = 0; b < weight.count; ++b) {
    const auto block = static_cast<std::size_t>(b);
    first_tile[block + 1] = first_tile[block] + divide_up(weight.blocks[block].shape[0], tile_rows) * token_tiles;
  }
  const std::int64_t tiles = first_tile[static_cast<std::size_t>(weight.count)];
  const std::int64_t grain = kThreadProducts / (tile_rows * std::min(tokens, kTileTokens) * columns);
  const auto multiply = has_avx2() ? avx2::multiply : baseline::multiply;

  parallel_for(tiles, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::size_t b = 0;
      std::int64_t block_row = 0;
      for (; i >= first_tile[b + 1]; ++b) block_row += weight.blocks[b].shape[0];
      const TensorRef& block = weight.blocks[b];
      const std::int64_t r = (i - first_tile[b]) / token_tiles * tile_rows;
      const std::int64_t t = (i - first_tile[b]) % token_tiles * kTileTokens;
      multiply({.x = x.data() + t * columns,
                .tokens = std::min(kTileTokens, tokens - t),
                .columns = columns,
                .weight = static_cast<const std::byte*>(block.data) + r * columns * dtype_bytes(block.dtype),
                .dtype = block.dtype,
                .rows = std::min(tile_rows, block.shape[0] - r),
                .out = out.data() + t * out.shape(1) + block_row + r,
                .out_stride = out.shape(1)});
    }
  });
}

}  // namespace vesper::cpu
