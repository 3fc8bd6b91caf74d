// What vesper eval guarantee and the layers of vesper eval fidelity measure: on seeded models against direct
// computation, and where a promise must break.
#include "engine/eval_guarantee.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "engine/core/error.h"
#include "engine/core/philox.h"
#include "tests/engine/device.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

constexpr const char* kTiny = "synthetic:tiny";  // 3 layers, the last with sparse attention; 4 heads, 2 KV heads
constexpr int kContext = 400;
constexpr int kLast = 3;

EngineOptions options_for(const std::string& attention, int max_context = kContext) {
  EngineOptions options;
  options.limits.device = kTestDevice;
  options.limits.max_context = max_context;
  options.limits.prefill_chunk = 1024;
  options.attention = attention;
  options.seed = 5;
  return options;
}

std::vector<TokenIds> random_windows(int windows) {
  TokenIds ids;
  for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(windows * (kContext + 1)); ++i) {
    ids.push_back(static_cast<std::int32_t>(philox({{i, 0, 0, 0}}, {{1, 0}}).word[0] % 512U));
  }
  return cut_windows(ids, {.context = kContext, .windows = windows, .offsets = {}, .bos_id = -1}, "random ids");
}

std::vector<float> logits_of(Engine& engine, std::span<const TokenIds> windows) {
  return decode_logits(engine, windows, kLast, {});
}

const std::vector<std::string> kSpecs = {
    "quest:token_budget=64",
    "twilight:top_p=0.8",
    "vattention:pilot=32,sink_tokens=8,window_tokens=8,epsilon=0.2,delta=0.2",
};

using ProbeTest = DeviceTest;

TEST_F(ProbeTest, LeavesEveryBitOfTheDecodeAsItIs) {
  const std::vector<TokenIds> windows = random_windows(2);
  for (const std::string& spec : kSpecs) {
    Engine engine(kTiny, options_for(spec), {});
    const std::vector<float> before = logits_of(engine, windows);
    int looks = 0;
    {
      AttentionFidelity fidelity(engine);
      const ProbeScope scope(engine, [&](const Exec& exec, const AttendedLayer& layer) {
        ++looks;
        fidelity.look(exec, layer);
      });
      EXPECT_EQ(logits_of(engine, windows), before) << spec;
    }
    EXPECT_EQ(looks, 2 * kLast * engine.config().layers) << spec;
    EXPECT_EQ(logits_of(engine, windows), before) << spec << ", after the probe is gone";
    EXPECT_EQ(looks, 2 * kLast * engine.config().layers) << spec << ": a probe that is gone has looked";
  }
}

// The tokens on each KV head's list.
std::vector<std::set<std::int32_t>> listed_tokens(const Exec& exec, const AttentionShape& shape,
                                                  const AttendedLayer& layer) {
  const auto index = read_back(exec, layer.list.index);
  const auto count = read_back(exec, layer.list.count);
  const auto capacity = static_cast<std::size_t>(layer.list.index.shape(2));
  const std::int32_t kv_len = layer.batch.host_kv_len[0];
  const int entry_tokens = layer.list.unit == SelectionUnit::kPages ? shape.page_tokens : 1;
  std::vector<std::set<std::int32_t>> listed(static_cast<std::size_t>(shape.kv_heads));
  for (std::size_t g = 0; g < listed.size(); ++g) {
    const auto entries = static_cast<std::size_t>(count[g]);
    for (const std::int32_t entry : std::span(index).subspan(g * capacity, entries)) {
      const std::int32_t first = entry * entry_tokens;
      for (std::int32_t t = first; t < std::min(kv_len, first + entry_tokens); ++t) listed[g].insert(t);
    }
  }
  return listed;
}

// One layer's step as fp64 sees it, from the cache's own tiles.
struct ExpectedStep {
  std::vector<double> error, kept_mass;  // [heads]
  std::vector<double> kept_share;        // [kv_heads]
};

ExpectedStep expected_step(const Exec& exec, const AttentionShape& shape, const AttendedLayer& layer) {
  const std::vector<float> q = read_floats(exec, layer.q);
  const std::vector<float> out = read_floats(exec, layer.out);
  const std::vector<float> k = read_floats(exec, layer.kv.k);
  const std::vector<float> v = read_floats(exec, layer.kv.v);
  const std::int32_t kv_len = layer.batch.host_kv_len[0];
  const int page_count = (kv_len + shape.page_tokens - 1) / shape.page_tokens;
  const auto pages = read_back(exec, TensorView<const std::int32_t, 1>(&layer.batch.page_table(0, 0), page_count));
  const std::vector<std::set<std::int32_t>> listed = listed_tokens(exec, shape, layer);
  const auto at = [&](std::int32_t t, std::size_t g, std::size_t d) {
    const auto page = static_cast<std::size_t>(pages[static_cast<std::size_t>(t / shape.page_tokens)]);
    const auto tile_elements = static_cast<std::size_t>(std::int64_t{shape.page_tokens} * shape.head_dim);
    return (page * listed.size() + g) * tile_elements +
           static_cast<std::size_t>(tile_offset(t % shape.page_tokens, static_cast<int>(d), shape.head_dim));
  };
  const auto channels = static_cast<std::size_t>(shape.head_dim);
  ExpectedStep expected;
  for (const auto& tokens : listed) expected.kept_share.push_back(static_cast<double>(tokens.size()) / kv_len);
  for (std::size_t h = 0; h < static_cast<std::size_t>(shape.heads); ++h) {
    const std::size_t g = h / static_cast<std::size_t>(shape.group());
    double mass = 0.0;
    double kept = 0.0;
    std::vector<double> dense(channels);
    for (std::int32_t t = 0; t < kv_len; ++t) {
      double score = 0.0;
      for (std::size_t d = 0; d < channels; ++d) {
        score += static_cast<double>(q[h * channels + d]) * static_cast<double>(k[at(t, g, d)]);
      }
      const double weight = std::exp(score * static_cast<double>(shape.scale));
      mass += weight;
      if (listed[g].contains(t)) kept += weight;
      for (std::size_t d = 0; d < channels; ++d) dense[d] += weight * static_cast<double>(v[at(t, g, d)]);
    }
    double apart = 0.0;
    double norm = 0.0;
    for (std::size_t d = 0; d < channels; ++d) {
      const double exact = dense[d] / mass;
      const double off = static_cast<double>(out[h * channels + d]) - exact;
      apart += off * off;
      norm += exact * exact;
    }
    expected.error.push_back(std::sqrt(apart / norm));
    expected.kept_mass.push_back(kept / mass);
  }
  return expected;
}

TEST_F(ProbeTest, ErrorMassAndShareAreThoseOfTheFormula) {
  const std::vector<TokenIds> windows = random_windows(1);
  // Sums of 400 terms in fp32; on CUDA the dense output that is compared with is rounded to 16 bits too.
  const double bound = kTestDevice == DeviceKind::kCuda ? 0x1p-7 : 1e-5;
  for (const std::string& spec : kSpecs) {
    Engine engine(kTiny, options_for(spec), {});
    const std::vector<float> logits = logits_of(engine, windows);
    const std::vector<LayerFidelity> found = eval_fidelity(engine, windows, kLast, logits, {}).layers;
    ASSERT_EQ(found.size(), 3U);
    for (const std::size_t l : {0U, 1U}) {
      EXPECT_EQ(found[l].backend, "dense");
      EXPECT_EQ(found[l].sparse_steps, 0);
      EXPECT_EQ(found[l].error, (std::vector<std::vector<double>>(4, {0.0, 0.0, 0.0})));
      EXPECT_EQ(found[l].kept_mass, (std::vector<std::vector<double>>(4, {1.0, 1.0, 1.0})));
    }
    EXPECT_EQ(found[2].backend, spec.substr(0, spec.find(':')));
    EXPECT_EQ(found[2].steps, kLast);
    EXPECT_EQ(found[2].sparse_steps, kLast);

    std::size_t step = 0;
    double largest = 0.0;
    const ProbeScope scope(engine, [&](const Exec& exec, const AttendedLayer& layer) {
      if (layer.number != 2) return;
      const ExpectedStep expected = expected_step(exec, engine.attention_limits().shape, layer);
      for (std::size_t h = 0; h < 4; ++h) {
        EXPECT_NEAR(found[2].error[h][step], expected.error[h], bound) << spec << ", step " << step << ", head " << h;
        EXPECT_NEAR(found[2].kept_mass[h][step], expected.kept_mass[h], bound) << spec << ", step " << step;
        largest = std::max(largest, expected.error[h]);
      }
      for (std::size_t g = 0; g < 2; ++g) EXPECT_EQ(found[2].kept_share[g][step], expected.kept_share[g]) << spec;
      ++step;
    });
    (void)logits_of(engine, windows);
    EXPECT_EQ(step, static_cast<std::size_t>(kLast));
    EXPECT_GT(largest, bound) << spec << ": nothing was lost, so nothing was shown";
  }
}

TEST_F(ProbeTest, DenseStepsOfASparseLayerAreExact) {
  Engine engine(kTiny, options_for("quest:token_budget=512"), {});
  const std::vector<TokenIds> windows = random_windows(1);
  const LayerFidelity layer = eval_fidelity(engine, windows, kLast, logits_of(engine, windows), {}).layers[2];
  EXPECT_EQ(layer.backend, "quest");
  EXPECT_EQ(layer.steps, kLast);
  EXPECT_EQ(layer.sparse_steps, 0);
  EXPECT_EQ(layer.error[0], (std::vector<double>{0.0, 0.0, 0.0}));
  EXPECT_EQ(layer.kept_share[0], (std::vector<double>{1.0, 1.0, 1.0}));
}

// Trials of all heads.
HeadTrials pooled(const GuaranteeTrials& trials) {
  HeadTrials all;
  for (const HeadTrials& head : trials.heads) all.add(head);
  return all;
}

std::vector<GuaranteeLayer> tiny_guarantee(const std::string& settings, int seeds, int windows = 1,
                                           const Progress& progress = {}) {
  Engine engine(kTiny, options_for("vattention:pilot=32,sink_tokens=8,window_tokens=8,top_k_by=oracle," + settings),
                {});
  return eval_guarantee(engine, random_windows(windows), {.last = kLast, .seeds = seeds}, progress);
}

using GuaranteeTest = DeviceTest;

TEST_F(GuaranteeTest, CountsEveryTrialAndIsTheSameAgain) {
  constexpr int kSeeds = 70;  // more than are run at once
  std::int64_t done = 0;
  const auto first =
      tiny_guarantee("epsilon=0.1,delta=0.1,verify=denominator", kSeeds, 2, [&](std::int64_t now, std::int64_t total) {
        EXPECT_EQ(total, 2 * kLast * kSeeds);
        EXPECT_GT(now, done);
        done = now;
      });
  EXPECT_EQ(done, 2 * kLast * kSeeds);
  ASSERT_EQ(first.size(), 1U);
  EXPECT_EQ(first[0].number, 2);
  const GuaranteeTrials& trials = first[0].configured();
  ASSERT_EQ(trials.heads.size(), 4U);
  for (const HeadTrials& head : trials.heads) {
    EXPECT_EQ(head.all.trials, 2 * kLast * kSeeds);
    EXPECT_EQ(head.sampled.trials, head.all.trials);
    EXPECT_EQ(head.sampled.denominator, head.all.denominator);
  }
  EXPECT_EQ(trials.lists, 2 * 2 * kLast * kSeeds);
  EXPECT_EQ(trials.sample_shares.size(), static_cast<std::size_t>(trials.lists));
  EXPECT_EQ(trials.bias.count(), trials.lists);
  EXPECT_EQ(trials.instances, 2 * kLast * 4);
  EXPECT_NE(trials.bias.mean(), 0.0);
  EXPECT_GT(trials.bias.variance(), 0.0) << "all draws were the same";

  const auto again = tiny_guarantee("epsilon=0.1,delta=0.1,verify=denominator", kSeeds, 2);
  EXPECT_EQ(again[0].configured().bias.mean(), trials.bias.mean());
  EXPECT_EQ(again[0].configured().sample_shares, trials.sample_shares);
  const auto other = tiny_guarantee("epsilon=0.1,delta=0.1,verify=denominator,seed=9", kSeeds, 2);
  EXPECT_NE(other[0].configured().bias.mean(), trials.bias.mean());
}

// At so wide an epsilon every sample is the pilot: its size depends on nothing, so the estimate has no bias, and its
// error is as wide as the formula.
TEST_F(GuaranteeTest, APilotAloneIsUnbiasedAndAsWideAsTheFormula) {
  const auto layers = tiny_guarantee("epsilon=0.99,delta=0.2,verify=denominator,on_outlier=report", 400);
  const GuaranteeTrials& trials = layers[0].configured();
  for (const double share : trials.sample_shares) EXPECT_LT(share, 0.11);
  EXPECT_EQ(trials.deviate.count(), 4 * kLast * 400);
  EXPECT_LT(std::abs(trials.bias.mean()), 4.0 * trials.bias.standard_error());
  // Heads of a group share their draws, so their errors may go together: half of the trials are independent.
  EXPECT_NEAR(trials.deviate.variance(), 1.0, 4.0 * std::sqrt(2.0 / (2.0 * kLast * 400)));
  EXPECT_EQ(pooled(trials).all.denominator, 0);
}

TEST_F(GuaranteeTest, ExactTrialsAreCountedApart) {
  const auto whole = tiny_guarantee("epsilon=0.01,delta=0.01,safety=100", 5);
  EXPECT_EQ(whole[0].configured().whole_lists, whole[0].configured().lists);
  EXPECT_EQ(pooled(whole[0].configured()).sampled.trials, 0);
  EXPECT_EQ(pooled(whole[0].configured()).all.trials, 4 * kLast * 5);
  EXPECT_EQ(pooled(whole[0].configured()).all.denominator, 0);
  EXPECT_EQ(whole[0].configured().instances, 0);
  EXPECT_EQ(whole[0].configured().kept_tokens, whole[0].configured().visible_tokens);

  const auto too_short = tiny_guarantee("dense_below=400", 5);
  EXPECT_EQ(too_short[0].configured().short_lists, 2 * kLast * 5);
  EXPECT_EQ(too_short[0].configured().lists, 2 * kLast * 5);
  EXPECT_EQ(pooled(too_short[0].configured()).all.trials, 4 * kLast * 5);
  EXPECT_EQ(pooled(too_short[0].configured()).sampled.trials, 0);
}

TEST_F(GuaranteeTest, RefusesAConfigurationThatPromisesNothing) {
  try {
    check_guarantee(parse_attention("quest", 3), "quest");
    FAIL() << "quest makes no promise";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput);
    EXPECT_NE(std::string(error.what()).find("--attention quest"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("use --attention vattention"), std::string::npos) << error.what();
  }
}

// On trained weights attention is peaked: without a top-k stage, a short pilot sees too little of what it must judge,
// and the promise breaks on the denominator. Exact top-k and escalation each mend most of it.
TEST_F(GuaranteeTest, FindsThePromiseBrokenWithoutTopK) {
  const std::string demo = source_dir() + "/configs/demo";
  const TokenIds ids = read_u16_ids(demo + "/questions/ids_4096.u16");
  const std::vector<TokenIds> windows =
      cut_windows(ids, {.context = 2048, .windows = 1, .offsets = {}, .bos_id = -1}, "the demo's questions");
  constexpr int kSeeds = 60;
  const auto misses = [&](const std::string& top_k_by) {
    Engine engine(demo,
                  options_for("vattention:epsilon=0.1,delta=0.1,pilot=128,sink_tokens=16,window_tokens=16,safety=1,"
                              "verify=denominator,on_outlier=report,top_k_by=" +
                                  top_k_by,
                              2048),
                  {});
    GuaranteeTrials report;
    GuaranteeTrials escalate;
    for (const GuaranteeLayer& layer : eval_guarantee(engine, windows, {.last = 1, .seeds = kSeeds}, {})) {
      report.add(layer.report);
      escalate.add(layer.escalate);
    }
    EXPECT_GT(report.guard_hits, 0) << top_k_by;
    EXPECT_GT(escalate.kept_tokens, report.kept_tokens) << top_k_by << ": escalation costs tokens";
    EXPECT_LT(pooled(escalate).all.denominator, pooled(report).all.denominator) << top_k_by;
    return pooled(report).all;
  };
  const Misses none = misses("none");
  const Misses oracle = misses("oracle");
  ASSERT_EQ(none.trials, 6 * 4 * kSeeds);
  EXPECT_GT(static_cast<double>(none.denominator), 1.5 * static_cast<double>(oracle.denominator));
  EXPECT_GT(clopper_pearson_upper(none.denominator, none.trials, 0.95), 0.1) << none.denominator;
  EXPECT_LT(clopper_pearson_upper(oracle.denominator, oracle.trials, 0.95), 0.1) << oracle.denominator;
}

}  // namespace
}  // namespace vesper
