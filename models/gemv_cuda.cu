// out = x W^T for 1 to 8 rows of x; the product itself is models/gemv.cuh. Any shape is taken; rows that are not
// 16-byte aligned are loaded by the element, slowly.
#include "models/gemv.h"

#include <cassert>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "models/gemv.cuh"

namespace vesper::cuda {
namespace {

template <typename T, typename Out>
struct GemvArgs {
  StreamedWeight<T> weight;
  StreamedInput<T> input;
  Out* out = nullptr;
  int depth = 0;
};

template <typename T, typename Out, bool kAligned>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    multiply_rows(const __grid_constant__ GemvArgs<T, Out> args) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int rows = args.weight.rows;
  stream_products<T, kAligned>(args.weight, args.input, args.depth, memory,
                               [&](int token, int row, float low, float high) {
                                 Out* out = args.out + static_cast<std::int64_t>(token) * rows;
                                 if (row < rows) out[row] = narrow<Out>(low);
                                 if (row + 8 < rows) out[row + 8] = narrow<Out>(high);
                               });
}

template <typename T, typename Out>
void gemv_typed(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight,
                const TensorRef& out) {
  GemvArgs<T, Out> args;
  args.input = streamed_input<T>(x);
  args.out = static_cast<Out*>(out.data);
  args.weight.data = static_cast<const T*>(weight.data);
  args.weight.rows = static_cast<int>(weight.shape[0]);
  args.weight.columns = static_cast<int>(weight.shape[1]);
  args.weight.tile_rows.tiles = (args.weight.rows + kTileRows - 1) / kTileRows;
  const GemvLayout layout = gemv_layout(args.weight.tile_rows.tiles, multiprocessors);
  args.depth = layout.depth;
  if (rows_are_vectors(args.weight.columns, {x.data, weight.data})) {
    return launch("gemv", multiply_rows<T, Out, true>, layout.dims(), exec.stream, args);
  }
  launch("gemv", multiply_rows<T, Out, false>, layout.dims(), exec.stream, args);
}

}  // namespace

void gemv(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight, const TensorRef& out) {
  assert(x.dtype == weight.dtype && x.shape[0] >= 1 && x.shape[0] <= kMaxGemvRows);
  assert(x.shape[1] == weight.shape[1] && out.shape[0] == x.shape[0] && out.shape[1] == weight.shape[0]);
  dispatch_16bit(x.dtype, "gemv", [&](auto element) {
    using T = decltype(element);
    if (out.dtype == DType::kF32) return gemv_typed<T, float>(exec, multiprocessors, x, weight, out);
    assert(out.dtype == x.dtype);
    gemv_typed<T, T>(exec, multiprocessors, x, weight, out);
  });
}

}  // namespace vesper::cuda
