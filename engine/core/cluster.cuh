// Thread-block clusters: neighbouring blocks (Dims::cluster of them) that run at the same time and reach each other's
// shared memory. Compute capability 9.0 and up; before that every block is a cluster of its own. Source: PTX ISA,
// "barrier.cluster" and "mapa"; CUDA programming guide, "Distributed shared memory".
#pragma once

#include "engine/core/launch.cuh"

namespace vesper::cuda {

__device__ inline int cluster_blocks() {
  unsigned blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return static_cast<int>(blocks);
}

// Says that this thread has come here. The barrier's first use also says that the block has begun: another block's
// shared memory may not be touched before.
__device__ inline void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// Waits until all threads of the cluster have; their writes before can be seen. In a cluster of one as __syncthreads().
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The two together: a barrier of the cluster's threads.
__device__ inline void meet_cluster() {
  arrive_in_cluster();
  wait_for_cluster();
}

// `here`, of this block's shared memory, in that of block `rank` of the cluster.
template <typename T>
__device__ T* in_block(T* here, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
  return there;
#else
  return here;
#endif
}

// The same for shared addresses.
__device__ inline unsigned in_block(unsigned here, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
#else
  return here;
#endif
}

// Sends a value to shared memory of a block of the cluster, and tells a barrier there (engine/core/bulk_copy.cuh) that
// its bytes have come: who waits for the barrier sees them. Both addresses are those of in_block. A quarter of the time
// of a barrier of the cluster, which orders everything else too. Source: PTX ISA, "st.async".
__device__ inline void send([[maybe_unused]] unsigned to, [[maybe_unused]] unsigned value,
                            [[maybe_unused]] unsigned barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(value),
               "r"(barrier)
               : "memory");
#endif
}
__device__ inline void send([[maybe_unused]] unsigned to, [[maybe_unused]] uint2 value,
                            [[maybe_unused]] unsigned barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "r"(value.x), "r"(value.y), "r"(barrier)
               : "memory");
#endif
}
__device__ inline void send([[maybe_unused]] unsigned to, [[maybe_unused]] uint4 value,
                            [[maybe_unused]] unsigned barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
               : "memory");
#endif
}

// As wait_phase, and formally what messages of other blocks ask for (PTX ISA, "Memory consistency model"). It empties
// the multiprocessor's first-level cache, which shared memory is not in, so that wait_phase sees the same messages:
// where page tables and the like are read behind it, that is what is used, as vendors' libraries do.
__device__ inline void wait_phase_of_cluster([[maybe_unused]] unsigned barrier, [[maybe_unused]] unsigned parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@done bra OUT;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\nOUT:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace vesper::cuda
