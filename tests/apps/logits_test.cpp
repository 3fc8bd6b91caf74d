// vesper logits: one tensor, the same by prefill, by chunks and by decode.
#include <array>
#include <cmath>
#include <span>

#include "models/safetensors.h"
#include "tests/apps/run_vesper.h"
#include "tests/models/files.h"
#include "tests/models/int4_reference.h"

namespace vesper {
namespace {

std::vector<float> logits_of(const std::string& model, const std::string& ids, std::int64_t tokens, std::int64_t vocab,
                             const std::vector<std::string>& more) {
  const TempFolder folder;
  const std::string path = folder / "logits.safetensors";
  std::vector<std::string> arguments = {"logits", "--model", model, "--device", "cpu", "--ids", ids, "--output", path};
  arguments.insert(arguments.end(), more.begin(), more.end());
  EXPECT_EQ(run_well(arguments).out, "");
  const SafetensorsFile file(path);
  EXPECT_EQ(file.tensors().size(), 1U);
  const StoredTensor* logits = file.find("logits");
  if (logits == nullptr || logits->shape != std::vector<std::int64_t>{tokens, vocab} || logits->dtype != DType::kF32) {
    ADD_FAILURE() << "no tensor \"logits\" [" << tokens << ", " << vocab << "] f32";
    return {};
  }
  const auto* values = reinterpret_cast<const float*>(logits->data);
  return {values, values + tokens * vocab};
}

// Sums of fp32 in different order: a tolerance relative to the largest logit.
void expect_same(const std::vector<float>& found, const std::vector<float>& expected, const std::string& what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  float largest = 0.0F;
  float error = 0.0F;
  for (std::size_t i = 0; i < found.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    error = std::max(error, std::abs(found[i] - expected[i]));
    ASSERT_TRUE(std::isfinite(found[i])) << what;
  }
  EXPECT_GT(largest, 0.0F);
  EXPECT_LE(error, 1e-4F * largest) << what;
}

std::string many_ids(int count, int vocab) {
  std::string ids;
  for (int i = 0; i < count; ++i) ids += std::to_string((i * 37 + 11) % vocab) + ' ';
  return ids;
}

TEST(Logits, PrefillChunksAndDecodeAgree) {
  const int tokens = 75;
  const std::string ids = many_ids(tokens, 4096);
  const std::vector<float> whole = logits_of(demo_model(), ids, tokens, 4096, {});
  expect_same(logits_of(demo_model(), ids, tokens, 4096, {"--prefill-chunk", "7"}), whole, "chunks of 7");
  expect_same(logits_of(demo_model(), ids, tokens, 4096, {"--prefill-chunk", "33", "--page-tokens", "64"}), whole,
              "chunks of 33, pages of 64");
  expect_same(logits_of(demo_model(), ids, tokens, 4096, {"--decode-last", "20"}), whole, "the last 20 by decode");
  expect_same(logits_of(demo_model(), ids, tokens, 4096, {"--decode-last", "1000"}), whole, "all by decode");
}

TEST(Logits, SyntheticModelsNeedNoFilesAndFollowTheSeed) {
  const std::string ids = many_ids(5, 512);
  const std::vector<float> first = logits_of("synthetic:tiny", ids, 5, 512, {});
  EXPECT_EQ(logits_of("synthetic:tiny", ids, 5, 512, {}), first);
  EXPECT_NE(logits_of("synthetic:tiny", ids, 5, 512, {"--seed", "1"}), first);
}

// A copy of a checkpoint in f32, the matrices of its layers in 4 bits and back.
void write_dequantised(const std::string& model, const std::string& to) {
  const SafetensorsFile file(model + "/model.safetensors");
  std::vector<std::vector<float>> values;
  std::vector<NamedTensor> tensors;
  for (const auto& [name, stored] : file.tensors()) {
    ASSERT_EQ(stored.dtype, DType::kBf16) << name;
    std::vector<float>& exact = values.emplace_back();
    for (std::int64_t i = 0; i < stored.bytes / 2; ++i) {
      bf16 value{};
      std::memcpy(&value, stored.data + 2 * i, 2);
      exact.push_back(to_float(value));
    }
    if (stored.shape.size() == 2 && name.find("layers") != std::string::npos) {
      exact = HostInt4::quantised(exact, stored.shape[0], stored.shape[1]).values();
    }
    tensors.push_back({name, DType::kF32, stored.shape, exact.data()});
  }
  write_safetensors(to + "/model.safetensors", tensors);
  std::filesystem::copy_file(model + "/config.json", to + "/config.json");
}

// 4-bit weights are the numbers they stand for: on the CPU the same bits as a checkpoint that holds these numbers.
TEST(Logits, OfInt4WeightsAreThoseOfTheSameWeightsDequantised) {
  const int tokens = 40;
  const std::string ids = many_ids(tokens, 4096);
  const std::vector<float> stored = logits_of(demo_model(), ids, tokens, 4096, {});
  const TempFolder folder;
  write_dequantised(demo_model(), folder.path());
  const std::vector<float> int4 =
      logits_of(demo_model(), ids, tokens, 4096, {"--weights", "int4", "--decode-last", "9"});
  EXPECT_NE(int4, stored);
  EXPECT_EQ(int4, logits_of(folder.path(), ids, tokens, 4096, {"--decode-last", "9"}));
  EXPECT_NE(logits_of(demo_model(), ids, tokens, 4096, {"--weights", "int4,head", "--decode-last", "9"}), int4);
}

TEST(Logits, AnExistingFileIsReplacedAndNothingElseIsLeft) {
  const TempFolder folder;
  write_file(folder / "x", "something else");
  (void)run_well({"logits", "--model", "synthetic:tiny", "--device", "cpu", "--ids", "1 2", "--output", folder / "x"});
  const SafetensorsFile file(folder / "x");
  EXPECT_NE(file.find("logits"), nullptr);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

}  // namespace
}  // namespace vesper
