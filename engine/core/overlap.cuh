// Programmatic dependent launch: a kernel launched with Dims::overlap may begin while the kernel before it in its
// stream still runs, and must call wait_for_previous before it touches anything that a kernel of the step writes. Until
// then it reads what no kernel writes: weights, and what the host sent before the step. No kernel may return without
// having waited, since the one after it relies on it for all that came before. Compute capability 9.0 and up; before
// that kernels begin in turn and both calls are nothing. Source: CUDA programming guide, "Programmatic dependent
// launch"; PTX ISA, "griddepcontrol".
#pragma once

namespace vesper::cuda {

// Returns when the kernel before this one is done and its writes can be seen.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks begin once all blocks of this kernel have said so or returned. Best said when the
// memory pipe is about to fall idle: what the next kernel fetches sooner only competes with this one.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace vesper::cuda
