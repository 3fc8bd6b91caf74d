// out = x W^T: the matrix products of the decoder.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "engine/core/cost.h"
#include "engine/core/exec.h"
#include "engine/core/tensor.h"
#include "models/int4.h"

namespace vesper {

// A weight matrix [rows, columns], either as up to three row blocks stacked (on the CPU q, k and v stay where they lie
// in the mapped file; on CUDA they are uploaded side by side and there is one block) or, where `int4` has data, in 4
// bits.
struct LinearWeight {
  std::array<TensorRef, 3> blocks;
  int count = 0;
  Int4Matrix int4 = {};

  [[nodiscard]] bool is_int4() const { return int4.data != nullptr; }
  [[nodiscard]] std::int64_t rows() const {
    if (is_int4()) return int4.rows;
    std::int64_t total = 0;
    for (int b = 0; b < count; ++b) total += blocks[static_cast<std::size_t>(b)].shape[0];
    return total;
  }
  [[nodiscard]] std::int64_t columns() const {
    if (is_int4()) return int4.columns;
    return count == 0 ? 0 : blocks[0].shape[1];
  }
  [[nodiscard]] std::int64_t bytes() const {
    if (is_int4()) return int4.bytes();
    std::int64_t total = 0;
    for (int b = 0; b < count; ++b) total += blocks[static_cast<std::size_t>(b)].bytes();
    return total;
  }
};

// Rows of x up to which CUDA uses the GEMV kernels.
inline constexpr int kMaxGemvRows = 8;

// Rows of x up to which CUDA uses its own tiles (models/small_gemm.h) for a weight in 16 bits, on compute
// capability 9.0 and where rows are on 16 bytes, instead of cuBLASLt.
inline constexpr int kMaxSmallGemmRows = 64;

// The same for 4-bit matrices, which are read once for every kMaxGemvRows rows: up to four times that is less than
// writing and reading the weights in 16 bits.
inline constexpr int kMaxInt4GemvRows = 4 * kMaxGemvRows;

// What the CUDA products need between calls: a cuBLASLt handle, its workspace and a panel for dequantised weights
// (taken when this is built), and the algorithm found for each shape. One a rank; nothing on the CPU. Not thread-safe.
class LinearContext {
 public:
  // Bytes of device memory that a context takes, besides its panel; part of the memory plan.
  static std::int64_t workspace_bytes(DeviceKind device);
  // Bytes of the panel that products with a 4-bit matrix [rows, columns] want; part of the memory plan.
  static std::int64_t panel_bytes(std::int64_t rows, std::int64_t columns);

  // `panel_bytes`: the most of any 4-bit matrix that it will meet; 0 for none, and on the CPU nothing is taken.
  explicit LinearContext(DeviceKind device, std::int64_t panel_bytes = 0);
  ~LinearContext();
  LinearContext(LinearContext&&) noexcept;
  LinearContext& operator=(LinearContext&&) noexcept;
  LinearContext(const LinearContext&) = delete;
  LinearContext& operator=(const LinearContext&) = delete;

  struct Impl;  // defined by the CUDA half
  [[nodiscard]] Impl* impl() const { return impl_.get(); }

 private:
  struct Deleter {
    void operator()(Impl* impl) const noexcept;
  };
  std::unique_ptr<Impl, Deleter> impl_;
};

// out[t, r] = sum_c x[t, c] * weight[r, c], accumulated in fp32.
//   x [tokens, columns];  out [tokens, rows]
// CPU: x and out f32, weight blocks f32, bf16 or f16, widened in registers; each sum runs over 8 fixed lanes (lane i
// holds the products of columns c = i mod 8, added in order), joined as ((0+4)+(2+6))+((1+5)+(3+7)), so that a result
// depends neither on the batch nor on the vector width; a 4-bit weight is the fp32 number that it stands for. CUDA: one
// block, x and weight in one 16-bit type, out in that type or f32. A 4-bit matrix takes x in either type; up to
// kMaxInt4GemvRows rows its scales are applied to fp32 sums over a span, above that each weight is rounded to x's type.
void linear(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
            const TensorRef& out);

// Every weight is read once, however many tokens there are.
Cost linear_cost(DType dtype, DType out_dtype, std::int64_t tokens, std::int64_t rows, std::int64_t columns);
// The same for a 4-bit matrix; `dtype` is that of x.
Cost linear_int4_cost(DType dtype, DType out_dtype, std::int64_t tokens, std::int64_t rows, std::int64_t columns);

namespace cpu {
void linear(TensorView<const float, 2> x, const LinearWeight& weight, TensorView<float, 2> out);
}  // namespace cpu
namespace cuda {
std::int64_t linear_workspace_bytes();
int linear_multiprocessors(const LinearContext& context);
LinearContext::Impl* create_linear_context(std::int64_t panel_bytes);
void destroy_linear_context(LinearContext::Impl* impl) noexcept;
void linear(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
            const TensorRef& out);
// The same through cuBLASLt however few rows x has: what the GEMV kernels are measured against.
void linear_cublaslt(const Exec& exec, const LinearContext& context, const TensorRef& x, const TensorRef& matrix,
                     const TensorRef& out);
}  // namespace cuda

}  // namespace vesper
