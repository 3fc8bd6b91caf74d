// out = x W^T for 9 to 64 rows of x; the product itself is models/small_gemm.cuh.
#include "models/small_gemm.h"

#include <cassert>

#include "engine/core/dispatch.h"
#include "engine/core/vector.cuh"
#include "models/small_gemm.cuh"

namespace vesper::cuda {
namespace {

template <typename Out>
struct PlainOutput {
  Out* out = nullptr;  // [tokens, rows]
  int rows = 0;

  __device__ void operator()(int t, int row, float low, float high) const {
    Out* to = out + static_cast<std::int64_t>(t) * rows + row;
    to[0] = narrow<Out>(low);
    if (row + kBandRows < rows) to[kBandRows] = narrow<Out>(high);
  }
};

template <typename T, typename Out>
void launch_plain(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                  const TensorRef& out) {
  const std::int64_t rows = weight.shape[0];
  const PlainOutput<Out> output{static_cast<Out*>(out.data), static_cast<int>(rows)};
  launch_small_gemm<T>("small_gemm", exec, multiprocessors, x, weight, bands_in_order(rows), output);
}

}  // namespace

// Two blocks share a tile where there is room for all of them at once. Tiles are small otherwise, though each reads x
// anew: while the sums of a block's last tile are put out, nothing is under way to it (docs/kernels.md).
TilePlan plan_tiles(std::int64_t rows, std::int64_t columns, int multiprocessors) {
  constexpr std::int64_t kFewColumns = 1024;  // not worth a meeting
  const std::int64_t room = std::int64_t{kSmallGemmBlocks} * multiprocessors;
  const auto tiles_of = [&](int tile_rows) { return (rows + tile_rows - 1) / tile_rows; };
  for (const int tile_rows : {32, 64}) {
    const std::int64_t blocks = kParts * tiles_of(tile_rows);
    if (columns >= kFewColumns && blocks <= room) {
      return {.rows = tile_rows, .parts = kParts, .grid = static_cast<int>(blocks)};
    }
  }
  const std::int64_t tiles = tiles_of(32);
  const std::int64_t rounds = (tiles + room - 1) / room;
  return {.rows = 32, .parts = 1, .grid = static_cast<int>((tiles + rounds - 1) / rounds)};
}

bool has_small_gemm() {
  static const bool has = code_version(multiply_tiles<bf16, 32, PlainOutput<bf16>>) == 90;
  return has;
}

bool small_gemm_takes(const TensorRef& x, const TensorRef& weight) {
  return x.shape[0] > kMaxGemvRows && x.shape[0] <= kMaxSmallGemmRows && x.dtype == weight.dtype &&
         rows_are_vectors(x.shape[1], {x.data, weight.data}) && has_small_gemm();
}

bool small_gemm(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                const TensorRef& out) {
  assert(x.shape[1] == weight.shape[1] && out.shape[0] == x.shape[0] && out.shape[1] == weight.shape[0]);
  if (!small_gemm_takes(x, weight)) return false;
  dispatch_16bit(x.dtype, "small_gemm", [&](auto element) {
    using T = decltype(element);
    if (out.dtype == DType::kF32) return launch_plain<T, float>(exec, multiprocessors, x, weight, out);
    assert(out.dtype == x.dtype);
    launch_plain<T, T>(exec, multiprocessors, x, weight, out);
  });
  return true;
}

}  // namespace vesper::cuda
