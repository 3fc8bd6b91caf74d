// The device half of products with few rows of x: sums = x W^T for 1 to 8 rows of x, every weight from memory to the
// tensor cores once. How W is stored is a type of its own (StreamedWeight here, models/gemv_int4.cuh); what becomes of
// the sums is the caller's: a plain product (gemv_cuda.cu), or one with the step after it (projections_cuda.cu).
//
//   x [tokens, columns] of a 16-bit type T
//   tile   kBand rows of W and the kBand that lie high_offset below them (TileRows), which need not be neighbours: a
//          gate and its up, a rotary pair. Sixteen rows make one mma.m16n8k16 tall; its 8 columns are the tokens,
//          absent ones being zero
//   block  8 warps; walks the tiles blockIdx.x, blockIdx.x + gridDim.x, ...
//   warp w of a tile takes the chunks of columns w, w + 8, ...; the eight partial sums meet in shared memory
//   lane   (g, q) = (lane / 4, lane % 4) takes of every 32 columns 8q ... 8q + 7 from rows g and g + 8 of a sixteen and
//          from row g of x. A dot product does not mind in which order its terms come, so these eight columns serve as
//          the k indices {2q, 2q + 1, 2q + 8, 2q + 9} of two mma, on both sides alike: no shuffle.
//          Fragments: attention/mma.cuh.
//
// Bytes: W once. A warp keeps `depth` chunks in flight in a ring of its own in shared memory, across the end of a tile
// too; nobody else reads it, so the loop has no barrier. On compute capability 9.0 a chunk is a few bulk copies that
// report to a barrier of the warp's; before that, cp.async by all lanes. In flight on an H100: two blocks of 96 KiB a
// multiprocessor. Latency times bandwidth asks for a quarter of that (3.1 TB/s, 1 us, 132 multiprocessors); the rest is
// what goes on arriving while warps add up a tile or wait for the kernel in front, whose end the first chunks do not
// wait for (engine/core/overlap.cuh).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention/mma.cuh"
#include "engine/core/bulk_copy.cuh"
#include "engine/core/cache_hint.cuh"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"
#include "engine/core/vector.cuh"
#include "models/linear.h"

namespace vesper::cuda {

inline constexpr int kGemvTokens = 8;
inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvThreads = 32 * kGemvWarps;
inline constexpr int kGemvBlocks = 2;  // a multiprocessor
inline constexpr int kGemvMaxDepth = 8;
inline constexpr int kPartials = 2;
static_assert(kGemvTokens == kMaxGemvRows);

// Which rows of W the tiles are.
struct TileRows {
  int tiles = 0;
  int run_tiles = 1;    // tiles whose low rows follow each other
  int run_stride = 0;   // rows from the beginning of one run to the next
  int high_offset = 0;  // from a tile's low rows to its high ones

  template <int kBand>
  __device__ int low(int tile) const {
    return tile / run_tiles * run_stride + tile % run_tiles * kBand;
  }
};

// The tiles of a plain product: rows in their order.
template <int kBand>
TileRows rows_in_order(std::int64_t rows) {
  return {
      .tiles = static_cast<int>((rows + 2 * kBand - 1) / (2 * kBand)), .run_stride = 2 * kBand, .high_offset = kBand};
}

// W [rows, columns] of a 16-bit type T, row-major, rows on 16 bytes. The interface that the stream below asks of a
// weight: kBand; a chunk is kRuns runs of kRunBytes, of which run_bytes(chunk) are inside the matrix; run(tile, r)
// begins at column 0.
template <typename Element>
struct StreamedWeight {
  using T = Element;
  static constexpr int kBand = 8;
  static constexpr int kChunk = 128;  // columns
  static constexpr int kRuns = 2 * kBand;
  static constexpr int kRunBytes = 2 * kChunk;

  const T* data = nullptr;
  int rows = 0;
  int columns = 0;
  TileRows tile_rows = {};

  // Of one tile's sixteen rows and eight tokens, as the fragment D. Two sums: half as long a chain of dependent mma.
  struct Sums {
    float even[4] = {};
    float odd[4] = {};
    __device__ float total(int /*sixteen*/, int i) const { return even[i] + odd[i]; }
  };

  // Rows beyond the last are read as the last.
  __device__ const std::byte* run(int tile, int r) const {
    const int row = tile_rows.low<kBand>(tile) + r % kBand + r / kBand * tile_rows.high_offset;
    return reinterpret_cast<const std::byte*>(data + static_cast<std::int64_t>(min(row, rows - 1)) * columns);
  }
  __device__ int run_bytes(int chunk) const { return 2 * max(0, min(kChunk, columns - chunk * kChunk)); }

  // octets[c]: this lane's of x at columns 32 c ... of the chunk, zero behind the row's end.
  __device__ void multiply(const unsigned char* stage, int chunk, const uint4 (&octets)[kChunk / 32],
                           Sums& sums) const {
    uint4 low[kChunk / 32];
    uint4 high[kChunk / 32];
    load_row(stage, this_lane() / 4, low);
    load_row(stage, this_lane() / 4 + 8, high);
    // A chunk over the end of its row: what lies there is of an older chunk, or nobody's.
    const int inside = columns - chunk * kChunk;
    if (inside < kChunk) {
#pragma unroll
      for (int c = 0; c < kChunk / 32; ++c) {
        if (inside <= 32 * c + this_lane() % 4 * kVectorWidth) low[c] = high[c] = uint4{};
      }
    }
#pragma unroll
    for (int c = 0; c < kChunk / 32; ++c) {
      multiply_add<T>(sums.even, {low[c].x, high[c].x, low[c].y, high[c].y}, octets[c].x, octets[c].y);
      multiply_add<T>(sums.odd, {low[c].z, high[c].z, low[c].w, high[c].w}, octets[c].z, octets[c].w);
    }
  }

 private:
  // This lane's parts of a row of a chunk. Eight lanes read at a time, of two neighbouring rows, which lie on the same
  // banks: odd rows therefore read each pair of parts the other way round.
  static __device__ void load_row(const unsigned char* stage, int line, uint4 (&parts)[kChunk / 32]) {
    const bool odd = line % 2 != 0;
    const auto* row = reinterpret_cast<const uint4*>(stage + line * kRunBytes) + this_lane() % 4;
#pragma unroll
    for (int c = 0; c < kChunk / 32; c += 2) {
      const uint4 first = row[4 * c + (odd ? 4 : 0)];
      const uint4 second = row[4 * c + (odd ? 0 : 4)];
      parts[c] = odd ? second : first;
      parts[c + 1] = odd ? first : second;
    }
  }
};

// From L2 the first time a multiprocessor meets it, and from L1 after that.
template <typename T>
struct StreamedInput {
  const T* x = nullptr;  // [tokens, columns]
  int tokens = 0;
};

template <typename T>
StreamedInput<T> streamed_input(const TensorRef& x) {
  return {static_cast<const T*>(x.data), static_cast<int>(x.shape[0])};
}

// A block's shared memory: this, then the rings of the warps.
template <typename Weight>
struct alignas(128) GemvShared {
  float partial[kPartials][kGemvWarps][kGemvTokens][2 * Weight::kBand];  // of tiles by turns
  std::uint64_t landed[kGemvWarps][kGemvMaxDepth];
  std::uint64_t summed[kPartials];  // all threads have put their part there
  std::uint64_t taken[kPartials];   // the parts have been added up: the place is free
};

template <typename Weight>
inline constexpr int kStageBytes = Weight::kRuns* Weight::kRunBytes;  // of one warp

// The chunks of one warp on their way.
template <typename Weight>
class WeightStream {
 public:
  __device__ WeightStream(const Weight& weight, int depth, GemvShared<Weight>& shared, unsigned char* rings)
      : weight_(weight),
        depth_(depth),
        tile_(static_cast<int>(blockIdx.x)),
        landed_(shared.landed[this_warp()]),
        ring_(rings + this_warp() * depth * kStageBytes<Weight>) {
    static_assert(kStageBytes<Weight> % 16 == 0);
    if constexpr (kBulk) {
      if (this_lane() == 0) {
        for (int i = 0; i < depth_; ++i) make_barrier(shared_address(&landed_[i]), 1);
        publish_barriers();
      }
      __syncwarp();
    }
    begin_tile();
    for (int i = 0; i < depth_; ++i) copy(i);
  }

  // Chunks of a row that a warp takes.
  __device__ int steps() const {
    constexpr int kStride = kGemvWarps * Weight::kChunk;
    return (weight_.columns + kStride - 1) / kStride;
  }

  // The oldest chunk, [kRuns, kRunBytes], once it has landed.
  __device__ const unsigned char* front() {
    if constexpr (kBulk) {
      wait_phase(shared_address(&landed_[slot_]), phase_);
    } else {
      wait_all_but(depth_ - 1);
      __syncwarp();
    }
    return ring_ + slot_ * kStageBytes<Weight>;
  }

  // Gives its place to the next one. All lanes have read what they need.
  __device__ void pop() {
    __syncwarp();
    copy(slot_);
    if (++slot_ == depth_) {
      slot_ = 0;
      phase_ ^= 1U;
    }
  }

 private:
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr bool kBulk = true;
#else
  static constexpr bool kBulk = false;
#endif

  // Beyond the last tile nothing is read, and the next kernel may have the memory.
  __device__ void copy(int slot) {
    unsigned char* stage = ring_ + slot * kStageBytes<Weight>;
    const bool any = tile_ < weight_.tile_rows.tiles;
    const int bytes = any ? weight_.run_bytes(chunk_) : 0;
    if constexpr (kBulk) {
      if (this_lane() == 0)
        arrive_expecting(shared_address(&landed_[slot]), static_cast<unsigned>(Weight::kRuns * bytes));
      __syncwarp();
      if (this_lane() < Weight::kRuns && bytes > 0) {
        copy_bulk(shared_address(stage + this_lane() * Weight::kRunBytes),
                  run_ + std::int64_t{chunk_} * Weight::kRunBytes, static_cast<unsigned>(bytes),
                  shared_address(&landed_[slot]), once_);
      }
    } else {
      constexpr int kPieces = Weight::kRunBytes / kChunkBytes;
      for (int i = this_lane(); i < Weight::kRuns * kPieces; i += static_cast<int>(kWarpThreads)) {
        const int piece = i % kPieces * kChunkBytes;
        const bool inside = piece < bytes;
        const std::byte* from = weight_.run(any ? tile_ : 0, i / kPieces);
        copy_chunk_async(shared_address(stage) + static_cast<unsigned>(i * kChunkBytes),
                         inside ? from + std::int64_t{chunk_} * Weight::kRunBytes + piece : from, inside);
      }
      commit_copies();
    }
    chunk_ += kGemvWarps;
    if (++step_ == steps()) {
      tile_ += static_cast<int>(gridDim.x);
      begin_tile();
    }
  }

  __device__ void begin_tile() {
    step_ = 0;
    chunk_ = this_warp();
    if (tile_ >= weight_.tile_rows.tiles) return let_next_start();
    run_ = weight_.run(tile_, this_lane() % Weight::kRuns);
  }

  static __device__ void wait_all_but(int pending) {
    switch (pending) {
      case 0:
        return wait_copies<0>();
      case 1:
        return wait_copies<1>();
      case 2:
        return wait_copies<2>();
      case 3:
        return wait_copies<3>();
      default:
        return wait_copies<4>();
    }
  }

  const Weight& weight_;
  int depth_;
  int tile_;
  int step_ = 0;
  int chunk_ = 0;
  const std::byte* run_ = nullptr;  // this lane's of the tile
  int slot_ = 0;
  unsigned phase_ = 0;
  std::uint64_t* landed_;
  unsigned char* ring_;
  std::uint64_t once_ = evict_first();
};

// Runs a block of kGemvThreads threads over its tiles.
//   kAligned: rows of x are on 16 bytes
//   output(token, row, low, high): sums of rows `row` and `row` + high_offset; rows may lie behind the last
template <bool kAligned, typename Weight, typename Output>
__device__ void stream_products(const Weight& weight, const StreamedInput<typename Weight::T>& input, int depth,
                                unsigned char* memory, const Output& output) {
  auto& shared = *reinterpret_cast<GemvShared<Weight>*>(memory);
  const int group = this_lane() / 4;
  const int quad = this_lane() % 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPartials; ++i) {
      make_barrier(shared_address(&shared.summed[i]), kGemvThreads);
      make_barrier(shared_address(&shared.taken[i]), kWarpThreads);
    }
  }
  WeightStream<Weight> stream(weight, depth, shared, memory + sizeof(GemvShared<Weight>));
  __syncthreads();

  wait_for_previous();
  const int tokens = input.tokens;
  // Absent tokens take a row that is there: nobody reads their sums.
  const auto* x = input.x + static_cast<std::int64_t>(min(group, tokens - 1)) * weight.columns + quad * kVectorWidth;
  int turn = 0;  // tiles of this block so far
  for (int tile = static_cast<int>(blockIdx.x); tile < weight.tile_rows.tiles;
       tile += static_cast<int>(gridDim.x), ++turn) {
    typename Weight::Sums sums;
    for (int step = 0; step < stream.steps(); ++step) {
      const int chunk = this_warp() + step * kGemvWarps;
      const int column = chunk * Weight::kChunk;
      uint4 octets[Weight::kChunk / 32];
      if (kAligned && column + Weight::kChunk <= weight.columns) {
#pragma unroll
        for (int c = 0; c < Weight::kChunk / 32; ++c) octets[c] = *reinterpret_cast<const uint4*>(x + column + 32 * c);
      } else {
#pragma unroll
        for (int c = 0; c < Weight::kChunk / 32; ++c) {
          const int inside = weight.columns - column - quad * kVectorWidth - 32 * c;
          octets[c] = load_eight<kAligned>(x + column + 32 * c, inside);
        }
      }
      weight.multiply(stream.front(), chunk, octets, sums);
      stream.pop();
    }
    // Warps do not wait for each other here but for one of them, each time another, that adds up.
    const int place = turn % kPartials;
    const unsigned parity = static_cast<unsigned>(turn / kPartials) % 2U;
    auto& partial = shared.partial[place];
    wait_phase(shared_address(&shared.taken[place]), parity ^ 1U);
#pragma unroll
    for (int sixteen = 0; sixteen < Weight::kBand / 8; ++sixteen) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = 2 * quad + i % 2;
        if (t < tokens) partial[this_warp()][t][16 * sixteen + i / 2 * 8 + group] = sums.total(sixteen, i);
      }
    }
    arrive(shared_address(&shared.summed[place]));
    if (turn % kGemvWarps != this_warp()) continue;
    wait_phase(shared_address(&shared.summed[place]), parity);
    for (int i = this_lane(); i < Weight::kBand * tokens; i += static_cast<int>(kWarpThreads)) {
      const int t = i / Weight::kBand;
      const int row = i % Weight::kBand;
      float low = 0.0F;
      float high = 0.0F;
#pragma unroll
      for (int w = 0; w < kGemvWarps; ++w) {
        low += partial[w][t][row];
        high += partial[w][t][row + Weight::kBand];
      }
      output(t, weight.tile_rows.template low<Weight::kBand>(tile) + row, low, high);
    }
    arrive(shared_address(&shared.taken[place]));
  }
}

// How a product is laid over the device.
struct GemvLayout {
  int depth = 0;
  Dims dims;
};

template <typename Weight>
GemvLayout gemv_layout(const Weight& weight, int multiprocessors) {
  const int bytes = static_cast<int>(multiprocessor_shared_bytes());
  constexpr int kReserved = 1024;  // by the driver, a block
  constexpr int kFixed = static_cast<int>(sizeof(GemvShared<Weight>));
  constexpr int kStepBytes = kGemvWarps * kStageBytes<Weight>;
  const int depth = std::clamp((bytes / kGemvBlocks - kReserved - kFixed) / kStepBytes, 1, kGemvMaxDepth);
  // As many tiles for each block, or one less for some: rather fewer blocks than some with twice the work of others.
  const int tiles = weight.tile_rows.tiles;
  const int resident = kGemvBlocks * multiprocessors;
  const int rounds = std::max(1, (tiles + resident - 1) / resident);
  return {.depth = depth,
          .dims = {.grid = dim3(static_cast<unsigned>((tiles + rounds - 1) / rounds)),
                   .block = dim3(kGemvThreads),
                   .shared_bytes = static_cast<std::size_t>(kFixed + depth * kStepBytes),
                   .overlap = true}};
}

}  // namespace vesper::cuda
