#include "models/int4.h"

namespace vesper {

void quantise_int4(const Exec& exec, const TensorRef& from, std::int64_t first_row, const Int4Matrix& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::quantise_int4(exec, from, first_row, out);
  }
  cpu::quantise_int4(from, first_row, out);
}

void clear_int4_padding(const Exec& exec, const Int4Matrix& matrix) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::clear_int4_padding(exec, matrix);
  }
  cpu::clear_int4_padding(matrix);
}

void dequantise_int4(const Exec& exec, const Int4Matrix& matrix, std::int64_t first_row, const TensorRef& out) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::dequantise_int4(exec, matrix, first_row, out);
  }
  cpu::dequantise_int4(matrix, first_row, out);
}

}  // namespace vesper
