// Decode steps recorded as graphs against the same steps launched one by one: every bit, at several lengths of one
// bucket and over a bucket's border, for every backend. On the CPU both engines run the same code.
#include <gtest/gtest.h>

#include <array>
#include <random>

#include "engine/engine.h"
#include "tests/engine/device.h"

namespace vesper {
namespace {

constexpr int kSeqs = 2;
constexpr std::array kLengths = {490, 300};  // the longer one crosses 512, the smallest bucket's end
constexpr int kSteps = 40;

std::vector<std::int32_t> random_ids(int count, unsigned seed, int vocab) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> ids;
  for (int i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab)));
  return ids;
}

// An engine with two sequences in it.
struct Fed {
  Engine engine;
  std::array<CachedSequence, kSeqs> sequences;
  std::array<CachedSequence*, kSeqs> both = {&sequences[0], &sequences[1]};

  Fed(const std::string& attention, bool graphs) : engine("synthetic:tiny", options(attention, graphs), {}) {
    for (std::size_t s = 0; s < kSeqs; ++s) {
      sequences[s].request = static_cast<std::int32_t>(s);
      if (!engine.reserve(sequences[s], kLengths[s] + 2 * kSteps)) ADD_FAILURE() << "too few pages";
      engine.prefill(sequences[s], random_ids(kLengths[s], static_cast<unsigned>(s), engine.config().vocab));
    }
    engine.reset_attention_totals();
  }

  static EngineOptions options(const std::string& attention, bool graphs) {
    EngineOptions options;
    options.limits.device = kTestDevice;
    options.limits.max_context = 1024;
    options.limits.max_seqs = kSeqs;
    options.attention = attention;
    options.graphs = graphs;
    options.seed = 3;
    return options;
  }

  std::vector<float> logits() {
    std::vector<float> out(static_cast<std::size_t>(kSeqs * engine.config().vocab));
    const std::array<std::int32_t, kSeqs> rows = {0, 1};
    engine.read_logits(rows, out);
    return out;
  }
};

class GraphsTest : public DeviceTest, public testing::WithParamInterface<const char*> {};

TEST_P(GraphsTest, AReplayedStepIsTheEagerStepBitForBit) {
  Fed eager(GetParam(), false);
  Fed replayed(GetParam(), true);
  const int vocab = eager.engine.config().vocab;
  for (int step = 0; step < kSteps; ++step) {
    const std::vector<std::int32_t> ids = random_ids(kSeqs, static_cast<unsigned>(100 + step), vocab);
    eager.engine.decode(eager.both, ids);
    replayed.engine.decode(replayed.both, ids);
    const std::vector<float> expected = eager.logits();
    const std::vector<float> found = replayed.logits();
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(found[i], expected[i]) << "step " << step << ", logit " << i;
    }
  }
  const std::vector<AttentionTotals> expected = eager.engine.attention_totals();
  const std::vector<AttentionTotals> found = replayed.engine.attention_totals();
  for (std::size_t l = 0; l < expected.size(); ++l) {
    EXPECT_EQ(found[l].steps, expected[l].steps) << "layer " << l;
    EXPECT_EQ(found[l].lists, expected[l].lists) << "layer " << l;
    EXPECT_EQ(found[l].kept_tokens, expected[l].kept_tokens) << "layer " << l;
    EXPECT_EQ(found[l].kv_bytes, expected[l].kv_bytes) << "layer " << l;
    EXPECT_EQ(found[l].metadata_bytes, expected[l].metadata_bytes) << "layer " << l;
  }
  EXPECT_EQ(eager.engine.captured_graphs(), 0);
  // One a bucket, and in the first one more where the shorter sequence grows over a threshold at 310.
  const bool threshold = std::string(GetParam()).find("dense_below=310") != std::string::npos;
  EXPECT_EQ(replayed.engine.captured_graphs(), kTestDevice == DeviceKind::kCpu ? 0 : threshold ? 3 : 2);
}

TEST_P(GraphsTest, DrawsInsideTheGraphAreTheDrawsAfterIt) {
  Fed eager(GetParam(), false);
  Fed replayed(GetParam(), true);
  replayed.engine.capture_ahead(kSeqs, kLengths[0] + 1, kLengths[0] + kSteps);
  const int ahead = replayed.engine.captured_graphs();
  const std::array<SamplingParams, kSeqs> params = {SamplingParams{},
                                                    SamplingParams{.temperature = 0.8F, .seed = 7, .request = 1}};
  std::vector<std::int32_t> ids = {1, 2};
  for (std::int32_t step = 0; step < kSteps; ++step) {
    const std::array<std::int32_t, kSeqs> steps = {step, step};
    const std::array<std::int32_t, kSeqs> rows = {0, 1};
    eager.engine.decode(eager.both, ids);
    (void)eager.engine.logits(rows);
    const auto expected = eager.engine.sample(params, steps);
    const auto found = replayed.engine.decode_and_sample(replayed.both, ids, params, steps);
    ASSERT_TRUE(std::equal(found.begin(), found.end(), expected.begin())) << "step " << step;
    ids.assign(found.begin(), found.end());
  }
  if (std::string(GetParam()).find("dense_below") == std::string::npos) {
    EXPECT_EQ(replayed.engine.captured_graphs(), ahead) << "a step had to record its own graph";
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, GraphsTest,
                         testing::Values("dense", "quest:token_budget=64", "quest:token_budget=64,dense_below=310",
                                         "quest:token_budget=0.1,page_score=mean_std",
                                         "quest:token_budget=64,bounds=int8", "twilight:top_p=0.8",
                                         "twilight:top_p=0.8,base=dense",
                                         "vattention:pilot=32,sink_tokens=8,window_tokens=8,epsilon=0.4,delta=0.2",
                                         "vattention:pilot=32,sink_tokens=8,window_tokens=8,top_k_by=oracle"),
                         [](const auto& tested) {
                           std::string name;
                           for (const char* c = tested.param; *c != '\0'; ++c) {
                             name += std::isalnum(static_cast<unsigned char>(*c)) != 0 ? *c : '_';
                           }
                           return name;
                         });

}  // namespace
}  // namespace vesper
