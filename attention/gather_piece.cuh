// Pieces of 16 keys gathered from rows anywhere in the cache, moved so that ldmatrix reads them without bank conflicts.
#pragma once

#include "attention/attend_decode.cuh"

namespace vesper::cuda {

// Which 16-byte column of a row in device memory goes to column `to` of shared row `slot_row`, where both follow
// tile_offset's order. `row`: of the cache, counted in rows; tiles begin at multiples of 8.
VESPER_HD constexpr unsigned source_column(unsigned to, unsigned slot_row, unsigned row) {
  return to ^ ((slot_row ^ row) % 8);
}
template <int kHeadDim>
constexpr bool source_column_follows_tile_offset() {
  for (int from = 0; from < 16; ++from) {
    for (int slot_row = 0; slot_row < kPiece; ++slot_row) {
      for (int d = 0; d < kHeadDim; d += kChunkElements) {
        const int column = (tile_offset(slot_row, d, kHeadDim) - slot_row * kHeadDim) / kChunkElements;
        const auto source = static_cast<int>(
            source_column(static_cast<unsigned>(column), static_cast<unsigned>(slot_row), static_cast<unsigned>(from)));
        if (from * kHeadDim + source * kChunkElements != tile_offset(from, d, kHeadDim)) return false;
      }
    }
  }
  return true;
}
static_assert(source_column_follows_tile_offset<64>() && source_column_follows_tile_offset<128>());

// Queues the first `keys` rows of a piece, gathered. Lanes i and i + 16 hold the number of the cache row that becomes
// row i. A row is moved as ldmatrix wants it: the eight rows of an 8x8 matrix in eight different 16-byte columns.
template <typename T, int kHeadDim>
__device__ void gather_piece(unsigned slot, const T* k, const T* v, std::int64_t row, int keys) {
  constexpr unsigned kChunks = kHeadDim / kChunkElements;
#pragma unroll
  for (unsigned i = 0; i < kPiece * kChunks / kWarpThreads; ++i) {
    const unsigned chunk = threadIdx.x % kWarpThreads + i * kWarpThreads;
    const unsigned slot_row = chunk / kChunks;
    const std::int64_t from = __shfl_sync(kAllLanes, row, static_cast<int>(slot_row));
    const unsigned column = source_column(chunk % kChunks, slot_row, static_cast<unsigned>(from));
    const bool valid = static_cast<int>(slot_row) < keys;
    const std::int64_t at = from * kHeadDim + column * kChunkElements;
    copy_chunk_once(slot + chunk * kChunkBytes, k + at, valid);
    copy_chunk_once(slot + kTileBytes<kHeadDim> + chunk * kChunkBytes, v + at, valid);
  }
}

}  // namespace vesper::cuda
