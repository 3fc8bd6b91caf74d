// The engine on a tiny seeded model: prefill, chunks and decode agree; batches change nothing; pages come back.
#include "engine/engine.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "engine/core/error.h"
#include "engine/core/philox.h"
#include "engine/generate.h"
#include "tests/engine/device.h"

namespace vesper {
namespace {

EngineOptions tiny_options(int max_context, int max_seqs, int prefill_chunk = 2048) {
  EngineOptions options;
  options.limits.device = kTestDevice;
  options.limits.max_context = max_context;
  options.limits.max_seqs = max_seqs;
  options.limits.prefill_chunk = prefill_chunk;
  options.seed = 5;
  return options;
}

constexpr const char* kTiny = "synthetic:tiny";

std::vector<std::int32_t> random_ids(int count, std::uint32_t seed, int vocab) {
  std::vector<std::int32_t> ids;
  for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(count); ++i) {
    ids.push_back(
        static_cast<std::int32_t>(philox({{i, 0, 0, 0}}, {{seed, 0}}).word[0] % static_cast<unsigned>(vocab)));
  }
  return ids;
}

// Logits of every position, the prompt being fed in steps of `chunk` tokens and its last `decode_last` ones by decode.
std::vector<float> all_logits(Engine& engine, const std::vector<std::int32_t>& ids, int chunk, int decode_last) {
  const int tokens = static_cast<int>(ids.size());
  const auto vocab = static_cast<std::size_t>(engine.config().vocab);
  CachedSequence sequence;
  EXPECT_TRUE(engine.reserve(sequence, tokens));
  std::vector<float> logits(ids.size() * vocab);
  for (int at = 0; at < tokens;) {
    const bool prefill = at < tokens - decode_last;
    const int count = prefill ? std::min(chunk, tokens - decode_last - at) : 1;
    const auto step = std::span(ids).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count));
    const std::array<CachedSequence*, 1> sequences = {&sequence};
    prefill ? engine.prefill(sequence, step) : engine.decode(sequences, step);
    for (int row = 0; row < count; ++row) {
      const std::int32_t wanted = row;
      engine.read_logits({&wanted, 1}, std::span(logits).subspan(static_cast<std::size_t>(at + row) * vocab, vocab));
    }
    at += count;
  }
  engine.truncate(sequence, 0);
  return logits;
}

double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0.0;
  double size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += a[i] * a[i];
  }
  return std::sqrt(difference / size);
}

// How far two orders of the same sums may drift apart, as a share of the logits' norm: each of some ten roundings a
// layer adds one unit of the activations' type, at worst all in one direction.
double order_tolerance(const Engine& engine) {
  const double unit = kTestDevice == DeviceKind::kCuda ? 0x1p-8 : 0x1p-23;
  return 10.0 * engine.config().layers * unit;
}

using EngineTest = DeviceTest;

TEST_F(EngineTest, PrefillChunksAndDecodeAgree) {
  Engine engine(kTiny, tiny_options(256, 1), {});
  const std::vector<std::int32_t> ids = random_ids(150, 1, engine.config().vocab);
  const std::vector<float> whole = all_logits(engine, ids, 2048, 0);
  for (const float logit : whole) ASSERT_TRUE(std::isfinite(logit));
  EXPECT_LT(relative_difference(whole, all_logits(engine, ids, 37, 0)), order_tolerance(engine)) << "chunks of 37";
  EXPECT_LT(relative_difference(whole, all_logits(engine, ids, 16, 0)), order_tolerance(engine)) << "chunks of 16";
  EXPECT_LT(relative_difference(whole, all_logits(engine, ids, 64, 70)), order_tolerance(engine)) << "decode from 80";
  EXPECT_LT(relative_difference(whole, all_logits(engine, ids, 64, 150)), order_tolerance(engine)) << "all by decode";
}

// The same through 4-bit weights, the head's included; on CUDA chunks of 37 take dequantised panels, whose weights are
// rounded once more, and the others the packed codes.
TEST_F(EngineTest, Int4WeightsAgreeHoweverTheyAreFed) {
  EngineOptions options = tiny_options(256, 1);
  options.weights = WeightFormat::kInt4Head;
  Engine engine(kTiny, options, {});
  EXPECT_LT(engine.memory().parts[0].bytes, Engine(kTiny, tiny_options(256, 1), {}).memory().parts[0].bytes);
  const std::vector<std::int32_t> ids = random_ids(150, 1, engine.config().vocab);
  const std::vector<float> whole = all_logits(engine, ids, 2048, 0);
  for (const float logit : whole) ASSERT_TRUE(std::isfinite(logit));
  EXPECT_LT(relative_difference(whole, all_logits(engine, ids, 37, 0)), order_tolerance(engine)) << "chunks of 37";
  EXPECT_LT(relative_difference(whole, all_logits(engine, ids, 16, 0)), order_tolerance(engine)) << "chunks of 16";
  EXPECT_LT(relative_difference(whole, all_logits(engine, ids, 64, 150)), order_tolerance(engine)) << "all by decode";
}

std::vector<GenerateRequest> ragged_requests(int vocab) {
  std::vector<GenerateRequest> requests;
  for (const int length : {1, 17, 64, 100, 3}) {
    GenerateRequest request;
    request.prompt = random_ids(length, static_cast<std::uint32_t>(length), vocab);
    request.max_tokens = 5 + length % 7;
    request.ignore_eos = true;
    request.sampling.temperature = length % 2 == 0 ? 0.0F : 0.8F;
    request.sampling.request = static_cast<std::uint32_t>(length);
    requests.push_back(request);
  }
  return requests;
}

TEST_F(EngineTest, ABatchGivesEachSequenceWhatItGetsAlone) {
  Engine engine(kTiny, tiny_options(256, 5), {});
  const std::vector<GenerateRequest> requests = ragged_requests(engine.config().vocab);
  const std::vector<GenerateResult> together = generate(engine, nullptr, requests, {});
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(static_cast<int>(together[i].ids.size()), requests[i].max_tokens);
    EXPECT_EQ(together[i].ids.size(), together[i].token_seconds.size() + 1);
    if constexpr (kTestDevice == DeviceKind::kCuda) continue;  // products of other shapes round otherwise there
    const std::vector<GenerateResult> alone = generate(engine, nullptr, {&requests[i], 1}, {});
    EXPECT_EQ(alone[0].ids, together[i].ids) << "request " << i;
  }
}

TEST_F(EngineTest, TheSameRunTwiceGivesTheSameIds) {
  Engine engine(kTiny, tiny_options(256, 5), {});
  const std::vector<GenerateRequest> requests = ragged_requests(engine.config().vocab);
  const std::vector<GenerateResult> first = generate(engine, nullptr, requests, {});
  const std::vector<GenerateResult> second = generate(engine, nullptr, requests, {});
  for (std::size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(first[i].ids, second[i].ids) << "request " << i;
}

TEST_F(EngineTest, PagesComeBack) {
  Engine engine(kTiny, tiny_options(128, 5), {});
  const int pages = engine.free_pages();
  (void)generate(engine, nullptr, ragged_requests(engine.config().vocab), {});
  EXPECT_EQ(engine.free_pages(), pages);
}

TEST_F(EngineTest, AKeptContextGivesWhatARunFromScratchGives) {
  Engine engine(kTiny, tiny_options(256, 1, 32), {});
  const int pages = engine.free_pages();
  const int vocab = engine.config().vocab;
  KeptContext kept;
  GenerateRequest request;
  request.max_tokens = 9;
  request.ignore_eos = true;
  request.prompt = random_ids(50, 1, vocab);
  for (const int more : {21, 3, 40}) {
    GenerateRequest with_kept = request;
    with_kept.kept = &kept;
    const auto common = std::mismatch(kept.ids.begin(), kept.ids.end(), request.prompt.begin(), request.prompt.end());
    const auto reused = static_cast<int>(common.first - kept.ids.begin());
    const GenerateResult result = generate(engine, nullptr, {&with_kept, 1}, {})[0];
    EXPECT_EQ(result.ids, generate(engine, nullptr, {&request, 1}, {})[0].ids) << more;
    EXPECT_EQ(result.reused_tokens, reused);
    EXPECT_EQ(result.prefill_tokens, static_cast<int>(request.prompt.size()) - reused);
    EXPECT_EQ(static_cast<int>(kept.ids.size()), kept.sequence.length) << "all but the last id drawn";
    EXPECT_EQ(engine.free_pages(), pages - engine.pages_for(kept.sequence.length));
    // The next turn: the conversation so far, but for an answer whose end the template rewrites, and a question.
    request.prompt.insert(request.prompt.end(), result.ids.begin(), result.ids.end() - 3);
    const std::vector<std::int32_t> question = random_ids(more, static_cast<std::uint32_t>(more), vocab);
    request.prompt.insert(request.prompt.end(), question.begin(), question.end());
  }
  request.kept = &kept;
  request.prompt = kept.ids;
  EXPECT_EQ(generate(engine, nullptr, {&request, 1}, {})[0].prefill_tokens, 1)
      << "the last token's logits are asked for";
  engine.truncate(kept.sequence, 0);
  EXPECT_EQ(engine.free_pages(), pages);
}

TEST_F(EngineTest, ADecodeStepAllocatesNothing) {
  Engine engine(kTiny, tiny_options(128, 2), {});
  std::array<CachedSequence, 2> sequences;
  const std::array<CachedSequence*, 2> both = {&sequences[0], &sequences[1]};
  for (CachedSequence& sequence : sequences) {
    ASSERT_TRUE(engine.reserve(sequence, 64));
    const std::vector<std::int32_t> prompt = random_ids(30, 3, engine.config().vocab);
    engine.prefill(sequence, prompt);
  }
  const std::array<std::int32_t, 2> ids = {7, 8};
  const std::array<std::int32_t, 2> rows = {0, 1};
  const std::array<SamplingParams, 2> params = {};
  const auto step = [&] {
    engine.decode(both, ids);
    (void)engine.logits(rows);
    (void)engine.sample(params, rows);
    (void)engine.decode_and_sample(both, ids, params, rows);
  };
  step();
  const auto taken = [] {
    return allocation_count(Memory::kHost).allocations + allocation_count(Memory::kPinned).allocations +
           allocation_count(Memory::kDevice).allocations;
  };
  const std::int64_t before = taken();
  for (int i = 0; i < 10; ++i) step();  // graphs are recorded by now
  EXPECT_EQ(taken(), before);
}

TEST_F(EngineTest, HoldsWhatItsPlanSays) {
  const auto live = [] { return allocation_count(memory_of(kTestDevice)).live_bytes; };
  const std::int64_t before = live();
  const Engine engine(kTiny, tiny_options(512, 3), {});
  const std::int64_t held = live() - before;
  const std::int64_t planned = engine.memory().total_bytes;
  EXPECT_LE(std::abs(held - planned), planned / 100 + 65536) << "held " << held << ", planned " << planned;
}

std::string refusal(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput);
    return error.what();
  }
  return "";
}

TEST_F(EngineTest, CountsTheFlopsOfAPrompt) {
  const Engine engine(kTiny, tiny_options(64, 1), {});
  // A layer: q, k, v, o of 4 heads of 64 with 2 KV heads, and the ffn of 704; then 55 pairs a query head.
  constexpr std::int64_t kWeights = 256 * (2 * 256 + 2 * 128 + 3 * 704);
  EXPECT_EQ(engine.prefill_flops(10), 3 * (2 * 10 * kWeights + 4 * 64 * 4 * 55) + 2 * 256 * 512);
}

TEST_F(EngineTest, RefusesWhatDoesNotFitWithBothNumbers) {
  Engine engine(kTiny, tiny_options(64, 2), {});
  GenerateRequest request;
  request.prompt = random_ids(60, 1, engine.config().vocab);
  request.max_tokens = 5;
  const std::string too_long = refusal([&] { (void)generate(engine, nullptr, {&request, 1}, {}); });
  EXPECT_NE(too_long.find("65 in all"), std::string::npos) << too_long;
  EXPECT_NE(too_long.find("at most 64 (--max-context)"), std::string::npos) << too_long;

  request.max_tokens = 4;
  const std::vector<GenerateRequest> three(3, request);
  const std::string too_many = refusal([&] { (void)generate(engine, nullptr, three, {}); });
  EXPECT_NE(too_many.find("12 KV pages"), std::string::npos) << too_many;
  EXPECT_NE(too_many.find("at most 8"), std::string::npos) << too_many;

  request.prompt[3] = engine.config().vocab;
  const std::string unknown = refusal([&] { (void)generate(engine, nullptr, {&request, 1}, {}); });
  EXPECT_NE(unknown.find("the id " + std::to_string(engine.config().vocab)), std::string::npos) << unknown;
  EXPECT_NE(refusal([] {
              (void)plan_engine_memory(kTiny, model_config_of(kTiny), tiny_options(1 << 24, 4096));
            }).find("lower --max-context or the number of sequences"),
            std::string::npos);
}

TEST_F(EngineTest, EndsAtEosAndKeepsOthersGoing) {
  Engine engine(kTiny, tiny_options(128, 2), {});
  GenerateRequest request;
  request.prompt = random_ids(9, 2, engine.config().vocab);
  request.max_tokens = 20;
  request.ignore_eos = true;
  const std::vector<GenerateResult> free_run = generate(engine, nullptr, {&request, 1}, {});
  EXPECT_EQ(free_run[0].finish, FinishReason::kLength);
  int steps = 0;
  GenerateHooks hooks;
  hooks.interrupted = [&] { return ++steps > 5; };
  const std::vector<GenerateRequest> two(2, request);
  const std::vector<GenerateResult> stopped = generate(engine, nullptr, two, hooks);
  for (const GenerateResult& result : stopped) {
    EXPECT_EQ(result.finish, FinishReason::kInterrupted);
    EXPECT_LT(result.ids.size(), 20U);
    ASSERT_FALSE(result.ids.empty());
    EXPECT_TRUE(std::equal(result.ids.begin(), result.ids.end(), free_run[0].ids.begin()));
  }
}

}  // namespace
}  // namespace vesper
