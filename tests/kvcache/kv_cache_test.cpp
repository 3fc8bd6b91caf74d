#include "kvcache/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

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

}  // namespace
}  // namespace vesper
