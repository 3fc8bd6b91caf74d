// The sparse backends as a decode step runs them: what their lists promise, and where they must equal dense attention.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>

#include "engine/attend_step.h"
#include "engine/generate.h"
#include "tests/engine/device.h"

namespace vesper {
namespace {

constexpr int kPageTokens = 16;

// Keys, values and a query of one sequence; `sharpness` spreads the scores.
struct StepInput {
  int heads, kv_heads, head_dim, tokens;
  std::vector<bf16> q, k, v;

  StepInput(int heads_, int kv_heads_, int head_dim_, int tokens_, float sharpness, unsigned seed)
      : heads(heads_), kv_heads(kv_heads_), head_dim(head_dim_), tokens(tokens_) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<bf16>& values, int count, float scale) {
      for (int i = 0; i < count; ++i) values.push_back(to_bf16(scale * normal(random)));
    };
    fill(q, heads * head_dim, sharpness);
    fill(k, tokens * kv_heads * head_dim, 1.0F);
    fill(v, tokens * kv_heads * head_dim, 1.0F);
  }

  AttendOutput run(const std::string& attention, std::uint32_t seed = 0) {
    return attend_step({.q = tensor_ref(q.data(), DType::kBf16, heads, head_dim),
                        .k = tensor_ref(k.data(), DType::kBf16, tokens, kv_heads, head_dim),
                        .v = tensor_ref(v.data(), DType::kBf16, tokens, kv_heads, head_dim)},
                       attention, kPageTokens, seed, kTestDevice);
  }
};

std::vector<std::int32_t> list_of(const AttendOutput& output, int g) {
  const auto row = output.index.begin() + static_cast<std::ptrdiff_t>(g) * output.index_columns;
  return {row, row + output.count[static_cast<std::size_t>(g)]};
}

const std::vector<std::string> kSpecs = {
    "quest:token_budget=64",
    "quest:token_budget=0.1,sink_tokens=20,window_tokens=40",
    "quest:token_budget=128,page_score=mean_std,group=sum",
    "quest:token_budget=96,bounds=int8",
    "quest:token_budget=96,kernels=separate",
    "twilight:top_p=0.9",
    "twilight:top_p=0.9,bounds=int8",
    "twilight:top_p=0.5,base=dense,min_tokens=4",
    "twilight:top_p=0.8,scores=exact,base_budget=256",
    "vattention:pilot=32,sink_tokens=8,window_tokens=8,epsilon=0.3,delta=0.2",
    "vattention:pilot=32,sink_tokens=8,window_tokens=8,bounds=int8,epsilon=0.3,delta=0.2",
    "vattention:pilot=32,sink_tokens=8,window_tokens=8,top_k_by=int4,epsilon=0.2,verify=denominator",
    "vattention:pilot=40,sink_tokens=0,window_tokens=16,top_k_by=oracle,top_k=0.05",
    "vattention:pilot=64,top_k_by=none,on_outlier=report,epsilon=0.5",
};

using BackendsTest = DeviceTest;

TEST_F(BackendsTest, ListsAreSoundAndLeadToTheirOutput) {
  unsigned seed = 1;
  for (const int tokens : {1, 15, 16, 17, 100, 257, 1000, 3001}) {
    for (const auto& [heads, kv_heads] : {std::pair{4, 4}, std::pair{8, 2}, std::pair{7, 1}}) {
      StepInput input(heads, kv_heads, tokens % 2 == 0 ? 64 : 128, tokens, 1.5F, ++seed);
      for (const std::string& spec : kSpecs) {
        const AttendOutput output = input.run(spec);
        for (int g = 0; g < kv_heads; ++g) {
          const std::vector<std::int32_t> list = list_of(output, g);
          const auto tail = list.begin() + output.tail_begin[static_cast<std::size_t>(g)];
          const std::set<std::int32_t> unique(list.begin(), list.end());
          ASSERT_EQ(unique.size(), list.size()) << spec << " at " << tokens << ": an entry twice";
          ASSERT_TRUE(std::is_sorted(list.begin(), tail)) << spec << " at " << tokens;
          ASSERT_GE(*unique.begin(), 0) << spec;
          ASSERT_LT(*unique.rbegin(), tokens) << spec;
          ASSERT_TRUE(unique.contains(tokens - 1)) << spec << " at " << tokens << ": the newest token is missing";
        }
        for (const float value : output.out) ASSERT_TRUE(std::isfinite(value)) << spec << " at " << tokens;
      }
    }
  }
}

TEST_F(BackendsTest, ABudgetThatCoversTheContextIsDenseBitForBit) {
  for (const int tokens : {1, 16, 100, 1000, 2048}) {
    StepInput input(8, 2, 128, tokens, 1.0F, static_cast<unsigned>(tokens));
    const AttendOutput dense = input.run("dense");
    for (const std::string spec : {"quest:token_budget=2048", "twilight:dense_below=2048",
                                   "vattention:dense_below=2048", "quest:token_budget=64,dense_below=4096"}) {
      const AttendOutput output = input.run(spec);
      EXPECT_EQ(output.out, dense.out) << spec << " at " << tokens;
      EXPECT_EQ(output.lse, dense.lse) << spec << " at " << tokens;
      EXPECT_EQ(output.count, dense.count) << spec << " at " << tokens;
    }
  }
}

TEST_F(BackendsTest, SeparateKernelsMakeTheSameLists) {
  for (const int tokens : {100, 1000, 3001}) {
    StepInput input(8, 2, 128, tokens, 1.0F, static_cast<unsigned>(tokens));
    for (const std::string spec : {"quest:token_budget=64", "quest:token_budget=256,bounds=int8",
                                   "quest:token_budget=128,page_score=mean_std,group=sum"}) {
      const AttendOutput fused = input.run(spec);
      const AttendOutput separate = input.run(spec + ",kernels=separate");
      EXPECT_EQ(separate.count, fused.count) << spec << " at " << tokens;
      EXPECT_EQ(separate.index, fused.index) << spec << " at " << tokens;
    }
  }
}

double worst_difference(const AttendOutput& a, const AttendOutput& b) {
  double worst = 0.0;
  for (std::size_t i = 0; i < a.out.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(a.out[i]) - static_cast<double>(b.out[i])));
  }
  return worst;
}

TEST_F(BackendsTest, EverythingKeptIsDenseToRounding) {
  StepInput input(8, 2, 64, 1500, 1.0F, 3);
  const AttendOutput dense = input.run("dense");
  // Outputs are means of values of size one to four; sums of 1500 terms in another order, weights of 16 bits on CUDA.
  const double bound = kTestDevice == DeviceKind::kCuda ? 0x1p-6 : 1e-5;
  for (const std::string spec :
       {"twilight:top_p=1,base=dense", "twilight:top_p=1,base_budget=0.9999", "quest:token_budget=0.9999",
        "vattention:epsilon=0.000001,pilot=16", "vattention:epsilon=0.000001,pilot=16,verify=denominator"}) {
    const AttendOutput output = input.run(spec);
    EXPECT_EQ(output.count, dense.count) << spec;
    EXPECT_LE(worst_difference(output, dense), bound) << spec;
  }
}

TEST_F(BackendsTest, DrawsFollowTheSeed) {
  StepInput input(4, 2, 64, 2000, 1.5F, 9);
  const std::string spec = "vattention:pilot=64,sink_tokens=8,window_tokens=8,epsilon=0.4,on_outlier=report";
  const AttendOutput first = input.run(spec, 1);
  EXPECT_EQ(first.index, input.run(spec, 1).index);
  EXPECT_NE(first.index, input.run(spec, 2).index);
  EXPECT_EQ(input.run(spec + ",seed=1", 2).index, first.index);
}

EngineOptions options_for(const std::string& attention, int max_seqs) {
  EngineOptions options;
  options.limits.device = kTestDevice;
  options.limits.max_context = 1024;
  options.limits.max_seqs = max_seqs;
  options.attention = attention;
  options.seed = 5;
  return options;
}

std::vector<GenerateRequest> requests_of(const std::vector<int>& lengths) {
  std::vector<GenerateRequest> requests;
  for (const int length : lengths) {
    GenerateRequest request;
    std::mt19937 random(static_cast<unsigned>(length));
    for (int i = 0; i < length; ++i) request.prompt.push_back(static_cast<std::int32_t>(random() % 500));
    request.max_tokens = 6;
    request.ignore_eos = true;
    request.sampling.request = static_cast<std::uint32_t>(length);
    requests.push_back(request);
  }
  return requests;
}

TEST_F(BackendsTest, PermutingTheBatchPermutesTheOutput) {
  for (const std::string spec : {"quest:token_budget=64", "quest:token_budget=64,bounds=int8", "twilight:top_p=0.8",
                                 "vattention:pilot=32,sink_tokens=8,window_tokens=8,epsilon=0.4,delta=0.2"}) {
    Engine engine("synthetic:tiny", options_for(spec, 3), {});
    const auto forward = generate(engine, nullptr, requests_of({700, 30, 300}), {});
    const auto backward = generate(engine, nullptr, requests_of({300, 30, 700}), {});
    for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(forward[i].ids, backward[2 - i].ids) << spec << ", request " << i;
    bool sparse = false;
    for (const AttentionTotals& layer : engine.attention_totals()) {
      if (layer.sparse_steps == 0) continue;
      sparse = true;
      EXPECT_LT(layer.kept_tokens, layer.visible_tokens) << spec;
      EXPECT_LT(layer.kv_bytes, layer.dense_bytes) << spec;
      EXPECT_GT(layer.metadata_bytes, 0) << spec;
    }
    EXPECT_TRUE(sparse) << spec << ": no layer made lists";
  }
}

TEST_F(BackendsTest, ShortContextsWriteWhatDenseWrites) {
  Engine dense("synthetic:tiny", options_for("dense", 2), {});
  Engine quest("synthetic:tiny", options_for("quest:token_budget=512", 2), {});
  const std::vector<GenerateRequest> requests = requests_of({100, 400});
  const auto expected = generate(dense, nullptr, requests, {});
  const auto found = generate(quest, nullptr, requests, {});
  for (std::size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(found[i].ids, expected[i].ids);
  for (const AttentionTotals& layer : quest.attention_totals()) {
    EXPECT_EQ(layer.sparse_steps, 0);
    EXPECT_EQ(layer.kv_bytes, layer.dense_bytes);
  }
}

}  // namespace
}  // namespace vesper
