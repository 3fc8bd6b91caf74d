#include "engine/core/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <vector>

namespace vesper {
namespace {

TEST(ParallelFor, CoversEveryIndexOnce) {
  for (const std::int64_t count : {0, 1, 7, 1000, 12345}) {
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
    parallel_for(count, 3, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
    });
    for (const auto& times : seen) ASSERT_EQ(times.load(), 1);
  }
}

TEST(ParallelFor, ManyShortRegionsInARow) {
  std::atomic<std::int64_t> sum{0};
  for (int region = 0; region < 20000; ++region) {
    parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) { sum += end - begin; });
  }
  EXPECT_EQ(sum.load(), 160000);
}

TEST(ParallelFor, NestedCallsRunInPlace) {
  std::atomic<int> inner{0};
  parallel_for(16, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      parallel_for(10, 1, [&](std::int64_t b, std::int64_t e) { inner += static_cast<int>(e - b); });
    }
  });
  EXPECT_EQ(inner.load(), 160);
}

TEST(ParallelFor, RethrowsAndGoesOn) {
  EXPECT_THROW(parallel_for(100, 1,
                            [](std::int64_t begin, std::int64_t) {
                              if (begin >= 50) throw std::runtime_error("in a worker");
                            }),
               std::runtime_error);
  std::atomic<int> done{0};
  parallel_for(100, 1, [&](std::int64_t begin, std::int64_t end) { done += static_cast<int>(end - begin); });
  EXPECT_EQ(done.load(), 100);
}

}  // namespace
}  // namespace vesper
