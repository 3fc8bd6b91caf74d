// The figures of an answer, for people and for programs.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "engine/generate.h"

namespace vesper {

// "1 token", "2 prompts".
std::string count_of(std::size_t count, const char* what = "token");

// TPOT is (time of the last token - TTFT) / (tokens - 1), end to end.
struct Timings {
  double ttft_ms;
  double prefill_tokens_per_s;
  double tpot_mean_ms;
  double tpot_p50_ms;
  double tpot_p99_ms;
  double bytes_per_token;
  double gbytes_per_s;
};
Timings timings_of(const GenerateResult& result);

// {"text", "ids", "prompt_tokens", "finish_reason", "timings", "peak_memory_bytes"}
nlohmann::json to_json(const GenerateResult& result, std::int64_t peak_memory_bytes);

}  // namespace vesper
