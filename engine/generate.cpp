#include "engine/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "engine/core/error.h"
#include "engine/stop_filter.h"

namespace vesper {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A request on its way.
struct Running {
  int number = 0;
  const GenerateRequest* request = nullptr;
  CachedSequence own_sequence;                // unused where a context is kept
  std::unique_ptr<StreamingDecoder> decoder;  // null without a tokenizer
  StopFilter stops;
  Clock::time_point last_token;
  double decode_bytes = 0.0;
  int decode_steps = 0;
  bool finished = false;
  GenerateResult result;

  CachedSequence& sequence() { return request->kept != nullptr ? request->kept->sequence : own_sequence; }
};

// How many of the prompt's tokens the kept context can stand for. The last one is fed in any case: its logits are asked
// for.
int reusable_tokens(const GenerateRequest& request) {
  if (request.kept == nullptr) return 0;
  const std::vector<std::int32_t>& ids = request.kept->ids;
  const auto differs = std::mismatch(request.prompt.begin(), request.prompt.end() - 1, ids.begin(), ids.end());
  return static_cast<int>(differs.first - request.prompt.begin());
}

class Generation {
 public:
  Generation(Engine& engine, const Tokenizer* tokenizer, std::span<const GenerateRequest> requests,
             const GenerateHooks& hooks)
      : engine_(engine), tokenizer_(tokenizer), hooks_(hooks), start_(Clock::now()) {
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Running running;
      running.number = static_cast<int>(i);
      running.request = &requests[i];
      CachedSequence& sequence = running.sequence();
      running.result.reused_tokens = reusable_tokens(requests[i]);
      engine_.truncate(sequence, running.result.reused_tokens);
      if (requests[i].kept != nullptr) requests[i].kept->ids.resize(static_cast<std::size_t>(sequence.length));
      sequence.request = static_cast<std::int32_t>(requests[i].sampling.request);
      running.stops = StopFilter(requests[i].stop);
      running.result.prompt_tokens = static_cast<int>(requests[i].prompt.size());
      if (tokenizer != nullptr) running.decoder = std::make_unique<StreamingDecoder>(*tokenizer, true);
      const bool reserved = engine_.reserve(sequence, running.result.prompt_tokens + requests[i].max_tokens);
      if (!reserved) fail({"reserving KV pages", "too few", "what check_requests counted", ""});
      running_.push_back(std::move(running));
    }
  }

  std::vector<GenerateResult> run() {
    capture_ahead();
    for (Running& running : running_) prefill(running);
    for (std::vector<Running*> active = unfinished(); !active.empty(); active = unfinished()) decode(active);
    std::vector<GenerateResult> results;
    results.reserve(running_.size());
    for (Running& running : running_) results.push_back(std::move(running.result));
    return results;
  }

 private:
  // What the batch runs until its first sequence ends.
  void capture_ahead() {
    const auto seqs = static_cast<int>(running_.size());
    int longest = 0;
    int last = INT32_MAX;
    for (const Running& running : running_) {
      longest = std::max(longest, running.result.prompt_tokens);
      last = std::min(last, running.request->max_tokens - 1);
    }
    engine_.capture_ahead(seqs, longest + 1, longest + last);
  }

  bool interrupted() {
    if (!interrupted_ && hooks_.interrupted && hooks_.interrupted()) interrupted_ = true;
    return interrupted_;
  }

  std::vector<Running*> unfinished() {
    std::vector<Running*> active;
    for (Running& running : running_) {
      if (!running.finished) active.push_back(&running);
    }
    return active;
  }

  // Feeds the prompt, the last decode_last tokens through decode, and draws the first token.
  void prefill(Running& running) {
    const GenerateRequest& request = *running.request;
    const std::span<const std::int32_t> prompt(request.prompt);
    const auto chunk = static_cast<std::size_t>(engine_.memory().limits.prefill_chunk);
    const auto reused = static_cast<std::size_t>(running.result.reused_tokens);
    const std::size_t prefilled = std::max(
        reused, prompt.size() - std::min(prompt.size(), static_cast<std::size_t>(std::max(0, request.decode_last))));
    const Clock::time_point begin = Clock::now();
    running.sequence().prompt_length = static_cast<int>(prefilled);
    std::int32_t last_row = 0;
    for (std::size_t at = reused; at < prompt.size();) {
      if (interrupted()) return finish(running, FinishReason::kInterrupted);
      if (at < prefilled) {
        const std::size_t count = std::min(chunk, prefilled - at);
        engine_.prefill(running.sequence(), prompt.subspan(at, count));
        last_row = static_cast<std::int32_t>(count) - 1;
        at += count;
        if (at == prefilled) engine_.synchronize();
        if (at == prefilled) running.result.prefill_seconds = seconds_since(begin);
      } else {
        CachedSequence* sequence = &running.sequence();
        engine_.decode({&sequence, 1}, prompt.subspan(at, 1));
        last_row = 0;
        ++at;
      }
      if (hooks_.on_prefill) hooks_.on_prefill(running.number, static_cast<int>(at), running.result.prompt_tokens);
    }
    running.result.prefill_tokens = static_cast<int>(prefilled - reused);
    if (request.max_tokens == 0) return finish(running, FinishReason::kLength);
    (void)engine_.logits({&last_row, 1});
    const std::int32_t step = 0;
    const std::int32_t id = engine_.sample({&request.sampling, 1}, {&step, 1})[0];
    running.result.ttft_seconds = seconds_since(start_);
    running.last_token = Clock::now();
    take(running, id);
  }

  // One step of all active sequences.
  void decode(const std::vector<Running*>& active) {
    if (interrupted()) {
      for (Running* running : active) finish(*running, FinishReason::kInterrupted);
      return;
    }
    std::vector<CachedSequence*> sequences;
    std::vector<std::int32_t> ids;
    std::vector<std::int32_t> steps;
    std::vector<SamplingParams> params;
    std::int64_t kv_tokens = 0;
    for (Running* running : active) {
      sequences.push_back(&running->sequence());
      ids.push_back(running->result.ids.back());
      steps.push_back(static_cast<std::int32_t>(running->result.ids.size()));
      params.push_back(running->request->sampling);
      kv_tokens += running->sequence().length + 1;
    }
    const std::span<const std::int32_t> drawn = engine_.decode_and_sample(sequences, ids, params, steps);
    const Clock::time_point now = Clock::now();
    const double bytes = static_cast<double>(engine_.decode_step_bytes(static_cast<int>(active.size()), kv_tokens)) /
                         static_cast<double>(active.size());
    for (std::size_t i = 0; i < active.size(); ++i) {
      Running& running = *active[i];
      running.result.token_seconds.push_back(std::chrono::duration<double>(now - running.last_token).count());
      running.last_token = now;
      running.decode_bytes += bytes;
      ++running.decode_steps;
      take(running, drawn[i]);
    }
  }

  // Adds a drawn token to the answer and ends the sequence where it must end.
  void take(Running& running, std::int32_t id) {
    running.result.ids.push_back(id);
    if (!running.request->ignore_eos && ends(*running.request, id)) return finish(running, FinishReason::kEos);
    if (running.decoder) emit(running, running.stops.push(running.decoder->push(id)));
    if (running.stops.stopped()) return finish(running, FinishReason::kStop);
    if (static_cast<int>(running.result.ids.size()) >= running.request->max_tokens) {
      finish(running, FinishReason::kLength);
    }
  }

  [[nodiscard]] bool ends(const GenerateRequest& request, std::int32_t id) const {
    const auto among = [id](const auto& ids) { return std::find(ids.begin(), ids.end(), id) != ids.end(); };
    return among(engine_.config().eos_ids) || among(request.end_ids);
  }

  void emit(Running& running, const std::string& text) {
    if (text.empty()) return;
    running.result.text += text;
    if (hooks_.on_text) hooks_.on_text(running.number, text);
  }

  void finish(Running& running, FinishReason reason) {
    if (running.decoder && reason != FinishReason::kStop) {
      emit(running, running.stops.push(running.decoder->finish()));
      if (!running.stops.stopped()) emit(running, running.stops.finish());
    }
    running.finished = true;
    running.result.finish = reason;
    if (running.decode_steps > 0) running.result.bytes_per_token = running.decode_bytes / running.decode_steps;
    release(running);
    if (hooks_.on_finish) hooks_.on_finish(running.number, running.result);
  }

  // Gives pages back: all, or of a kept context those that were reserved for tokens that did not come.
  void release(Running& running) {
    KeptContext* kept = running.request->kept;
    CachedSequence& sequence = running.sequence();
    if (kept == nullptr) return engine_.truncate(sequence, 0);
    engine_.truncate(sequence, sequence.length);
    kept->ids = running.request->prompt;
    kept->ids.insert(kept->ids.end(), running.result.ids.begin(), running.result.ids.end());
    kept->ids.resize(static_cast<std::size_t>(sequence.length));
  }

  Engine& engine_;
  const Tokenizer* tokenizer_;
  const GenerateHooks& hooks_;
  Clock::time_point start_;
  std::vector<Running> running_;
  bool interrupted_ = false;
};

}  // namespace

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kInterrupted:
      return "interrupted";
  }
  return "unknown";
}

void check_requests(const ModelConfig& config, const MemoryPlan& plan, std::span<const GenerateRequest> requests) {
  const int max_context = plan.limits.max_context;
  const int page_tokens = plan.limits.page_tokens;
  std::int64_t pages = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const std::string which = requests.size() == 1 ? "the prompt" : fmt::format("prompt {}", i + 1);
    check_token_ids(config, requests[i].prompt, "reading " + which);
    const auto prompt = static_cast<std::int64_t>(requests[i].prompt.size());
    const std::int64_t tokens = prompt + requests[i].max_tokens;
    if (tokens > max_context) {
      const bool cut = plan.context_was_cut;
      refuse({"admitting " + which,
              fmt::format("{} prompt tokens and --max-tokens {}: {} in all", prompt, requests[i].max_tokens, tokens),
              fmt::format("at most {} ({})", max_context, cut ? "what fits in 90 % of free memory" : "--max-context"),
              cut ? "shorten the prompt, lower --max-tokens or the number of prompts, or free memory"
                  : "shorten the prompt, lower --max-tokens or raise --max-context"});
    }
    pages += (tokens + page_tokens - 1) / page_tokens;
  }
  if (pages > plan.kv_pages) {
    refuse({fmt::format("admitting {} prompts", requests.size()), fmt::format("a need of {} KV pages", pages),
            fmt::format("at most {}", plan.kv_pages),
            "send fewer prompts at once, lower --max-tokens or raise --max-context"});
  }
}

std::vector<GenerateResult> generate(Engine& engine, const Tokenizer* tokenizer,
                                     std::span<const GenerateRequest> requests, const GenerateHooks& hooks) {
  check_requests(engine.config(), engine.memory(), requests);
  return Generation(engine, tokenizer, requests, hooks).run();
}

}  // namespace vesper
