// Sampling on CUDA draws the ids that the CPU draws.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "engine/core/philox.h"
#include "engine/sampling.h"
#include "tests/device_tensor.h"
#include "tests/gpu.h"

namespace vesper {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows of logits, and how each is drawn from.
struct Rows {
  std::int64_t vocab = 0;
  std::vector<float> logits;
  std::vector<SamplingParams> params;
  std::vector<std::int32_t> step;

  void add(const std::vector<float>& row, const SamplingParams& how, std::int32_t at_step = 0) {
    vocab = static_cast<std::int64_t>(row.size());
    logits.insert(logits.end(), row.begin(), row.end());
    params.push_back(how);
    step.push_back(at_step);
  }
  [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(params.size()); }
};

std::vector<std::int32_t> on_cuda(const Stream& stream, const Rows& rows) {
  const Exec exec = stream.exec();
  DeviceTensor logits(exec, 1, DType::kF32, rows.count(), rows.vocab);
  DeviceTensor params(exec, 0, DType::kI32, rows.count(), static_cast<std::int64_t>(sizeof(SamplingParams) / 4));
  DeviceTensor step(exec, 0, DType::kI32, rows.count());
  DeviceTensor ids(exec, 0, DType::kI32, rows.count());
  logits.write_bytes(rows.logits.data());
  params.write_bytes(rows.params.data());
  step.write_bytes(rows.step.data());
  sample(exec, logits.ref().as<const float, 2>(),
         TensorView<const SamplingParams, 1>(params.data<const SamplingParams>(), rows.count()),
         step.ref().as<const std::int32_t, 1>(), ids.ref().as<std::int32_t, 1>());
  std::vector<std::int32_t> found(rows.params.size());
  std::memcpy(found.data(), ids.read_bytes("ids").data(), found.size() * 4);
  return found;
}

std::vector<std::int32_t> on_cpu(const Rows& rows) {
  std::vector<std::int32_t> ids(rows.params.size());
  cpu::sample(TensorView<const float, 2>(rows.logits.data(), rows.count(), rows.vocab),
              TensorView<const SamplingParams, 1>(rows.params.data(), rows.count()),
              TensorView<const std::int32_t, 1>(rows.step.data(), rows.count()),
              TensorView<std::int32_t, 1>(ids.data(), rows.count()));
  return ids;
}

// What the draw compares, in double precision.
double score(const Rows& rows, std::size_t s, std::int32_t id) {
  const SamplingParams& how = rows.params[s];
  const PhiloxCounter draw = philox(
      {{static_cast<std::uint32_t>(id), static_cast<std::uint32_t>(rows.step[s]), how.request, 0}}, {{how.seed, 0}});
  const double logit = rows.logits[s * static_cast<std::size_t>(rows.vocab) + static_cast<std::size_t>(id)];
  return logit / how.temperature - std::log(-std::log(static_cast<double>(unit_interval(draw.word[0]))));
}

std::vector<float> random_row(std::mt19937& random, std::int64_t vocab) {
  const float spread = std::uniform_real_distribution<float>(0.5F, 6.0F)(random);
  std::normal_distribution<float> normal(std::uniform_real_distribution<float>(-8.0F, 8.0F)(random), spread);
  std::vector<float> row(static_cast<std::size_t>(vocab));
  // Coarse logits tie often; the others hardly ever.
  const float grid = random() % 3 == 0 ? 4.0F : 0.0F;
  const bool holes = random() % 4 == 0;
  for (float& logit : row) {
    logit = normal(random);
    if (grid != 0.0F) logit = std::round(logit * grid) / grid;
    if (holes && random() % 8 == 0) logit = random() % 2 == 0 ? kNan : -kInfinity;
  }
  row[random() % row.size()] = 1.0F;
  return row;
}

SamplingParams random_params(std::mt19937& random, std::int64_t vocab) {
  SamplingParams params;
  params.temperature = random() % 8 == 0 ? 0.0F : std::uniform_real_distribution<float>(0.1F, 2.0F)(random);
  if (random() % 2 == 0) params.top_k = static_cast<std::int32_t>(1 + random() % (random() % 2 == 0 ? 100 : vocab + 5));
  if (random() % 2 == 0) params.top_p = std::uniform_real_distribution<float>(0.0F, 1.0F)(random);
  params.seed = static_cast<std::uint32_t>(random());
  params.request = static_cast<std::uint32_t>(random() % 100);
  return params;
}

TEST(SampleCuda, DrawsTheIdsOfTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(1);
  int drawn = 0;
  int near_ties = 0;
  for (const std::int64_t vocab : {1, 2, 31, 33, 1000, 1023, 8192, 32000, 128256, 262144}) {
    for (int batch = 0; batch < 4; ++batch) {
      Rows rows;
      const int count = vocab > 10000 ? 12 : 40;
      for (int s = 0; s < count; ++s) {
        rows.add(random_row(random, vocab), random_params(random, vocab), static_cast<std::int32_t>(random() % 5000));
      }
      const std::vector<std::int32_t> expected = on_cpu(rows);
      const std::vector<std::int32_t> found = on_cuda(stream, rows);
      EXPECT_EQ(on_cuda(stream, rows), found) << "the same rows again";
      for (std::size_t s = 0; s < expected.size(); ++s) {
        ++drawn;
        if (found[s] == expected[s]) continue;
        const SamplingParams& how = rows.params[s];
        ASSERT_TRUE(found[s] >= 0 && found[s] < vocab) << found[s] << " of " << vocab;
        const double gap = how.temperature > 0.0F ? score(rows, s, expected[s]) - score(rows, s, found[s]) : kInfinity;
        // Logarithms differ in their last places between the devices.
        if (std::abs(gap) < 1e-4) {
          ++near_ties;
          continue;
        }
        ADD_FAILURE() << "vocab " << vocab << ", row " << s << ": expected " << expected[s] << ", found " << found[s]
                      << ", scores " << gap << " apart; temperature " << how.temperature << ", top_k " << how.top_k
                      << ", top_p " << how.top_p << ", seed " << how.seed << ", step " << rows.step[s];
      }
    }
  }
  EXPECT_LT(near_ties * 100, drawn) << "near ties";
}

TEST(SampleCuda, GreedyTakesTheLowestIdAmongEqualsAndNoNan) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  Rows rows;
  std::vector<float> row(100000, 0.5F);
  rows.add(row, {});
  row[77777] = row[99999] = row[90001] = 0.75F;
  rows.add(row, {});
  row[5] = kNan;
  row[99998] = kInfinity;
  rows.add(row, {});
  rows.add(std::vector<float>(100000, -kInfinity), {});
  rows.add(std::vector<float>(100000, kNan), {.temperature = 1.0F, .top_k = 3, .top_p = 0.5F});
  EXPECT_EQ(on_cuda(stream, rows), (std::vector<std::int32_t>{0, 77777, 99998, -1, -1}));
}

// Sets that are known without a reference: what is drawn over many steps is exactly what is kept.
TEST(SampleCuda, KeepsTiesOfTheThresholds) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const auto drawn_ids = [&](const std::vector<float>& row, const SamplingParams& params) {
    Rows rows;
    for (std::int32_t step = 0; step < 300; ++step) rows.add(row, params, step);
    std::vector<bool> drawn(row.size());
    for (const std::int32_t id : on_cuda(stream, rows)) drawn.at(static_cast<std::size_t>(id)) = true;
    return drawn;
  };
  using Drawn = std::vector<bool>;
  const std::vector<float> row = {0.0F, -0.0F, 1.0F, -1.0F, 0.0F, kNan};
  EXPECT_EQ(drawn_ids(row, {.temperature = 1.0F, .top_k = 1}), (Drawn{false, false, true, false, false, false}));
  // The second largest is zero, of either sign, thrice.
  EXPECT_EQ(drawn_ids(row, {.temperature = 1.0F, .top_k = 2}), (Drawn{true, true, true, false, true, false}));
  // Probabilities 0.447, three of 0.164, 0.060 (e^logit: 2.718, 1, 1, 1, 0.368; in all 6.086).
  EXPECT_EQ(drawn_ids(row, {.temperature = 1.0F, .top_p = 0.44F}), (Drawn{false, false, true, false, false, false}));
  EXPECT_EQ(drawn_ids(row, {.temperature = 1.0F, .top_p = 0.46F}), (Drawn{true, true, true, false, true, false}));
  EXPECT_EQ(drawn_ids(row, {.temperature = 1.0F, .top_p = 0.95F}), (Drawn{true, true, true, true, true, false}));
  // After top_k = 2 there are e^1 and three ones, of which the largest has 0.475.
  EXPECT_EQ(drawn_ids(row, {.temperature = 1.0F, .top_k = 2, .top_p = 0.47F}),
            (Drawn{false, false, true, false, false, false}));
  EXPECT_EQ(drawn_ids(row, {.temperature = 1.0F, .top_k = 2, .top_p = 0.48F}),
            (Drawn{true, true, true, false, true, false}));
}

}  // namespace
}  // namespace vesper
