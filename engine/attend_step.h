// One attention step on given tensors, through the cache and the backend that a decode step would use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "engine/core/exec.h"

namespace vesper {

// One sequence's newest query and all its keys and values, on the host; keys are already rotated. Any floating dtype,
// one for all three.
struct AttendInput {
  std::string source = {};  // where the tensors came from, for messages
  TensorRef q;              // [heads, head_dim]
  TensorRef k;              // [tokens, kv_heads, head_dim]
  TensorRef v;              // [tokens, kv_heads, head_dim]
};

struct AttendOutput {
  std::vector<float> out;                // [heads, head_dim]
  std::vector<float> lse;                // [heads] log of sum w e^s
  std::vector<std::int32_t> count;       // [kv_heads] tokens on the list
  std::vector<std::int32_t> index;       // [kv_heads, largest count] token numbers, padded with -1
  std::vector<std::int32_t> tail_begin;  // [kv_heads] where the random tail begins; count where there is none
  int index_columns = 0;
};

// On the CPU everything runs in f32; on CUDA in the tensors' 16-bit type, f32 being rounded to bf16. Throws input
// errors for shapes that do not go together.
//   attention  FILE or shorthand, applied to the one layer there is;  seed: of random draws (request 0, layer 0, step
//              tokens - 1)
AttendOutput attend_step(const AttendInput& input, const std::string& attention, int page_tokens, std::uint32_t seed,
                         DeviceKind device);

}  // namespace vesper
