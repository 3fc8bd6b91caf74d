// out = x W^T for 1 to 8 rows of x, W of 16 or of 4 bits; the product itself is models/gemv.cuh.
#include "models/gemv.h"

#include <cassert>

#include "engine/core/dispatch.h"
#include "engine/core/launch.cuh"
#include "models/gemv.cuh"
#include "models/gemv_int4.cuh"

namespace vesper::cuda {
namespace {

template <typename Weight, typename Out>
struct GemvArgs {
  Weight weight;
  StreamedInput<typename Weight::T> input;
  Out* out = nullptr;
  int depth = 0;
};

template <bool kAligned, typename Weight, typename Out>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    multiply_rows(const __grid_constant__ GemvArgs<Weight, Out> args) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int rows = args.weight.rows;
  stream_products<kAligned>(args.weight, args.input, args.depth, memory,
                            [&](int token, int row, float low, float high) {
                              Out* out = args.out + static_cast<std::int64_t>(token) * rows;
                              if (row < rows) out[row] = narrow<Out>(low);
                              if (row + Weight::kBand < rows) out[row + Weight::kBand] = narrow<Out>(high);
                            });
}

template <typename Weight, typename Out>
void launch_gemv(const char* name, const Exec& exec, int multiprocessors, bool aligned, const TensorRef& x,
                 const Weight& weight, const TensorRef& out) {
  const GemvLayout layout = gemv_layout(weight, multiprocessors);
  const GemvArgs<Weight, Out> args{weight, streamed_input<typename Weight::T>(x), static_cast<Out*>(out.data),
                                   layout.depth};
  launch(name, aligned ? multiply_rows<true, Weight, Out> : multiply_rows<false, Weight, Out>, layout.dims, exec.stream,
         args);
}

// To out's type: x's or f32.
template <typename Weight>
void gemv_to(const char* name, const Exec& exec, int multiprocessors, bool aligned, const TensorRef& x,
             const Weight& weight, const TensorRef& out) {
  if (out.dtype == DType::kF32) return launch_gemv<Weight, float>(name, exec, multiprocessors, aligned, x, weight, out);
  assert(out.dtype == x.dtype);
  launch_gemv<Weight, typename Weight::T>(name, exec, multiprocessors, aligned, x, weight, out);
}

}  // namespace

bool gemv(const Exec& exec, int multiprocessors, const TensorRef& x, const TensorRef& weight, const TensorRef& out) {
  assert(x.dtype == weight.dtype && x.shape[0] >= 1 && x.shape[0] <= kMaxGemvRows);
  assert(x.shape[1] == weight.shape[1] && out.shape[0] == x.shape[0] && out.shape[1] == weight.shape[0]);
  if (!rows_are_vectors(x.shape[1], {x.data, weight.data})) return false;
  dispatch_16bit(x.dtype, "gemv", [&](auto element) {
    using Weight = StreamedWeight<decltype(element)>;
    const Weight streamed{.data = static_cast<const decltype(element)*>(weight.data),
                          .rows = static_cast<int>(weight.shape[0]),
                          .columns = static_cast<int>(weight.shape[1]),
                          .tile_rows = rows_in_order<Weight::kBand>(weight.shape[0])};
    gemv_to("gemv", exec, multiprocessors, true, x, streamed, out);
  });
  return true;
}

void gemv_int4(const Exec& exec, int multiprocessors, const TensorRef& x, const Int4Matrix& weight,
               const TensorRef& out) {
  assert(x.shape[0] >= 1 && x.shape[0] <= kMaxGemvRows && x.shape[1] == weight.columns);
  assert(out.shape[0] == x.shape[0] && out.shape[1] == weight.rows);
  dispatch_16bit(x.dtype, "gemv_int4", [&](auto element) {
    const auto multiply = [&]<typename Weight>(Weight streamed) {
      streamed.data = weight.data;
      streamed.rows = static_cast<int>(weight.rows);
      streamed.columns = static_cast<int>(weight.columns);
      streamed.tile_rows = rows_in_order<Weight::kBand>(weight.rows);
      gemv_to("gemv_int4", exec, multiprocessors, rows_are_vectors(weight.columns, {x.data}), x, streamed, out);
    };
    // From some rows of x on a tile's x is more bytes than its codes, so that more rows of W share it.
    constexpr std::int64_t kFewTokens = 4;
    if (x.shape[0] <= kFewTokens) return multiply(StreamedInt4<decltype(element), 1>{});
    multiply(StreamedInt4<decltype(element), 2>{});
  });
}

}  // namespace vesper::cuda
