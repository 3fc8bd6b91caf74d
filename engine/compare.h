// One prompt, one prefill, several attentions: each decodes the same continuation from the same cache.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "tokenizer/tokenizer.h"

namespace vesper {

struct CompareRequest {
  std::vector<std::int32_t> prompt;
  int decode_last = 0;  // of the prompt, through decode, under each attention
  int max_tokens = 32;
  std::vector<std::string> stop;
};

// What one attention made of it. Greedy.
struct CompareResult {
  std::vector<std::int32_t> ids;
  std::string text;
  double step_seconds = 0.0;            // median over the decode steps, the prompt's last tokens included
  std::vector<AttentionTotals> totals;  // one a layer
};

// Prefills all of the prompt but its last `decode_last` tokens once; then, for each of the engine's attentions, rewinds
// the cache, feeds these tokens one by one and decodes. At least one token must be left for decode. `on_prefill` may be
// empty. Throws an input error where prompt and answer do not fit, or ids lie outside the vocabulary.
std::vector<CompareResult> compare_attention(Engine& engine, int arms, const Tokenizer& tokenizer,
                                             const CompareRequest& request,
                                             const std::function<void(int done, int total)>& on_prefill);

}  // namespace vesper
