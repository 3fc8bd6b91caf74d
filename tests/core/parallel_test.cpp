#include "engine/core/parallel.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "engine/core/error.h"

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

// In a process of its own, whose threads ask for stacks that no address space holds.
TEST(ParallelForDeathTest, ThreadsThatCannotBeHadAreNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto start = [] {
    setenv("VESPER_THREADS", "4", 1);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, std::size_t{1} << 47U);
    pthread_setattr_default_np(&attributes);
    try {
      parallel_for(4, 1, [](std::int64_t, std::int64_t) {});
    } catch (const Error& error) {
      std::fputs(error.what(), stderr);
      std::_Exit(1);
    }
    std::_Exit(0);
  };
  EXPECT_EXIT(start(), testing::ExitedWithCode(1), "starting 4 threads: found .* after 1; .*VESPER_THREADS");
}

}  // namespace
}  // namespace vesper
