// The embedded demo model answers needle questions by greedy decoding: the prompts of configs/demo/questions, the text
// prefilled, questions and answers fed through decode.
#include <gtest/gtest.h>

#include "engine/eval_needle.h"
#include "tests/engine/device.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

// Each row asks two questions of each kind. Sanitizers look for accesses, which all rows share, and take a minute for
// one.
#ifdef __SANITIZE_ADDRESS__
constexpr int kRows = 4;
#else
constexpr int kRows = 20;
#endif

void expect_answers(int length) {
  const std::string folder = source_dir() + "/configs/demo";
  const std::string questions = folder + "/questions/";
  std::vector<NeedleRow> rows =
      read_needle_rows(questions + "ids_" + std::to_string(length) + ".u16", questions + "index.json", length);
  ASSERT_EQ(rows.size(), 20U);
  rows.resize(kRows);
  EngineOptions options;
  options.limits.device = kTestDevice;
  options.limits.max_context = length;
  Engine engine(folder, options, {});
  const NeedleScore score = eval_needle_rows(engine, rows, {});
  for (const NeedleKind kind : kNeedleKinds) {
    const std::string name(needle_kind_name(kind));
    EXPECT_EQ(score[kind].total, 2 * kRows) << name << " at " << length << " tokens";
    EXPECT_GE(score[kind].right, 2 * kRows - 1)
        << "of " << 2 * kRows << " questions for " << name << " at " << length << " tokens";
    std::printf("%d tokens: %d of %d %s\n", length, score[kind].right, 2 * kRows, name.c_str());
  }
}

using NeedleTest = DeviceTest;

TEST_F(NeedleTest, At4096Tokens) {
  expect_answers(4096);
}

TEST_F(NeedleTest, At16384Tokens) {
  if (kTestDevice == DeviceKind::kCpu) GTEST_SKIP() << "sixteen minutes on two cores; runs on a GPU";
  expect_answers(16384);
}

}  // namespace
}  // namespace vesper
