#include "kvcache/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr KvShape kShape{.layers = 2, .kv_heads = 3, .head_dim = 64, .page_tokens = 16, .dtype = DType::kF32};

TEST(TileOffset, IsAPermutationOfTheTile) {
  for (const int head_dim : {20, 64, 128, 192}) {
    std::set<int> seen;
    for (int t = 0; t < 64; ++t) {
      for (int d = 0; d < head_dim; ++d) seen.insert(tile_offset(t, d, head_dim));
    }
    EXPECT_EQ(static_cast<int>(seen.size()), 64 * head_dim);
    EXPECT_EQ(*seen.rbegin(), 64 * head_dim - 1);
  }
}

// Eight rows of one 16-byte column lie in eight different columns, so that ldmatrix meets no bank twice.
TEST(TileOffset, SpreadsAColumnOverTheBanks) {
  for (const int head_dim : {64, 128}) {
    for (int chunk = 0; chunk < head_dim / 8; ++chunk) {
      std::set<int> columns;
      for (int t = 0; t < 8; ++t) columns.insert(tile_offset(t, 8 * chunk, head_dim) % 64 / 8);
      EXPECT_EQ(columns.size(), 8U);
    }
  }
}

TEST(KvCache, GivesPagesAndTakesThemBack) {
  KvCache cache(kShape, 10, DeviceKind::kCpu);
  CachedSequence a;
  CachedSequence b;
  ASSERT_TRUE(cache.reserve(a, 33));
  EXPECT_EQ(a.pages.size(), 3U);
  ASSERT_TRUE(cache.reserve(b, 7 * 16));
  EXPECT_EQ(cache.free_pages(), 0);
  std::set<std::int32_t> all(a.pages.begin(), a.pages.end());
  all.insert(b.pages.begin(), b.pages.end());
  EXPECT_EQ(all.size(), 10U);
  EXPECT_GE(*all.begin(), 0);
  EXPECT_LT(*all.rbegin(), 10);

  EXPECT_FALSE(cache.reserve(a, 49));  // one page too many: nothing is taken
  EXPECT_EQ(a.pages.size(), 3U);
  EXPECT_TRUE(cache.reserve(a, 48));

  a.length = 40;
  const std::vector<std::int32_t> before = a.pages;
  cache.truncate(a, 17);
  EXPECT_EQ(a.length, 17);
  EXPECT_EQ(a.pages, std::vector<std::int32_t>(before.begin(), before.begin() + 2));
  EXPECT_EQ(cache.free_pages(), 1);
  cache.truncate(a, 0);
  b.length = 100;
  cache.truncate(b, 0);
  EXPECT_EQ(cache.free_pages(), 10);
}

TEST(KvCache, LayersDoNotOverlap) {
  const KvCache cache(kShape, 4, DeviceKind::kCpu);
  EXPECT_EQ(KvCache::bytes(kShape, 4), 4 * kShape.page_bytes());
  std::vector<std::pair<std::byte*, std::byte*>> ranges;
  for (int l = 0; l < kShape.layers; ++l) {
    for (const TensorRef& tensor : {cache.layer(l).k, cache.layer(l).v}) {
      auto* begin = static_cast<std::byte*>(tensor.data);
      ranges.emplace_back(begin, begin + tensor.bytes());
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) EXPECT_EQ(ranges[i - 1].second, ranges[i].first);
}

// Each layer has the tables that it asked for, in room of its own, aligned for 16-byte accesses; they are counted.
TEST(KvCache, HoldsTheSideTablesOfEachLayer) {
  for (const DType dtype : {DType::kF32, DType::kBf16}) {
    const KvShape shape{.layers = 5, .kv_heads = 3, .head_dim = 20, .page_tokens = 16, .dtype = dtype};
    const std::vector<SideTables> wanted = {
        {},
        {.page_bounds = true},
        {.page_bounds = true, .int4_keys = true},
        {.page_bounds = true, .page_moments = true, .int4_keys = true},
        {.int8_bounds = true},
    };
    const int pages = 7;
    const KvCache cache(shape, pages, DeviceKind::kCpu, wanted);
    std::vector<std::pair<std::byte*, std::byte*>> ranges;
    std::int64_t side_bytes = 0;
    for (int l = 0; l < shape.layers; ++l) {
      const LayerKv& kv = cache.layer(l);
      const SideTables& tables = wanted[static_cast<std::size_t>(l)];
      EXPECT_EQ(kv.bounds.data != nullptr, tables.page_bounds);
      EXPECT_EQ(kv.int8_bounds.data != nullptr, tables.int8_bounds);
      EXPECT_EQ(kv.int8_scales.data != nullptr, tables.int8_bounds);
      EXPECT_EQ(kv.moments.data != nullptr, tables.page_moments);
      EXPECT_EQ(kv.int4.data != nullptr, tables.int4_keys);
      EXPECT_EQ(kv.int4_params.data != nullptr, tables.int4_keys);
      std::int64_t layer_bytes = 0;
      for (const TensorRef& tensor :
           {kv.k, kv.v, kv.bounds, kv.int8_bounds, kv.int8_scales, kv.moments, kv.int4, kv.int4_params}) {
        if (tensor.data == nullptr) continue;
        auto* begin = static_cast<std::byte*>(tensor.data);
        ranges.emplace_back(begin, begin + tensor.bytes());
        layer_bytes += tensor.bytes();
      }
      EXPECT_EQ(layer_bytes - kv.k.bytes() - kv.v.bytes(), pages * shape.side_table_bytes(tables));
      side_bytes += layer_bytes - kv.k.bytes() - kv.v.bytes();
    }
    std::sort(ranges.begin(), ranges.end());
    for (std::size_t i = 1; i < ranges.size(); ++i) {
      EXPECT_LE(ranges[i - 1].second, ranges[i].first);
      EXPECT_LT(ranges[i].first - ranges[i - 1].second, 256);
    }
    const std::int64_t bytes = KvCache::bytes(shape, pages, wanted);
    EXPECT_EQ(ranges.back().second - ranges.front().first, bytes);
    EXPECT_GE(bytes, pages * shape.page_bytes() + side_bytes);
    for (std::size_t i = static_cast<std::size_t>(2 * shape.layers); i < ranges.size(); ++i) {
      EXPECT_EQ((ranges[i].first - ranges.front().first) % 256, 0);
    }
  }
}

TEST(KvCache, RefusesInt4KeysOfAnOddHeadDim) {
  const KvShape shape{.layers = 1, .kv_heads = 1, .head_dim = 5, .page_tokens = 16, .dtype = DType::kF32};
  const std::vector<SideTables> wanted = {{.int4_keys = true}};
  try {
    const KvCache cache(shape, 2, DeviceKind::kCpu, wanted);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput);
    EXPECT_NE(std::string(error.what()).find("head_dim 5"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace vesper
