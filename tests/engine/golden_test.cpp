// Logits against Hugging Face's own model: the fixtures of tests/golden/make_golden.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>

#include "engine/engine.h"
#include "engine/generate.h"
#include "models/safetensors.h"
#include "tests/engine/device.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

using Logits = TensorView<const float, 2>;  // [tokens, vocab]

struct Golden {
  std::vector<std::int32_t> ids;
  Logits logits;             // of a prefill
  Logits logits_decode_40;   // of one whose last 40 tokens come by decode: others with dynamic rope, else the same
  Logits logits_decode_all;  // where all come by decode
  std::unique_ptr<SafetensorsFile> file;
};

Logits read_logits(const SafetensorsFile& file, const std::string& name) {
  const StoredTensor* stored = file.find(name) != nullptr ? file.find(name) : file.find("logits");
  return Logits(reinterpret_cast<const float*>(stored->data), stored->shape[0], stored->shape[1]);
}

Golden read_golden(const std::string& folder) {
  Golden golden;
  golden.file = std::make_unique<SafetensorsFile>(folder + "/golden.safetensors");
  const StoredTensor* ids = golden.file->find("ids");
  const auto* numbers = reinterpret_cast<const std::int32_t*>(ids->data);
  golden.ids.assign(numbers, numbers + ids->shape[0]);
  golden.logits = read_logits(*golden.file, "logits");
  golden.logits_decode_40 = read_logits(*golden.file, "logits_decode_40");
  golden.logits_decode_all = read_logits(*golden.file, "logits_decode_all");
  return golden;
}

// Largest error of a row, as a share of the largest expected logit.
double worst_error(Engine& engine, std::span<const std::int32_t> ids, Logits expected, int chunk, int decode_last) {
  const int tokens = static_cast<int>(ids.size());
  double scale = 0.0;
  for (std::int64_t i = 0; i < expected.size(); ++i) {
    scale = std::max(scale, std::abs(static_cast<double>(expected.data()[i])));
  }
  CachedSequence sequence;
  sequence.prompt_length = tokens - decode_last;
  EXPECT_TRUE(engine.reserve(sequence, tokens));
  std::vector<float> row(static_cast<std::size_t>(engine.config().vocab));
  double worst = 0.0;
  for (int at = 0; at < tokens;) {
    const bool prefill = at < tokens - decode_last;
    const int count = prefill ? std::min(chunk, tokens - decode_last - at) : 1;
    const auto step = ids.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count));
    const std::array<CachedSequence*, 1> sequences = {&sequence};
    prefill ? engine.prefill(sequence, step) : engine.decode(sequences, step);
    for (std::int32_t r = 0; r < count; ++r) {
      engine.read_logits({&r, 1}, row);
      for (std::size_t i = 0; i < row.size(); ++i) {
        const double error = std::abs(static_cast<double>(row[i]) - expected(at + r, static_cast<std::int64_t>(i)));
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
    const auto error = [&](Logits expected, int chunk, int decode_last) {
      return worst_error(engine, golden.ids, expected, chunk, decode_last);
    };
    EXPECT_LE(error(golden.logits, 2048, 0), allowed) << folder << ", whole prefill";
    EXPECT_LE(error(golden.logits, 23, 0), allowed) << folder << ", chunks of 23, borders in mid-page";
    EXPECT_LE(error(golden.logits_decode_40, 23, 40), allowed) << folder << ", the last 40 by decode";
    EXPECT_LE(error(golden.logits_decode_all, 1, tokens), allowed) << folder << ", all by decode";
    ++cases;
  }
  EXPECT_GE(cases, 12);
}

EngineOptions dynamic_options(int max_seqs, int prefill_chunk) {
  EngineOptions options;
  options.limits.device = kTestDevice;
  options.limits.max_context = 128;
  options.limits.max_seqs = max_seqs;
  options.limits.prefill_chunk = prefill_chunk;
  return options;
}

std::string dynamic_case() {
  return source_dir() + "/tests/golden/cases/rope_dynamic";
}

// Logits [steps, seqs, vocab] of decode steps after prompts of these lengths, all from the beginning of `ids`.
std::vector<float> decode_together(Engine& engine, std::span<const std::int32_t> ids, const std::vector<int>& lengths) {
  constexpr int kSteps = 4;
  std::vector<CachedSequence> sequences(lengths.size());
  std::vector<CachedSequence*> all;
  std::vector<std::int32_t> rows;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    EXPECT_TRUE(engine.reserve(sequences[s], lengths[s] + kSteps));
    engine.prefill(sequences[s], ids.first(static_cast<std::size_t>(lengths[s])));
    all.push_back(&sequences[s]);
    rows.push_back(static_cast<std::int32_t>(s));
  }
  const std::size_t step_size = lengths.size() * static_cast<std::size_t>(engine.config().vocab);
  std::vector<float> logits(kSteps * step_size);
  for (std::size_t step = 0; step < kSteps; ++step) {
    std::vector<std::int32_t> next;
    for (const int length : lengths) next.push_back(ids[static_cast<std::size_t>(length) + step]);
    engine.decode(all, next);
    engine.read_logits(rows, std::span(logits).subspan(step * step_size, step_size));
  }
  for (CachedSequence& sequence : sequences) engine.truncate(sequence, 0);
  return logits;
}

TEST_F(GoldenTest, DynamicFrequenciesFollowEachSequenceOfABatch) {
  const Golden golden = read_golden(dynamic_case());
  Engine engine(dynamic_case(), dynamic_options(3, 128), {});
  const std::vector<int> lengths = {86, 20, 50};
  const std::vector<float> together = decode_together(engine, golden.ids, lengths);
  const auto vocab = static_cast<std::size_t>(engine.config().vocab);
  const double allowed = kTestDevice == DeviceKind::kCpu ? 0.0 : tolerance(engine, engine.config().dtype) * 4.0;
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    const std::vector<float> alone = decode_together(engine, golden.ids, {lengths[s]});
    for (std::size_t step = 0; step < alone.size() / vocab; ++step) {
      for (std::size_t i = 0; i < vocab; ++i) {
        const float found = together[(step * lengths.size() + s) * vocab + i];
        ASSERT_LE(std::abs(found - alone[step * vocab + i]), allowed) << "sequence " << s << ", step " << step;
      }
    }
  }
}

// generate() announces the whole prompt, so that the steps of its prefill leave no trace.
TEST_F(GoldenTest, DynamicFrequenciesTakeAPromptAsAWhole) {
  if constexpr (kTestDevice == DeviceKind::kCuda) GTEST_SKIP() << "chunks round otherwise there";
  const Golden golden = read_golden(dynamic_case());
  GenerateRequest request;
  request.prompt = golden.ids;
  request.max_tokens = 38;
  request.ignore_eos = true;
  request.sampling.temperature = 1.0F;  // the likeliest ids alone would hide small differences
  std::vector<std::vector<std::int32_t>> answers;
  for (const int chunk : {128, 16}) {
    Engine engine(dynamic_case(), dynamic_options(1, chunk), {});
    answers.push_back(generate(engine, nullptr, {&request, 1}, {})[0].ids);
  }
  EXPECT_EQ(answers[0], answers[1]);
}

}  // namespace
}  // namespace vesper
