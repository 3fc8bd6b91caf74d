// The two rulers of this machine: how fast it reads memory, and how fast it multiplies matrices.
#pragma once

#include <cstdint>

#include "engine/core/cost.h"
#include "engine/core/exec.h"

namespace vesper {

struct Roof {
  double read_bytes_per_s = 0.0;    // engine/core/read_probe.h
  double matrix_flops_per_s = 0.0;  // a product of large square matrices through models/linear.h
};

// Measures both and gives the memory back: some 4 GiB on CUDA, 256 MiB on the CPU, less where less is free. The
// matrices are 8192 x 8192 in bf16 on CUDA, where cuBLASLt multiplies them, and 512 x 512 in f32 on the CPU. Waits.
Roof probe_roof(DeviceKind device);

// Of two measurements of one machine the higher rates: what it could do.
Roof higher(const Roof& a, const Roof& b);

// The least time that the rulers leave: bytes at the read rate or flops at the matrix rate, whichever takes longer.
double bound_seconds(const Cost& cost, const Roof& roof);

// Bytes of the last cache before memory: data that fits it says nothing about memory.
std::int64_t last_cache_bytes(DeviceKind device);

}  // namespace vesper
