// Barriers in shared memory that warps arrive at without waiting, and bulk copies from device to shared memory by the
// copy engine of compute capability 9.0 (TMA without a tensor map), whose bytes such a barrier counts. Before 9.0 there
// is no copy engine: callers choose by __CUDA_ARCH__. Barriers, and where copies go, are shared addresses.
// Source: PTX ISA, "cp.async.bulk", "mbarrier", "Asynchronous proxies".
#pragma once

#include <cstdint>

namespace vesper::cuda {

// A phase of the barrier ends when `arrivals` have arrived and all bytes that were announced have landed. A thread
// waits for phases in turn, whose parities are 0, 1, 0, ...
__device__ inline void make_barrier(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the barriers of this thread visible to the copy engine; other threads need a barrier of their own.
__device__ inline void publish_barriers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void arrive(unsigned barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for `bytes` more.
__device__ inline void arrive_expecting([[maybe_unused]] unsigned barrier, [[maybe_unused]] unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

// Returns when the phase of this parity has ended; what was written before it ended can be read. Of a barrier that is
// new, the phase of parity 1 counts as ended.
// Asked twice a round: a loop of one question would be moved behind the kernel's end, where each wait fetches code that
// a step has pushed out of the caches (docs/kernels.md, "Code").
__device__ inline void wait_phase(unsigned barrier, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra OUT;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\nOUT:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#endif
}

// Begins a copy; both addresses and `bytes` (over 0) are multiples of 16. The bytes count towards the barrier's phase.
// `hint`: engine/core/cache_hint.cuh.
__device__ inline void copy_bulk([[maybe_unused]] unsigned to, [[maybe_unused]] const void* from,
                                 [[maybe_unused]] unsigned bytes, [[maybe_unused]] unsigned barrier,
                                 [[maybe_unused]] std::uint64_t hint) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(hint)
      : "memory");
#endif
}

// Asks for bytes to be brought into the second-level cache; alignment as above.
__device__ inline void prefetch_bulk([[maybe_unused]] const void* from, [[maybe_unused]] unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

}  // namespace vesper::cuda
