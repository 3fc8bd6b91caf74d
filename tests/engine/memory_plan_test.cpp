#include "engine/memory_plan.h"

#include <gtest/gtest.h>

#include "engine/core/error.h"

namespace vesper {
namespace {

ModelConfig llama_shape() {
  ModelConfig config;
  config.layers = 32;
  config.hidden = 4096;
  config.heads = 32;
  config.kv_heads = 8;
  config.head_dim = 128;
  config.ffn = 14336;
  config.vocab = 128256;
  config.max_positions = 131072;
  return config;
}

constexpr WeightsPlan kWeights{.dtype = DType::kBf16, .device_bytes = 16'060'522'496};

MemoryPlan plan(int max_context, int max_seqs, std::int64_t free_bytes) {
  EngineLimits limits;
  limits.max_context = max_context;
  limits.max_seqs = max_seqs;
  const AttentionConfig dense = parse_attention("dense", 32);
  return plan_memory(llama_shape(), kWeights, {&dense, 1}, limits, free_bytes);
}

constexpr std::int64_t kGb = 1'000'000'000;

TEST(MemoryPlan, CountsEachPart) {
  const MemoryPlan made = plan(1024, 2, 80 * kGb);
  EXPECT_EQ(made.kv_pages, 128);
  EXPECT_EQ(made.parts[1].name, "KV cache");
  EXPECT_EQ(made.parts[1].bytes, std::int64_t{2} * 32 * 8 * 128 * 4 * 2 * 1024);  // f32 on the CPU
  std::int64_t sum = 0;
  for (const MemoryPart& part : made.parts) sum += part.bytes;
  EXPECT_EQ(made.total_bytes, sum);
}

TEST(MemoryPlan, CountsInMoreThan32Bits) {
  const MemoryPlan made = plan(1 << 24, 64, 1'000'000 * kGb);  // 2^33 keys over all sequences and KV heads
  EXPECT_EQ(made.parts[1].bytes, std::int64_t{2} * 32 * 8 * 128 * 4 * 64 * (1 << 24));
  EXPECT_EQ(made.parts[4].name, "split partials");  // one for every 128 keys
  EXPECT_EQ(made.parts[4].bytes, std::int64_t{64} * (1 << 24) / 128 * 32 * (128 + 1) * 4);
}

TEST(MemoryPlan, TakesTheModelsMaximumWhereItFits) {
  const MemoryPlan made = plan(0, 1, 100 * kGb);
  EXPECT_EQ(made.limits.max_context, 131072);
  EXPECT_FALSE(made.context_was_cut);
}

TEST(MemoryPlan, CutsAnUndecidedContextToNineTenths) {
  const MemoryPlan made = plan(0, 1, 30 * kGb);
  EXPECT_TRUE(made.context_was_cut);
  EXPECT_LE(made.total_bytes, 27 * kGb);
  EXPECT_GT(plan(made.limits.max_context + 64, 1, 80 * kGb).total_bytes, 27 * kGb);
}

TEST(MemoryPlan, RefusesWithNeedAndRoom) {
  try {
    (void)plan(131072, 1, 30 * kGb);
    FAIL();
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.fault(), Fault::kInput);
    EXPECT_NE(message.find("30.0 GB"), std::string::npos) << message;
    EXPECT_NE(message.find("lower --max-context or the number of sequences"), std::string::npos) << message;
  }
  EXPECT_THROW((void)plan(0, 1, 10 * kGb), Error);  // the weights alone are too large
}

TEST(FormatBytes, RoundsToAReadableUnit) {
  EXPECT_EQ(format_bytes(17), "17 B");
  EXPECT_EQ(format_bytes(12'040), "12.0 KB");
  EXPECT_EQ(format_bytes(999'960), "1.0 MB");
  EXPECT_EQ(format_bytes(16'060'522'496), "16.1 GB");
}

}  // namespace
}  // namespace vesper
