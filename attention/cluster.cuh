// Thread-block clusters along y: blocks that run side by side and write to each other's shared memory. Compute
// capability 9.0 and up; before that every block is a cluster of its own.
// Source: PTX ISA, "barrier.cluster"; "mapa"; CUDA programming guide, "Distributed shared memory".
#pragma once

#include "attention/mma.cuh"

namespace vesper::cuda {

inline constexpr int kMaxCluster = 8;  // blocks; more are not portable

__device__ inline int cluster_blocks() {
  unsigned blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(blocks));
#endif
  return static_cast<int>(blocks);
}

// Every thread arrives, and later waits until all threads of the cluster have: what they sent before can be read then.
__device__ inline void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ inline void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes `x` to where `to`, in this block's shared memory, lies in that of the cluster's block `block`.
__device__ inline void send(float* to, int block, float x) {
#if __CUDA_ARCH__ >= 900
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(block));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
#endif
}
__device__ inline void send(float4* to, int block, float4 x) {
#if __CUDA_ARCH__ >= 900
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(block));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
#endif
}

}  // namespace vesper::cuda
