// How blocks of one launch, or of two that overlap, tell each other through device memory that work is done.
// Device-wide order as in cooperative groups: a barrier of the block, then one thread's fence and atomic, and the same
// backwards.
#pragma once

#include <cstdint>

namespace vesper::cuda {

// Whether this is the last of `blocks` blocks to come here, which then sees what all of them wrote before (read through
// the second-level cache, __ldcg). `ticket` is zero before and after. All threads of a block call it.
__device__ inline bool is_last_block(std::int32_t* ticket, int blocks) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1) == blocks - 1;
    if (is_last) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace vesper::cuda
