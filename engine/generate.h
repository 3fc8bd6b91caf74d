// From prompts to texts: admission, chunked prefill, and decode of a batch until each sequence ends on its own.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "tokenizer/tokenizer.h"

namespace vesper {

// A sequence that outlives its requests, so that a conversation prefills only what is new in it. Belongs to the engine
// that filled it.
struct KeptContext {
  CachedSequence sequence;
  std::vector<std::int32_t> ids;  // of the tokens that the sequence holds
};

struct GenerateRequest {
  std::vector<std::int32_t> prompt;  // at least one id
  int max_tokens = 128;
  SamplingParams sampling;
  std::vector<std::string> stop;  // the text ends before the first of them
  bool ignore_eos = false;
  std::vector<std::int32_t> end_ids;  // end the answer as the model's eos ids do
  int decode_last = 0;                // this many of the prompt's last tokens go through decode, one by one
  // Where set, the longest common beginning of the prompt and of what this holds is not computed again, and it holds
  // prompt and answer afterwards, but for the last id drawn. Outlives the run; no two requests share one.
  KeptContext* kept = nullptr;
};

enum class FinishReason : std::uint8_t { kLength, kEos, kStop, kInterrupted };
std::string_view finish_reason_name(FinishReason reason);

struct GenerateResult {
  std::vector<std::int32_t> ids;  // generated, an eos id included
  std::string text;
  FinishReason finish = FinishReason::kLength;
  int prompt_tokens = 0;
  int reused_tokens = 0;              // of the prompt, those that the kept context held
  int prefill_tokens = 0;             // of the prompt, those that went through prefill
  double prefill_seconds = 0.0;       // of this sequence's own prefill steps
  double ttft_seconds = 0.0;          // from the start of the run to this sequence's first token
  std::vector<double> token_seconds;  // for each token after the first, the time since the one before
  double bytes_per_token = 0.0;       // mean over decode steps of the step's bytes, divided by the sequences in it
};

// What a caller may watch. All may be empty.
struct GenerateHooks {
  std::function<void(int request, std::string_view text)> on_text;
  std::function<void(int request, int done_tokens, int prompt_tokens)> on_prefill;
  std::function<void(int request, const GenerateResult& result)> on_finish;
  std::function<bool()> interrupted;  // asked after every step; true ends the run cleanly
};

// Refuses what cannot run: a prompt longer than the context, a batch larger than the cache (both with both numbers), an
// id outside the vocabulary. Needs no weights, so a caller can ask before it loads any.
void check_requests(const ModelConfig& config, const MemoryPlan& plan, std::span<const GenerateRequest> requests);

// Runs all requests as one batch: prompts are prefilled one after the other, in chunks; then all sequences decode
// together, and each gives its pages back when it ends, unless its context is kept. Pages for prompt and answer are
// reserved before the first step. Throws what check_requests throws. `tokenizer` may be null: then texts stay empty and
// stop strings are not looked for.
std::vector<GenerateResult> generate(Engine& engine, const Tokenizer* tokenizer,
                                     std::span<const GenerateRequest> requests, const GenerateHooks& hooks);

}  // namespace vesper
