#include "apps/answer_report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "engine/statistics.h"

namespace vesper {

std::string count_of(std::size_t count, const char* what) {
  return fmt::format("{} {}{}", count, what, count == 1 ? "" : "s");
}

Timings timings_of(const GenerateResult& result) {
  const double tpot = mean(result.token_seconds);
  return Timings{
      .ttft_ms = result.ttft_seconds * 1e3,
      .prefill_tokens_per_s = result.prefill_seconds > 0 ? result.prefill_tokens / result.prefill_seconds : 0.0,
      .tpot_mean_ms = tpot * 1e3,
      .tpot_p50_ms = quantile(result.token_seconds, 0.5) * 1e3,
      .tpot_p99_ms = quantile(result.token_seconds, 0.99) * 1e3,
      .bytes_per_token = result.bytes_per_token,
      .gbytes_per_s = tpot > 0 ? result.bytes_per_token / tpot / 1e9 : 0.0};
}

nlohmann::json to_json(const GenerateResult& result, std::int64_t peak_memory_bytes) {
  const Timings timings = timings_of(result);
  return {{"text", result.text},
          {"ids", result.ids},
          {"prompt_tokens", result.prompt_tokens},
          {"finish_reason", finish_reason_name(result.finish)},
          {"timings",
           {{"ttft_ms", timings.ttft_ms},
            {"prefill_tokens_per_s", timings.prefill_tokens_per_s},
            {"tokens", result.ids.size()},
            {"tpot_mean_ms", timings.tpot_mean_ms},
            {"tpot_p50_ms", timings.tpot_p50_ms},
            {"tpot_p99_ms", timings.tpot_p99_ms},
            {"bytes_per_token", timings.bytes_per_token},
            {"gbytes_per_s", timings.gbytes_per_s}}},
          {"peak_memory_bytes", peak_memory_bytes}};
}

}  // namespace vesper
