// Facts about stored keys that live beside the pages and move with them. They are rebuilt, for every page that a step
// writes to, from the page's stored keys: so they are right after page reuse, at a chunk border in mid-page and after a
// truncation, without any state of their own.
#pragma once

#include <cstdint>
#include <span>

#include "engine/core/cost.h"
#include "engine/core/exec.h"
#include "engine/core/tensor.h"
#include "kvcache/batch.h"
#include "kvcache/layout.h"

namespace vesper {

// Rebuilds the side tables that `kv` has (those whose data is not null) for the pages that hold the step's tokens.
//   bounds   [pages, kv_heads, 2, head_dim], dtype of the cache: per channel the least, then the largest stored key
//   int8_bounds [pages, kv_heads, 2, head_dim] u8, int8_scales [pages, kv_heads, 2, bound_spans] bf16: the bounds in 8
//            bits, code + 128 with a code of -127 ... 127; bound ~ code * scale of the channel's span and side
//   moments  [pages, kv_heads, 2, head_dim] f32: per channel the sum of the keys, then the sum of their squares
//   int4     [pages, kv_heads, page_tokens, head_dim / 2] u8: channel 2 c in the low four bits of byte c, 2 c + 1 in
//            the high ones; rows in plain order
//   int4_params [pages, kv_heads, page_tokens, 2] f16: scale, zero; key ~ code * scale + zero
// Quantisation of a row: zero = f16(min), scale = f16 of (max - zero) / 15, code = round half to even of
// (key - zero) / scale in fp32, clamped to 0 ... 15; a scale of 0 gives codes of 0. Lines that hold no token are not
// written.
// Bounds in 8 bits round outward: scale = the least bf16 with 127 scale >= |x| for all bounds x of the span and side;
// code = the greatest with code * scale <= x for the least keys, the least with code * scale >= x for the largest ones.
// A product of 7 bits by 8 is exact in fp32, so no score made of them is below that of the bounds themselves. Keys
// after rotation have a few channels far larger than the rest (Liu et al., "KIVI", arXiv 2402.02750, section 3): one
// scale for all would coarsen the others, hence spans, of 32 as in the OCP's microscaling formats.
void update_side_tables(const Exec& exec, const Batch& batch, const LayerKv& kv);
// The same of several layers at once: on CUDA one launch for up to 64 of them.
void update_side_tables(const Exec& exec, const Batch& batch, std::span<const LayerKv> layers);

// Of a decode step: the keys of each sequence's newest page read, its tables written.
Cost side_tables_cost(const KvShape& shape, const SideTables& tables, std::int64_t seqs);

namespace cpu {
void update_side_tables(const Batch& batch, const LayerKv& kv);
}  // namespace cpu
namespace cuda {
void update_side_tables(const Exec& exec, const Batch& batch, std::span<const LayerKv> layers);
}  // namespace cuda

}  // namespace vesper
