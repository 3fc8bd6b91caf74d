// Logits against Hugging Face's own model: the fixtures of tests/golden/make_golden.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>

#include "engine/engine.h"
#include "models/safetensors.h"
#include "tests/engine/device.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

struct Golden {
  std::vector<std::int32_t> ids;
  TensorView<const float, 2> logits;  // [tokens, vocab]
  std::unique_ptr<SafetensorsFile> file;
};

Golden read_golden(const std::string& folder) {
  Golden golden;
  golden.file = std::make_unique<SafetensorsFile>(folder + "/golden.safetensors");
  const StoredTensor* ids = golden.file->find("ids");
  const StoredTensor* logits = golden.file->find("logits");
  const auto* numbers = reinterpret_cast<const std::int32_t*>(ids->data);
  golden.ids.assign(numbers, numbers + ids->shape[0]);
  golden.logits =
      TensorView<const float, 2>(reinterpret_cast<const float*>(logits->data), logits->shape[0], logits->shape[1]);
  return golden;
}

// Largest error of a row, as a share of the largest logit of the fixture.
double worst_error(Engine& engine, const Golden& golden, int chunk, int decode_last) {
  const int tokens = static_cast<int>(golden.ids.size());
  double scale = 0.0;
  for (std::int64_t i = 0; i < golden.logits.size(); ++i) {
    scale = std::max(scale, std::abs(static_cast<double>(golden.logits.data()[i])));
  }
  CachedSequence sequence;
  EXPECT_TRUE(engine.reserve(sequence, tokens));
  std::vector<float> row(static_cast<std::size_t>(engine.config().vocab));
  double worst = 0.0;
  for (int at = 0; at < tokens;) {
    const bool prefill = at < tokens - decode_last;
    const int count = prefill ? std::min(chunk, tokens - decode_last - at) : 1;
    const auto step = std::span(golden.ids).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count));
    const std::array<CachedSequence*, 1> sequences = {&sequence};
    prefill ? engine.prefill(sequence, step) : engine.decode(sequences, step);
    for (std::int32_t r = 0; r < count; ++r) {
      engine.read_logits({&r, 1}, row);
      for (std::size_t i = 0; i < row.size(); ++i) {
        const double error =
            std::abs(static_cast<double>(row[i]) - golden.logits(at + r, static_cast<std::int64_t>(i)));
        worst = std::isnan(error) ? INFINITY : std::max(worst, error / scale);
      }
    }
    at += count;
  }
  engine.truncate(sequence, 0);
  return worst;
}

// CPU: fp32 throughout, 1e-4 as the project promises. CUDA: some ten roundings a layer to the 16-bit type (products,
// rotation, probabilities, norms, residual), each a half unit relative to its own result; they enter the logits through
// sums of many terms and so add as a random walk, with four deviations for the largest of all logits.
double tolerance(const Engine& engine, DType stored) {
  if (kTestDevice == DeviceKind::kCpu) return 1e-4;
  const double half_unit = stored == DType::kF16 ? 0x1p-11 : 0x1p-9;
  return 4.0 * half_unit * std::sqrt(10.0 * engine.config().layers);
}

using GoldenTest = DeviceTest;

TEST_F(GoldenTest, LogitsEqualHuggingFaces) {
  int cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(source_dir() + "/tests/golden/cases")) {
    const std::string folder = entry.path().string();
    const Golden golden = read_golden(folder);
    EngineOptions options;
    options.limits.device = kTestDevice;
    options.limits.max_context = 256;
    Engine engine(folder, options, {});
    const double allowed = tolerance(engine, engine.config().dtype);
    const int tokens = static_cast<int>(golden.ids.size());
    EXPECT_LE(worst_error(engine, golden, 2048, 0), allowed) << folder << ", whole prefill";
    EXPECT_LE(worst_error(engine, golden, 23, 0), allowed) << folder << ", chunks of 23, borders in mid-page";
    EXPECT_LE(worst_error(engine, golden, 23, 40), allowed) << folder << ", the last 40 by decode";
    EXPECT_LE(worst_error(engine, golden, 1, tokens), allowed) << folder << ", all by decode";
    ++cases;
  }
  EXPECT_GE(cases, 5);
}

}  // namespace
}  // namespace vesper
