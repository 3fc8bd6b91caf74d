// The inner loops of CPU attention, in one build for each instruction set; attend_prefill_cpu.cpp and
// attend_decode_cpu.cpp cut the work and choose.
#pragma once

#include <cstdint>

namespace vesper::cpu {

// Keys that share one maximum: scores of a block are made, exponentiated and summed before the next. A constant of the
// method, not of the machine: it is part of the order of summation.
inline constexpr int kBlockKeys = 64;

// The keys and values of one sequence and KV head, where they lie. Channels 8c ... 8c + 7 of line t of a page are
// contiguous at chunk[t * chunks + c] of its tile; the last chunk holds what is left of head_dim.
struct KvTiles {
  const float* const* k = nullptr;  // tile of the sequence's p-th page
  const float* const* v = nullptr;
  const std::int32_t* chunk = nullptr;  // [page_tokens, chunks]
  int page_tokens = 0;
  int head_dim = 0;
  int chunks = 0;  // head_dim / 8, rounded up
};

// Consecutive query tokens of one sequence, with the heads of one group: causal attention from key 0 on.
struct PrefillTile {
  KvTiles kv;
  const float* q = nullptr;     // first token, first head of the group; the group's heads follow each other
  float* out = nullptr;         // likewise
  std::int64_t row_stride = 0;  // elements between tokens, of q and of out
  int queries = 0;
  int group = 0;
  int first_position = 0;
  float scale = 0.0F;
  float* scratch = nullptr;  // prefill_scratch(queries, group, head_dim) elements
};

// Keys of a list, in its order: where each one's tiles and its line's chunks lie.
struct KeyList {
  const float* const* k = nullptr;
  const float* const* v = nullptr;
  const std::int32_t* const* chunk = nullptr;
};

// One query token, with the heads of one group, over keys [key_begin, key_end), at least one.
struct DecodeSplit {
  KvTiles kv;                // where `list` is set, only for its sizes
  KeyList list = {};         // where its pointers are not null, keys are those of the list
  const float* q = nullptr;  // [group, head_dim]
  int group = 0;
  int key_begin = 0;
  int key_end = 0;
  int tail_begin = INT32_MAX;    // keys from here on have tail_log_weight added to their scores
  float tail_log_weight = 0.0F;  // read where there are such keys
  float scale = 0.0F;
  float* out = nullptr;  // [head_dim] a head, `out_stride` apart, normalised
  std::int64_t out_stride = 0;
  float* lse = nullptr;  // one a head, `lse_stride` apart
  std::int64_t lse_stride = 0;
  float* scratch = nullptr;  // decode_scratch(group, head_dim) elements
};

namespace baseline {
std::int64_t prefill_scratch(int queries, int group, int head_dim);
std::int64_t decode_scratch(int group, int head_dim);
void attend(const PrefillTile& tile);
void attend(const DecodeSplit& split);
}  // namespace baseline
namespace avx2 {
std::int64_t prefill_scratch(int queries, int group, int head_dim);
std::int64_t decode_scratch(int group, int head_dim);
void attend(const PrefillTile& tile);
void attend(const DecodeSplit& split);
}  // namespace avx2

}  // namespace vesper::cpu
