// out = x W^T on CUDA: few rows of x through the GEMV kernel or through small_gemm, many through cuBLASLt.
//
// cuBLASLt thinks in column-major matrices. Row-major out [tokens, rows] is column-major [rows, tokens], row-major W is
// column-major [columns, rows], row-major x is column-major [columns, tokens], so the product is out' = W'^T x', the
// form that cuBLAS calls TN. Sums are fp32; where cuBLASLt splits them over blocks, the parts are also fp32 (they are
// added in its workspace, in a fixed order), so a 16-bit output is rounded once.
// Bytes: W once for every tile of tokens that a block covers; from some hundred tokens on the product is bound by
// flops. A 4-bit W goes through the GEMV kernel eight tokens at a time while that is the fewer bytes, else in panels of
// rows that are dequantised and multiplied one after the other, each into its columns of out.
#include <cublasLt.h>

#include <algorithm>
#include <cassert>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "engine/core/buffer.h"
#include "engine/core/error.h"
#include "engine/core/launch.cuh"
#include "engine/core/stream.h"
#include "models/gemv.h"
#include "models/linear.h"
#include "models/small_gemm.h"

namespace vesper {
namespace {

void check_cublas(cublasStatus_t status, const std::string& doing) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail({doing, std::string("cuBLASLt's answer ") + cublasLtGetStatusString(status), "", ""});
}

// What cuBLASLt's choice depends on. Alignments are powers of two in bytes, up to 256.
struct Shape {
  std::int64_t tokens = 0;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t out_stride = 0;  // from one token of out to the next
  DType dtype = DType::kBf16;
  DType out_dtype = DType::kBf16;
  std::uint32_t weight_alignment = 0;
  std::uint32_t x_alignment = 0;
  std::uint32_t out_alignment = 0;

  [[nodiscard]] auto key() const {
    return std::tie(tokens, rows, columns, out_stride, dtype, out_dtype, weight_alignment, x_alignment, out_alignment);
  }
  bool operator<(const Shape& other) const { return key() < other.key(); }
};

std::uint32_t alignment_of(const void* data) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  return static_cast<std::uint32_t>(std::min<std::uintptr_t>(256, address & (~address + 1)));
}

TensorRef rows_from(TensorRef tensor, std::int64_t first, std::int64_t count) {
  tensor.data = static_cast<std::byte*>(tensor.data) + first * tensor.shape[1] * dtype_bytes(tensor.dtype);
  tensor.shape[0] = count;
  return tensor;
}

cudaDataType_t cuda_type(DType dtype) {
  if (dtype == DType::kBf16) return CUDA_R_16BF;
  if (dtype == DType::kF16) return CUDA_R_16F;
  assert(dtype == DType::kF32);
  return CUDA_R_32F;
}

// A product as cuBLASLt wants it told, and the algorithm it answers with. The opaque structs are plain values: they own
// nothing and need no release.
struct Product {
  Product(cublasLtHandle_t handle, const Shape& shape, std::int64_t workspace_bytes);

  cublasLtMatmulDescOpaque_t operation{};
  cublasLtMatrixLayoutOpaque_t weight{};
  cublasLtMatrixLayoutOpaque_t x{};
  cublasLtMatrixLayoutOpaque_t out{};
  cublasLtMatmulAlgo_t algorithm{};
};

Product::Product(cublasLtHandle_t handle, const Shape& shape, std::int64_t workspace_bytes) {
  const std::string doing = "preparing the product [" + std::to_string(shape.tokens) + ", " +
                            std::to_string(shape.columns) + "] x [" + std::to_string(shape.rows) + ", " +
                            std::to_string(shape.columns) + "]^T of " + std::string(dtype_name(shape.dtype));
  const auto check = [&](cublasStatus_t status) { check_cublas(status, doing); };
  const auto rows = static_cast<std::uint64_t>(shape.rows);
  const auto columns = static_cast<std::uint64_t>(shape.columns);
  const auto tokens = static_cast<std::uint64_t>(shape.tokens);
  check(cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check(cublasLtMatmulDescSetAttribute(&operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)));
  check(cublasLtMatrixLayoutInit(&weight, cuda_type(shape.dtype), columns, rows, shape.columns));
  check(cublasLtMatrixLayoutInit(&x, cuda_type(shape.dtype), columns, tokens, shape.columns));
  check(cublasLtMatrixLayoutInit(&out, cuda_type(shape.out_dtype), rows, tokens, shape.out_stride));

  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(workspace_bytes));
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, shape.weight_alignment);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, shape.x_alignment);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, shape.out_alignment);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, shape.out_alignment);
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  check(cublasLtMatmulAlgoGetHeuristic(handle, &operation, &weight, &x, &out, &out, &preference, 1, &result, &found));
  check(found == 1 ? result.state : CUBLAS_STATUS_NOT_SUPPORTED);
  algorithm = result.algo;
}

}  // namespace

struct LinearContext::Impl {
  explicit Impl(std::int64_t panel_bytes)
      : workspace(Memory::kDevice, cuda::linear_workspace_bytes(), "cuBLASLt's workspace"),
        panel(Memory::kDevice, panel_bytes, "the panel of dequantised weights") {
    multiprocessors = device_info(DeviceKind::kCuda).multiprocessors;
    check_cublas(cublasLtCreate(&handle), "starting cuBLASLt");
  }
  ~Impl() { cublasLtDestroy(handle); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  Impl(Impl&&) = delete;
  Impl& operator=(Impl&&) = delete;

  Buffer workspace;
  Buffer panel;
  cublasLtHandle_t handle = nullptr;
  int multiprocessors = 0;
  std::map<Shape, Product> products;
};

namespace {

// Columns first_row, first_row + 1, ... of out = x matrix^T, through cuBLASLt.
void multiply_many(const Exec& exec, LinearContext::Impl& impl, const TensorRef& x, const TensorRef& matrix,
                   const TensorRef& out, std::int64_t first_row) {
  void* to = static_cast<std::byte*>(out.data) + first_row * dtype_bytes(out.dtype);
  const Shape shape{.tokens = x.shape[0],
                    .rows = matrix.shape[0],
                    .columns = matrix.shape[1],
                    .out_stride = out.shape[1],
                    .dtype = x.dtype,
                    .out_dtype = out.dtype,
                    .weight_alignment = alignment_of(matrix.data),
                    .x_alignment = alignment_of(x.data),
                    .out_alignment = alignment_of(to)};
  auto found = impl.products.find(shape);
  if (found == impl.products.end()) {
    found = impl.products.try_emplace(shape, impl.handle, shape, impl.workspace.bytes()).first;
  }
  Product& product = found->second;
  const float one = 1.0F;
  const float zero = 0.0F;
  check_cublas(cublasLtMatmul(impl.handle, &product.operation, &one, matrix.data, &product.weight, x.data, &product.x,
                              &zero, to, &product.out, to, &product.out, &product.algorithm, impl.workspace.data(),
                              static_cast<std::size_t>(impl.workspace.bytes()), exec.stream),
               "multiplying matrices");
}

void linear_int4(const Exec& exec, LinearContext::Impl& impl, const TensorRef& x, const Int4Matrix& weight,
                 const TensorRef& out) {
  const std::int64_t tokens = x.shape[0];
  if (tokens <= kMaxInt4GemvRows) {
    for (std::int64_t t = 0; t < tokens; t += kMaxGemvRows) {
      const std::int64_t count = std::min<std::int64_t>(kMaxGemvRows, tokens - t);
      cuda::gemv_int4(exec, impl.multiprocessors, rows_from(x, t, count), weight, rows_from(out, t, count));
    }
    return;
  }
  assert(impl.panel.bytes() >= LinearContext::panel_bytes(weight.rows, weight.columns));
  const std::int64_t fit = impl.panel.bytes() / (2 * weight.columns);
  const std::int64_t step = fit < weight.rows ? fit / kInt4CellRows * kInt4CellRows : weight.rows;
  for (std::int64_t r = 0; r < weight.rows; r += step) {
    const TensorRef panel = impl.panel.ref(x.dtype, std::min(step, weight.rows - r), weight.columns);
    cuda::dequantise_int4(exec, weight, r, panel);
    multiply_many(exec, impl, x, panel, out, r);
  }
}

}  // namespace

namespace cuda {

// What NVIDIA recommends for cuBLAS: 32 MiB on Hopper, 4 MiB before it (cuBLAS documentation, cublasSetWorkspace).
std::int64_t linear_workspace_bytes() {
  return (device_info(DeviceKind::kCuda).compute_capability >= 90 ? 32LL : 4LL) << 20;
}

int linear_multiprocessors(const LinearContext& context) {
  return context.impl()->multiprocessors;
}

LinearContext::Impl* create_linear_context(std::int64_t panel_bytes) {
  return std::make_unique<LinearContext::Impl>(panel_bytes).release();
}

void destroy_linear_context(LinearContext::Impl* impl) noexcept {
  const std::unique_ptr<LinearContext::Impl> owned(impl);
}

void linear(const Exec& exec, const LinearContext& context, const TensorRef& x, const LinearWeight& weight,
            const TensorRef& out) {
  assert(context.impl() != nullptr);
  LinearContext::Impl& impl = *context.impl();
  assert(x.shape[1] == weight.columns() && out.shape[0] == x.shape[0] && out.shape[1] == weight.rows());
  if (out.size() == 0) return;
  if (weight.is_int4()) return linear_int4(exec, impl, x, weight.int4, out);
  assert(weight.count == 1 && x.dtype == weight.blocks[0].dtype);
  if (x.shape[0] <= kMaxGemvRows && gemv(exec, impl.multiprocessors, x, weight.blocks[0], out)) return;
  if (small_gemm(exec, impl.multiprocessors, x, weight.blocks[0], out)) return;
  multiply_many(exec, impl, x, weight.blocks[0], out, 0);
}

void linear_cublaslt(const Exec& exec, const LinearContext& context, const TensorRef& x, const TensorRef& matrix,
                     const TensorRef& out) {
  multiply_many(exec, *context.impl(), x, matrix, out, 0);
}

}  // namespace cuda
}  // namespace vesper
