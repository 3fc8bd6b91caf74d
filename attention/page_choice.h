// Which pages a budget forces and how many it leaves to choose: the same arithmetic for both devices.
#pragma once

#include <cstdint>

#include "attention/select_pages.h"

namespace vesper {

// Pages [0, sink_end) and [window_begin, pages) are on every list; `chosen` is how many of those between join them.
struct PageChoice {
  std::int32_t pages = 0;
  std::int32_t sink_end = 0;
  std::int32_t window_begin = 0;
  std::int32_t chosen = 0;
};

// A budget that covers every token covers every page, whatever flooring would say of a last page that is not full.
VESPER_HD inline PageChoice page_choice(const PageBudget& budget, std::int32_t kv_len, std::int32_t page_tokens) {
  PageChoice choice;
  if (kv_len <= 0) return choice;
  choice.pages = page_count(kv_len, page_tokens);
  const std::int32_t sink_tokens = tokens_of(budget.sink_tokens, kv_len);
  const std::int32_t window_tokens = tokens_of(budget.window_tokens, kv_len);
  choice.sink_end = page_count(sink_tokens, page_tokens);
  choice.window_begin =
      (kv_len - (window_tokens > 1 ? window_tokens : 1)) / page_tokens;  // the newest token's at least
  if (choice.sink_end > choice.window_begin) choice.sink_end = choice.window_begin;

  const std::int32_t tokens = tokens_of(budget.tokens, kv_len);
  const std::int32_t kept = tokens >= kv_len ? choice.pages : tokens / page_tokens;
  const std::int32_t forced = choice.sink_end + (choice.pages - choice.window_begin);
  choice.chosen = kept > forced ? kept - forced : 0;
  return choice;
}

}  // namespace vesper
