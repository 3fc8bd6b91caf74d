// Static parts of sampled lists on CUDA: equal to the CPU's to the last entry, since they depend on integers and given
// scores.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/sample_tail.h"
#include "tests/attention/attend_reference.h"
#include "tests/attention/device_lists.h"

namespace vesper {
namespace {

// The same count, static part, weight and entries; says where the first difference is.
void expect_same_list(const ListBuffers& found, const ListBuffers& expected, int s, int g, const std::string& what) {
  const std::string where = what + ", sequence " + std::to_string(s) + ", KV head " + std::to_string(g);
  ASSERT_EQ(found.list.count(s, g), expected.list.count(s, g)) << where;
  ASSERT_EQ(found.list.tail_begin(s, g), expected.list.tail_begin(s, g)) << where;
  EXPECT_FLOAT_EQ(found.list.tail_log_weight(s, g), expected.list.tail_log_weight(s, g)) << where;
  for (int i = 0; i < found.list.count(s, g); ++i) {
    ASSERT_EQ(found.list.index(s, g, i), expected.list.index(s, g, i)) << where << ", entry " << i;
  }
}

enum class Scores { kSpread, kTied, kEqual, kWithNan };

std::vector<float> scores_like(std::mt19937& random, std::size_t count, Scores like) {
  std::vector<float> scores = random_floats(random, count, -20.0F, 20.0F);
  for (std::size_t i = 0; i < count; ++i) {
    if (like == Scores::kTied) scores[i] = std::round(scores[i]);
    if (like == Scores::kEqual) scores[i] = 0.5F;
    if (like == Scores::kWithNan && i % 3 == 0) scores[i] = i % 2 == 0 ? NAN : -INFINITY;
    if (i % 1000 == 7) scores[i] = i % 2 == 0 ? -0.0F : 0.0F;
  }
  return scores;
}

TEST(SelectStaticCuda, GivesTheListsOfTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(1);
  const std::vector<int> lengths{1, 5, 63, 64, 4096, 4100, 4165, 9000, 40000};
  constexpr int kCapacity = 40001;
  const auto seqs = static_cast<int>(lengths.size());
  const RaggedBatch ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), 16);
  const DeviceBatch device(stream, ragged);
  const std::vector<StaticRule> rules{
      {.sink_tokens = {4}, .window_tokens = {8}, .top_k = {0.025}},
      {.sink_tokens = {128}, .window_tokens = {128}, .top_k = {1}, .group_score = GroupScore::kSum},
      {.sink_tokens = {0}, .window_tokens = {0}, .top_k = {0.9}, .group_score = GroupScore::kMean},
      {.sink_tokens = {3}, .window_tokens = {0.5}, .top_k = {100000}},
      {.sink_tokens = {64}, .window_tokens = {64}, .top_k = {0}}};
  int round = 0;
  for (const int group : {1, 3, 8}) {
    const AttentionShape shape = make_shape(2, group, 64, 16);
    for (const Scores like : {Scores::kSpread, Scores::kTied, Scores::kEqual, Scores::kWithNan}) {
      for (const bool of_pages : {false, true}) {
        const int rows = of_pages ? shape.kv_heads : shape.heads;
        const int columns = of_pages ? (kCapacity + 15) / 16 : kCapacity;
        const std::vector<float> scores =
            scores_like(random, static_cast<std::size_t>(seqs * rows) * static_cast<std::size_t>(columns), like);
        const Buffer on_device = upload(stream, scores);
        TopKScores top_k;
        TopKScores device_top_k;
        (of_pages ? top_k.of_pages : top_k.of_tokens) = TensorView<const float, 3>(scores.data(), seqs, rows, columns);
        (of_pages ? device_top_k.of_pages : device_top_k.of_tokens) = on_device.view<const float>(seqs, rows, columns);
        const StaticRule& rule = rules[static_cast<std::size_t>(round++) % rules.size()];
        ListBuffers expected(seqs, 2, kCapacity);
        const DeviceLists lists(stream, expected);
        cpu::select_static(shape, ragged.batch, top_k, rule, {.tokens = 5}, expected.list);
        select_static(stream.exec(), shape, device.batch, device_top_k, rule, {.tokens = 5}, lists.list);
        ListBuffers found(seqs, 2, kCapacity);
        lists.read(stream, found);
        for (int s = 0; s < seqs; ++s) {
          for (int g = 0; g < 2; ++g) {
            expect_same_list(found, expected, s, g,
                             "group " + std::to_string(group) + (of_pages ? ", pages" : ", tokens") + ", scores " +
                                 std::to_string(static_cast<int>(like)) + ", rule " +
                                 std::to_string((round - 1) % static_cast<int>(rules.size())));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace vesper
