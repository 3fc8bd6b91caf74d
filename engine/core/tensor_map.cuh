// Descriptions of tensors in device memory that the copy engine of compute capability 9.0 takes boxes out of.
// Source: CUDA driver API, "Tensor Map Object Management"; PTX ISA, "Tensors".
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <array>
#include <cstdint>
#include <string>

#include "engine/core/dtype.h"
#include "engine/core/launch.cuh"

namespace vesper::cuda {

// A tensor of a 16-bit type, `extents` elements along each dimension, the innermost first, whose elements follow each
// other; `strides` in bytes, of the other dimensions, multiples of 16, as is `data`. A copy takes `box` elements along
// each dimension; those outside the tensor are zero, and are counted as bytes that land all the same.
template <std::size_t kRank>
CUtensorMap tensor_map(DType dtype, const void* data, const std::array<std::int64_t, kRank>& extents,
                       const std::array<std::int64_t, kRank - 1>& strides, const std::array<int, kRank>& box,
                       CUtensorMapSwizzle swizzle) {
  constexpr const char* kDoing = "asking the driver how to describe a tensor";
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          kDoing);
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found), kDoing);
#endif
    if (found != cudaDriverEntryPointSuccess) {
      fail({kDoing, "no cuTensorMapEncodeTiled", "a driver for CUDA 12", "update the driver"});
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  std::array<cuuint64_t, kRank> sizes{};
  std::array<cuuint64_t, kRank - 1> pitches{};
  std::array<cuuint32_t, kRank> boxes{};
  std::array<cuuint32_t, kRank> steps{};
  for (std::size_t i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(extents[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) pitches[i - 1] = static_cast<cuuint64_t>(strides[i - 1]);
  }
  CUtensorMap map;
  const CUresult status = encode(
      &map, dtype == DType::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank,
      const_cast<void*>(data), sizes.data(), pitches.data(), boxes.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) fail({"describing a tensor to the driver", "error " + std::to_string(status), "", ""});
  return map;
}

}  // namespace vesper::cuda
