// Causal attention of a tile of query tokens, as two small matrix products a block of 64 keys: scores = Q K^T and
// out += weights V, with a running maximum and sum a row (Milakov, Gimelshein, "Online normalizer calculation for
// softmax", arXiv 1805.02867). Compiled twice; see engine/core/lanes.h.
//
// A row is one head of one query token. Keys are transposed and values unswizzled into panels once a block, so both
// products are the same inner loop: a register tile of kTileRows rows x 16 columns that runs down the common dimension,
// one channel or one key after the other. That order, and the blocks of keys counted from key 0, fix the result of a
// row whatever tile it lies in; a key that a row may not see adds an exact zero.
#include "attention/attend_lanes.h"
#include "attention/key_rows.h"
#include "engine/core/lanes.h"

namespace vesper::cpu::VESPER_LANES {
namespace {

constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b * b;
}

// Registers: 16. AVX2: 6 x 2 sums, 2 columns, 1 row, 1 product; the baseline's are half as wide.
#ifdef __AVX2__
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif

// The tile's working memory, cut from its scratch; rows are padded, and `width` is head_dim rounded up to 16.
struct Panels {
  std::int64_t rows = 0;
  std::int64_t width = 0;
  float* q = nullptr;        // [rows, width], scaled
  float* out = nullptr;      // [rows, width], not yet normalised
  float* scores = nullptr;   // [rows, kBlockKeys], then weights
  float* k = nullptr;        // [width, kBlockKeys]
  float* v = nullptr;        // [kBlockKeys, width]
  float* largest = nullptr;  // [rows] running maximum
  float* sum = nullptr;      // [rows] running sum of weights
  float* rescale = nullptr;  // [rows] what a new maximum multiplies the row by

  Panels(float* scratch, int queries, int group, int head_dim)
      : rows(round_up(std::int64_t{queries} * group, kTileRows)), width(round_up(head_dim, 16)) {
    const auto take = [&scratch](std::int64_t count) {
      float* taken = scratch;
      scratch += round_up(count, 8);
      return taken;
    };
    q = take(rows * width);
    out = take(rows * width);
    scores = take(rows * kBlockKeys);
    k = take(width * kBlockKeys);
    v = take(kBlockKeys * width);
    largest = take(rows);
    sum = take(rows);
    rescale = take(rows);
  }
};

void start(const PrefillTile& tile, const Panels& panels) {
  const int head_dim = tile.kv.head_dim;
  for (std::int64_t i = 0; i < panels.rows * panels.width; ++i) panels.q[i] = 0.0F;
  for (std::int64_t i = 0; i < panels.rows * panels.width; ++i) panels.out[i] = 0.0F;
  for (std::int64_t row = 0; row < panels.rows; ++row) panels.largest[row] = -__builtin_inff();
  for (std::int64_t row = 0; row < panels.rows; ++row) panels.sum[row] = 0.0F;
  for (std::int64_t row = 0; row < std::int64_t{tile.queries} * tile.group; ++row) {
    const float* from = tile.q + row / tile.group * tile.row_stride + row % tile.group * head_dim;
    for (int d = 0; d < head_dim; ++d) panels.q[row * panels.width + d] = from[d] * tile.scale;
  }
}

// Four rows of four become four columns of four.
VESPER_INLINE void transpose(f32x4 (&x)[4]) {
  const f32x4 low01 = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
  const f32x4 high01 = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const f32x4 low23 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const f32x4 high23 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  x[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  x[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// The panels of a block of keys: zero where there is no key.
void load_panels(const KvTiles& kv, const KeyRows& rows, const Panels& panels) {
  const f32x8 zero = {};
  for (int c = 0; c < kv.chunks; ++c) {
    const int width = chunk_width(kv, c);
    const std::int64_t first_channel = std::int64_t{8} * c;
    for (int t = 0; t < kBlockKeys; t += 4) {
      f32x4 lower[4];
      f32x4 upper[4];
      for (int i = 0; i < 4; ++i) {
        const bool there = t + i < rows.count;
        const f32x8 key = there ? load_chunk(rows.k[t + i], rows.chunk[t + i], c, width) : zero;
        lower[i] = low(key);
        upper[i] = high(key);
        store(panels.v + (t + i) * panels.width + first_channel,
              there ? load_chunk(rows.v[t + i], rows.chunk[t + i], c, width) : zero);
      }
      transpose(lower);
      transpose(upper);
      for (int d = 0; d < width; ++d) {
        store(panels.k + (first_channel + d) * kBlockKeys + t, d < 4 ? lower[d] : upper[d - 4]);
      }
    }
  }
}

// sum[i][j] += rows[i, n] * columns[n, 8j ...] for n < depth, one n after the other.
VESPER_INLINE void multiply_tile(const float* rows, std::int64_t row_stride, const float* columns,
                                 std::int64_t column_stride, int depth, f32x8 (&sum)[kTileRows][2]) {
  for (int n = 0; n < depth; ++n) {
    const f32x8 left = load(columns + n * column_stride);
    const f32x8 right = load(columns + n * column_stride + 8);
    for (int i = 0; i < kTileRows; ++i) {
      const f32x8 row = splat(rows[i * row_stride + n]);
      sum[i][0] += row * left;
      sum[i][1] += row * right;
    }
  }
}

void multiply_keys(const Panels& panels, int head_dim) {
  for (std::int64_t row = 0; row < panels.rows; row += kTileRows) {
    for (int t = 0; t < kBlockKeys; t += 16) {
      f32x8 sum[kTileRows][2] = {};
      multiply_tile(panels.q + row * panels.width, panels.width, panels.k + t, kBlockKeys, head_dim, sum);
      for (int i = 0; i < kTileRows; ++i) {
        store(panels.scores + (row + i) * kBlockKeys + t, sum[i][0]);
        store(panels.scores + (row + i) * kBlockKeys + t + 8, sum[i][1]);
      }
    }
  }
}

void multiply_values(const Panels& panels, int keys) {
  for (std::int64_t row = 0; row < panels.rows; row += kTileRows) {
    for (std::int64_t d = 0; d < panels.width; d += 16) {
      f32x8 sum[kTileRows][2];
      for (int i = 0; i < kTileRows; ++i) {
        const float* out = panels.out + (row + i) * panels.width + d;
        const f32x8 rescale = splat(panels.rescale[row + i]);
        sum[i][0] = load(out) * rescale;
        sum[i][1] = load(out + 8) * rescale;
      }
      multiply_tile(panels.scores + row * kBlockKeys, kBlockKeys, panels.v + d, panels.width, keys, sum);
      for (int i = 0; i < kTileRows; ++i) {
        store(panels.out + (row + i) * panels.width + d, sum[i][0]);
        store(panels.out + (row + i) * panels.width + d + 8, sum[i][1]);
      }
    }
  }
}

// One row's scores become weights; its first `visible` keys count.
VESPER_INLINE void weigh_row(float* scores, int visible, float& largest, float& sum, float& rescale) {
  const f32x8 lane = both(f32x4{0, 1, 2, 3}, f32x4{4, 5, 6, 7});
  const f32x8 hidden = splat(-__builtin_inff());
  f32x8 score[kBlockKeys / 8];
  f32x8 most = splat(largest);
  for (int i = 0; i < kBlockKeys / 8; ++i) {
    score[i] = load(scores + std::int64_t{8} * i);
    if (visible < kBlockKeys)
      score[i] = choose_greater(splat(static_cast<float>(visible - 8 * i)), lane, score[i], hidden);
    most = larger(score[i], most);
  }
  const float next = largest_lane(most);
  rescale = exponential(splat(largest - next))[0];
  f32x8 weights = {};
  for (int i = 0; i < kBlockKeys / 8; ++i) {
    const f32x8 weight = exponential(score[i] - next);
    store(scores + std::int64_t{8} * i, weight);
    weights += weight;
  }
  largest = next;
  sum = sum * rescale + join(weights);
}

}  // namespace

std::int64_t prefill_scratch(int queries, int group, int head_dim) {
  const std::int64_t rows = round_up(std::int64_t{queries} * group, kTileRows);
  const std::int64_t width = round_up(head_dim, 16);
  return rows * (2 * width + kBlockKeys) + 2 * width * kBlockKeys + 3 * round_up(rows, 8);  // as Panels takes it
}

void attend(const PrefillTile& tile) {
  const Panels panels(tile.scratch, tile.queries, tile.group, tile.kv.head_dim);
  start(tile, panels);
  const int keys = tile.first_position + tile.queries;
  for (int first = 0; first < keys; first += kBlockKeys) {
    KeyRows block;
    find_rows(tile.kv, first, keys, block);
    load_panels(tile.kv, block, panels);
    multiply_keys(panels, tile.kv.head_dim);
    for (std::int64_t row = 0; row < panels.rows; ++row) {
      const auto query = static_cast<int>(row / tile.group);
      const int position = tile.first_position + (query < tile.queries ? query : tile.queries - 1);
      weigh_row(panels.scores + row * kBlockKeys, position + 1 - first, panels.largest[row], panels.sum[row],
                panels.rescale[row]);
    }
    multiply_values(panels, block.count);
  }
  for (std::int64_t row = 0; row < std::int64_t{tile.queries} * tile.group; ++row) {
    float* out = tile.out + row / tile.group * tile.row_stride + row % tile.group * tile.kv.head_dim;
    for (int d = 0; d < tile.kv.head_dim; ++d) out[d] = panels.out[row * panels.width + d] / panels.sum[row];
  }
}

}  // namespace vesper::cpu::VESPER_LANES
