#include "engine/compare.h"

#include <algorithm>
#include <array>
#include <chrono>

#include "engine/core/error.h"
#include "engine/generate.h"
#include "engine/statistics.h"
#include "engine/stop_filter.h"

namespace vesper {
namespace {

using Clock = std::chrono::steady_clock;

// One greedy decode step; the time of it is added to `seconds`.
std::int32_t step(Engine& engine, CachedSequence& sequence, std::int32_t id, std::vector<double>& seconds) {
  const Clock::time_point begin = Clock::now();
  const std::array<CachedSequence*, 1> sequences = {&sequence};
  const std::int32_t step_number = 0;
  const SamplingParams greedy;
  const std::int32_t next = engine.decode_and_sample(sequences, {&id, 1}, {&greedy, 1}, {&step_number, 1})[0];
  seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
  return next;
}

CompareResult run_arm(Engine& engine, const Tokenizer& tokenizer, const CompareRequest& request,
                      CachedSequence& sequence) {
  CompareResult result;
  std::vector<double> seconds;
  StreamingDecoder decoder(tokenizer, true);
  StopFilter stops(request.stop);
  engine.reset_attention_totals();
  engine.capture_ahead(1, sequence.length + 1, static_cast<int>(request.prompt.size()) + request.max_tokens - 1);
  std::int32_t next = 0;
  for (std::size_t at = static_cast<std::size_t>(sequence.length); at < request.prompt.size(); ++at) {
    next = step(engine, sequence, request.prompt[at], seconds);
  }
  const std::vector<int>& eos = engine.config().eos_ids;
  for (;;) {
    result.ids.push_back(next);
    if (std::find(eos.begin(), eos.end(), next) != eos.end()) break;
    result.text += stops.push(decoder.push(next));
    if (stops.stopped() || static_cast<int>(result.ids.size()) == request.max_tokens) break;
    next = step(engine, sequence, next, seconds);
  }
  if (!stops.stopped()) result.text += stops.push(decoder.finish());
  if (!stops.stopped()) result.text += stops.finish();
  result.step_seconds = quantile(seconds, 0.5);
  result.totals = engine.attention_totals();
  return result;
}

}  // namespace

std::vector<CompareResult> compare_attention(Engine& engine, int arms, const Tokenizer& tokenizer,
                                             const CompareRequest& request,
                                             const std::function<void(int done, int total)>& on_prefill) {
  GenerateRequest whole;
  whole.prompt = request.prompt;
  whole.max_tokens = request.max_tokens;
  check_requests(engine.config(), engine.memory(), {&whole, 1});

  const int prompt = static_cast<int>(request.prompt.size());
  const int prefilled = std::clamp(prompt - std::max(1, request.decode_last), 0, prompt);
  const std::span<const std::int32_t> ids(request.prompt);
  CachedSequence sequence;
  const auto reserve = [&] {
    if (!engine.reserve(sequence, prompt + request.max_tokens)) {
      fail({"reserving KV pages", "too few", "what check_requests counted", ""});
    }
  };
  reserve();
  sequence.prompt_length = prefilled;
  for (int at = 0; at < prefilled;) {
    const int count = std::min(engine.memory().limits.prefill_chunk, prefilled - at);
    engine.prefill(sequence, ids.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count)));
    at += count;
    engine.synchronize();
    if (on_prefill) on_prefill(at, prefilled);
  }
  std::vector<CompareResult> results;
  for (int arm = 0; arm < arms; ++arm) {
    engine.use_attention(arm);
    engine.truncate(sequence, prefilled);
    reserve();
    results.push_back(run_arm(engine, tokenizer, request, sequence));
  }
  engine.truncate(sequence, 0);
  engine.use_attention(0);
  return results;
}

}  // namespace vesper
