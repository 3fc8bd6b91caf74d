#include "engine/stop_filter.h"

#include <gtest/gtest.h>

namespace vesper {
namespace {

std::string feed(StopFilter& filter, const std::string& text, std::size_t piece) {
  std::string out;
  for (std::size_t at = 0; at < text.size(); at += piece) out += filter.push(text.substr(at, piece));
  return out + filter.finish();
}

TEST(StopFilter, CutsBeforeTheFirstStopHoweverThePiecesFall) {
  for (std::size_t piece = 1; piece <= 12; ++piece) {
    StopFilter filter({"###", "END"});
    EXPECT_EQ(feed(filter, "one ## two ENd ###three END", piece), "one ## two ENd ") << piece;
    EXPECT_TRUE(filter.stopped());
  }
}

TEST(StopFilter, GivesOutAllWithoutAStop) {
  for (std::size_t piece = 1; piece <= 5; ++piece) {
    StopFilter filter({"aab"});
    EXPECT_EQ(feed(filter, "aaaaaa aa", piece), "aaaaaa aa");
    EXPECT_FALSE(filter.stopped());
  }
  StopFilter none;
  EXPECT_EQ(feed(none, "text", 3), "text");
}

TEST(StopFilter, HoldsBackNoMoreThanItMust) {
  StopFilter filter({"\n\n"});
  EXPECT_EQ(filter.push("line\n"), "line");
  EXPECT_EQ(filter.push("more"), "\nmore");
  EXPECT_EQ(filter.push("\n\nrest"), "");
  EXPECT_TRUE(filter.stopped());
  EXPECT_EQ(filter.push("later"), "");
}

TEST(StopFilter, FindsAStopThatOverlapsItsOwnBeginning) {
  for (std::size_t piece = 1; piece <= 4; ++piece) {
    StopFilter filter({"aab"});
    EXPECT_EQ(feed(filter, "xaaab", piece), "xa");
  }
}

}  // namespace
}  // namespace vesper
