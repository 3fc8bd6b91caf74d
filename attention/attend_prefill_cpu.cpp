// Causal prefill attention on the CPU; see attention/attend.h. Cuts the query tokens into tiles, a piece of work being
// one tile and one KV head; the inner loops are in attend_prefill_lanes.cpp.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/attend.h"
#include "attention/attend_lanes.h"
#include "attention/kv_tiles.h"
#include "engine/core/lanes.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {
namespace {

// Rows (query tokens x heads of a group) that share one pass over the keys: enough that fetching and transposing keys
// is a small part of the work, few enough that scores and outputs stay in the second-level cache.
constexpr int kTileRows = 96;

struct QueryTile {
  int s = 0;
  std::int64_t first_token = 0;  // row of q
  int queries = 0;
  int first_position = 0;
};

// The heaviest tiles first: those with the most keys before them, so that what is left at the end is light.
std::vector<QueryTile> cut_queries(const Batch& batch, int tile_queries) {
  std::vector<QueryTile> tiles;
  for (int s = 0; s < batch.seqs; ++s) {
    const std::int32_t end = batch.query_start(s + 1);
    for (std::int32_t t = batch.query_start(s); t < end; t += tile_queries) {
      tiles.push_back(
          {.s = s, .first_token = t, .queries = std::min(tile_queries, end - t), .first_position = batch.positions(t)});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const QueryTile& a, const QueryTile& b) {
    return a.first_position + a.queries > b.first_position + b.queries;
  });
  return tiles;
}

}  // namespace

void attend_prefill(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                    TensorView<float, 2> out) {
  const int group = shape.group();
  const int tile_queries = std::max(1, kTileRows / group);
  const std::vector<QueryTile> tiles = cut_queries(batch, tile_queries);
  const std::vector<std::int32_t> offsets = chunk_offsets(shape);
  const auto work = static_cast<std::int64_t>(tiles.size()) * shape.kv_heads;

  parallel_for(work, 1, [&](std::int64_t begin, std::int64_t end) {
    const bool wide = has_avx2();
    TileList pages;
    LaneScratch scratch(
        (wide ? avx2::prefill_scratch : baseline::prefill_scratch)(tile_queries, group, shape.head_dim));
    for (std::int64_t i = begin; i < end; ++i) {
      const QueryTile& tile = tiles[static_cast<std::size_t>(i / shape.kv_heads)];
      const auto g = static_cast<int>(i % shape.kv_heads);
      const std::int64_t first_channel = std::int64_t{g} * group * shape.head_dim;
      const PrefillTile piece{
          .kv = pages.list(shape, kv, batch, tile.s, g, tile.first_position + tile.queries, offsets),
          .q = &q(tile.first_token, first_channel),
          .out = &out(tile.first_token, first_channel),
          .row_stride = q.shape(1),
          .queries = tile.queries,
          .group = group,
          .first_position = tile.first_position,
          .scale = shape.scale,
          .scratch = scratch.data()};
      wide ? avx2::attend(piece) : baseline::attend(piece);
    }
  });
}

}  // namespace vesper::cpu
