// Barriers in shared memory that warps arrive at without waiting, and bulk copies from device to shared memory by the
// copy engine of compute capability 9.0 (TMA without a tensor map), whose bytes such a barrier counts. Before 9.0 there
// is no copy engine: callers choose by __CUDA_ARCH__.
// Source: PTX ISA, "cp.async.bulk", "mbarrier", "Asynchronous proxies".
#pragma once

#include <cstdint>

namespace vesper::cuda {

// One thread's, before publish_barriers: the barrier's phase ends when `arrivals` have arrived and all bytes expected
// so far have landed.
__device__ inline void init_barrier(std::uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))),
               "r"(arrivals)
               : "memory");
}

__device__ inline void arrive(std::uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(barrier)))
               : "memory");
}

// The same thread's, after it: the copy engine sees the barriers. Other threads need a barrier of their own.
__device__ inline void publish_barriers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Arrives, and adds to what the phase waits for.
__device__ inline void expect_bytes([[maybe_unused]] std::uint64_t* barrier, [[maybe_unused]] unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(barrier))),
               "r"(bytes)
               : "memory");
#endif
}

// Returns when the phase of this parity (0 for the first, then 1, 0, ...) has ended; what was written before it ended
// can be read. Of a barrier that is new, the phase of parity 1 counts as ended.
__device__ inline void wait_barrier(std::uint64_t* barrier, unsigned parity) {
  unsigned done = 0;
  while (done == 0) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))), "r"(parity)
                 : "memory");
#else
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier))), "r"(parity)
                 : "memory");
#endif
  }
}

// Begins a copy; both addresses and `bytes` (over 0) are multiples of 16. The bytes count towards the barrier's phase.
__device__ inline void copy_bulk([[maybe_unused]] void* to, [[maybe_unused]] const void* from,
                                 [[maybe_unused]] unsigned bytes, [[maybe_unused]] std::uint64_t* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes), "r"(static_cast<unsigned>(__cvta_generic_to_shared(barrier)))
               : "memory");
#endif
}

}  // namespace vesper::cuda
