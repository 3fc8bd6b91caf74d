// One step of the engine as the device sees it: a ragged batch of query tokens over paged sequences.
#pragma once

#include <cstdint>
#include <span>

#include "engine/core/tensor.h"

namespace vesper {

// Prefill: any number of query tokens a sequence, causal, always dense. Decode: exactly one query token a sequence, the
// newest; here a layer's own attention backend runs.
enum class Phase : std::uint8_t { kPrefill, kDecode };

// Views of arrays that the engine owns; they live on the device of the step, at the same addresses in every step. Rows
// of a sequence's query tokens are consecutive and in order.
struct Batch {
  Phase phase = Phase::kDecode;
  int seqs = 0;
  int tokens = 0;                                  // query tokens of all sequences
  int max_query_tokens = 0;                        // largest number of one sequence
  int max_kv_len = 0;                              // bound of kv_len: grids and lists are sized by it
  TensorView<const std::int32_t, 1> ids;           // [tokens]
  TensorView<const std::int32_t, 1> positions;     // [tokens] position of a query token in its sequence, from 0
  TensorView<const std::int32_t, 1> seq_of_token;  // [tokens]
  TensorView<const std::int32_t, 1> query_start;   // [seqs + 1] first query row of a sequence
  TensorView<const std::int32_t, 1> kv_len;        // [seqs] tokens in the cache, this step's included
  TensorView<const std::int32_t, 2> page_table;    // [seqs, capacity] physical page of a sequence's p-th page
  TensorView<const std::int32_t, 1> request;       // [seqs] number of a sequence's request: part of a draw's key
  std::span<const std::int32_t> host_kv_len;       // [seqs] the same lengths, for planning on the host
};

}  // namespace vesper
