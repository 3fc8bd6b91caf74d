// What the second-level cache is to do with what is read: to give it up first, or to keep it. A step reads each weight,
// key and value once, several hundred megabytes in a layer. As they come in they would push out what every layer needs
// again, the code of the kernels before all, for which a kernel then waits while it has nothing else to do
// (docs/kernels.md, "Code"). Compute capability 8.0 and up. Source: PTX ISA, "createpolicy".
#pragma once

#include <cstdint>

namespace vesper::cuda {

__device__ inline std::uint64_t evict_first() {
  std::uint64_t hint;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(hint));
  return hint;
}
__device__ inline std::uint64_t evict_last() {
  std::uint64_t hint;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(hint));
  return hint;
}

}  // namespace vesper::cuda
