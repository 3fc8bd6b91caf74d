#include "engine/bench_figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

// Step bytes under this many times the last cache may come from it.
constexpr double kCacheFactor = 4.0;
// Below it a speed-up may be noise that no interval of few repeats excludes.
constexpr double kSpeedup = 1.03;

Json ms(double seconds) {
  return seconds * 1e3;
}

std::vector<double> tokens_per_s(const BenchRow& row) {
  std::vector<double> rates;
  for (const double tpot : row.tpot_s) rates.push_back(row.batch / tpot);
  return rates;
}

Json spread_of(const std::vector<double>& values) {
  if (values.size() < 2) return {};
  Moments moments;
  for (const double value : values) moments.add(value);
  return std::sqrt(moments.variance());
}

constexpr std::array kColumns = {
    BenchColumn{"engine", "who was measured; peers write the same columns",
                [](const BenchRow& r) { return Json(r.engine); }},
    BenchColumn{"model", "the model, or the shape whose weights were drawn",
                [](const BenchRow& r) { return Json(r.model); }},
    BenchColumn{"device", "the device's own name", [](const BenchRow& r) { return Json(r.device); }},
    BenchColumn{"weights", "what the matrices are held in", [](const BenchRow& r) { return Json(r.weights); }},
    BenchColumn{"fill", "how the cache got its depth: prefill of random ids, or drawn keys (synthetic)",
                [](const BenchRow& r) { return Json(r.fill); }},
    BenchColumn{"attention", "what the layers attend with in decode",
                [](const BenchRow& r) { return Json(r.attention); }},
    BenchColumn{"context", "tokens a sequence holds at the last timed step",
                [](const BenchRow& r) { return Json(r.context); }},
    BenchColumn{"batch", "sequences side by side, each with keys and values of its own",
                [](const BenchRow& r) { return Json(r.batch); }},
    BenchColumn{"max_tokens", "decode steps of a repeat: one token a sequence each",
                [](const BenchRow& r) { return Json(r.max_tokens); }},
    BenchColumn{"repeats", "times that each attention ran, in turns with the others",
                [](const BenchRow& r) { return Json(r.repeats); }},
    BenchColumn{"ttft_ms",
                "time to first token: prefill of one prompt and its first token, mean over the batch's prompts",
                [](const BenchRow& r) { return r.ttft_s ? ms(*r.ttft_s) : Json(); }},
    BenchColumn{"prefill_tflop_per_s",
                "multiplications and additions of matrices and dense attention in a prompt / ttft, in 10^12 a second",
                [](const BenchRow& r) { return r.ttft_s ? Json(r.prefill_flops / *r.ttft_s * 1e-12) : Json(); }},
    BenchColumn{"prefill_share", "the same over the matrix rate probed in the same run",
                [](const BenchRow& r) { return optional_json(prefill_share(r)); }},
    BenchColumn{"tpot_ms", "time per output token, end to end: the mean decode step by the host's clock, ids in hand",
                [](const BenchRow& r) { return ms(mean_step_s(r)); }},
    BenchColumn{"tpot_p50_ms", "the median step", [](const BenchRow& r) { return ms(quantile(r.step_s, 0.5)); }},
    BenchColumn{"tpot_p99_ms", "the 99th percentile of all steps (nearest rank)",
                [](const BenchRow& r) { return ms(quantile(r.step_s, 0.99)); }},
    BenchColumn{"device_ms", "the mean step by the device's clock: events around the launch; on the CPU the operations",
                [](const BenchRow& r) { return ms(mean(r.device_s)); }},
    BenchColumn{"device_p50_ms", "its median", [](const BenchRow& r) { return ms(quantile(r.device_s, 0.5)); }},
    BenchColumn{"device_p99_ms", "its 99th percentile",
                [](const BenchRow& r) { return ms(quantile(r.device_s, 0.99)); }},
    BenchColumn{"tokens_per_s", "batch / tpot, mean over repeats",
                [](const BenchRow& r) { return Json(mean(tokens_per_s(r))); }},
    BenchColumn{"tokens_per_s_sd", "its standard deviation over repeats",
                [](const BenchRow& r) { return spread_of(tokens_per_s(r)); }},
    BenchColumn{"weight_bytes", "weights that a step reads: every matrix once, one embedding row a sequence",
                [](const BenchRow& r) { return Json(r.weight_bytes); }},
    BenchColumn{"kv_bytes", "K and V that a step reads, by the device's counters of kept tokens",
                [](const BenchRow& r) { return Json(r.kv_bytes); }},
    BenchColumn{"metadata_bytes", "side tables, and keys read for scores alone, that a step reads",
                [](const BenchRow& r) { return Json(r.metadata_bytes); }},
    BenchColumn{"gb_per_s", "the three together / tpot, in 10^9 bytes a second",
                [](const BenchRow& r) { return Json(step_bytes(r) / mean_step_s(r) * 1e-9); }},
    BenchColumn{"roof_gb_per_s", "the read rate probed in the same run",
                [](const BenchRow& r) { return Json(r.roof.read_bytes_per_s * 1e-9); }},
    BenchColumn{"roof_share", "gb_per_s / roof_gb_per_s; empty where a step's bytes are under 4 x the last cache",
                [](const BenchRow& r) { return optional_json(roof_share(r)); }},
    BenchColumn{"attention_us",
                "a layer's side tables, lists and attention by the device's clock, in place in the step",
                [](const BenchRow& r) { return Json(r.attention_s * 1e6); }},
    BenchColumn{"kept_tokens",
                "tokens on a list (a sequence, KV head, sparse layer and step), mean; all of them if dense",
                [](const BenchRow& r) { return Json(r.kept_tokens); }},
    BenchColumn{"kept_tokens_p99", "the 99th percentile of the same over the last steps, looked at untimed",
                [](const BenchRow& r) { return Json(r.kept_tokens_p99); }},
    BenchColumn{"kept_mass", "share of the softmax that listed tokens carry, mean over those lists' query heads",
                [](const BenchRow& r) { return Json(r.kept_mass); }},
    BenchColumn{"sigma", "standard deviation of q.k/sqrt(head_dim) over a sequence's keys, mean over layers and heads",
                [](const BenchRow& r) { return Json(r.sigma); }},
    BenchColumn{"speedup", "the baseline's mean step / this one's, over repeats that ran in turns",
                [](const BenchRow& r) { return Json(r.speedup.value); }},
    BenchColumn{"speedup_low", "lower end of its 95 % interval (Fieller, pairs of repeats)",
                [](const BenchRow& r) { return optional_json(r.speedup.low); }},
    BenchColumn{"speedup_high", "upper end", [](const BenchRow& r) { return optional_json(r.speedup.high); }},
    BenchColumn{"ceiling", "the speed-up by bytes if attention cost nothing: (weights + dense K and V) / weights",
                [](const BenchRow& r) { return Json(speedup_ceiling(r)); }},
    BenchColumn{"peak_memory_bytes", "the most held: device memory of this cell's engine, on the CPU the process's",
                [](const BenchRow& r) { return Json(r.peak_bytes); }},
};

// RFC 4180: quotes around what holds a comma, a quote or a line break.
std::string csv_text(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted(1, '"');
  for (const char c : text) quoted.append(c == '"' ? 2 : 1, c);
  quoted += '"';
  return quoted;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> words(1);
  for (const char c : text) {
    if (c == separator) {
      words.emplace_back();
    } else {
      words.back() += c;
    }
  }
  return words;
}

}  // namespace

nlohmann::json optional_json(const std::optional<double>& value) {
  return value ? Json(*value) : Json();
}

std::string csv_value(const Json& value) {
  if (value.is_null()) return "";
  if (value.is_string()) return csv_text(value.get<std::string>());
  if (value.is_number_float()) return fmt::format("{:.6g}", value.get<double>());
  return value.dump();
}

double mean_step_s(const BenchRow& row) {
  return mean(row.step_s);
}

double step_bytes(const BenchRow& row) {
  return static_cast<double>(row.weight_bytes) + row.kv_bytes + row.metadata_bytes;
}

std::optional<double> prefill_share(const BenchRow& row) {
  if (!row.ttft_s) return {};
  return row.prefill_flops / *row.ttft_s / row.roof.matrix_flops_per_s;
}

std::optional<double> roof_share(const BenchRow& row) {
  if (step_bytes(row) < kCacheFactor * static_cast<double>(row.cache_bytes)) return {};
  return step_bytes(row) / mean_step_s(row) / row.roof.read_bytes_per_s;
}

double speedup_ceiling(const BenchRow& row) {
  const auto weights = static_cast<double>(row.weight_bytes);
  return (weights + row.dense_kv_bytes) / weights;
}

std::span<const BenchColumn> bench_columns() {
  return kColumns;
}

std::string csv_head() {
  std::vector<std::string_view> names;
  names.reserve(kColumns.size());
  for (const BenchColumn& column : kColumns) names.push_back(column.name);
  return fmt::format("{}", fmt::join(names, ","));
}

std::string csv_line(const BenchRow& row) {
  std::vector<std::string> values;
  values.reserve(kColumns.size());
  for (const BenchColumn& column : kColumns) values.push_back(csv_value(column.value(row)));
  return fmt::format("{}", fmt::join(values, ","));
}

void check_row(const BenchRow& row) {
  const std::string doing =
      fmt::format("checking the figures of {} at context {}, batch {}", row.attention, row.context, row.batch);
  const std::optional<double> share = roof_share(row);
  if (share && *share > kRoofTolerance) {
    fail({doing,
          fmt::format("{:.0f} GB/s, {:.3f} x the read rate of {:.0f} GB/s probed in this run",
                      *share * row.roof.read_bytes_per_s * 1e-9, *share, row.roof.read_bytes_per_s * 1e-9),
          fmt::format("at most {} x", kRoofTolerance), "run it again on a machine that nothing else uses"});
  }
  const bool read_everything = row.listed_tokens >= row.visible_tokens;
  const bool faster = row.speedup.value > kSpeedup && row.speedup.low.value_or(row.speedup.value) > 1.0;
  if (row.sparse && read_everything && faster) {
    fail({doing, fmt::format("a speed-up of {:.2f} whose device counters say dense", row.speedup.value),
          "lists that leave tokens out, or no speed-up",
          "raise --context over the attention's threshold, or --repeats"});
  }
}

std::vector<int> parse_sizes(const std::string& text, const std::string& flag, int most) {
  std::vector<int> sizes;
  for (const std::string& word : split(text, ',')) {
    const bool kilo = word.ends_with('k') || word.ends_with('K');
    const char* end = word.data() + word.size() - (kilo ? 1 : 0);
    std::int64_t value = 0;
    const auto [stop, error] = std::from_chars(word.data(), end, value);
    const std::int64_t unit = kilo ? 1024 : 1;
    if (error != std::errc() || stop != end || value < 1 || value > most / unit) {
      refuse({"reading " + flag, in_quotes(word),
              fmt::format("whole numbers from 1 to {}, separated by commas, as in 1k,8k (k is 1024)", most), ""});
    }
    sizes.push_back(static_cast<int>(value * unit));
    if (std::count(sizes.begin(), sizes.end(), sizes.back()) > 1) {
      refuse({"reading " + flag, fmt::format("{} twice", sizes.back()), "each number once", ""});
    }
  }
  return sizes;
}

SigmaRange parse_sigma(const std::string& text, const std::string& flag) {
  constexpr double kLeast = 0.01;
  constexpr double kMost = 20.0;
  std::vector<double> ends;
  for (const std::string& word : split(text, ':')) {
    double value = 0.0;
    const char* end = word.data() + word.size();
    const auto [stop, error] = std::from_chars(word.data(), end, value);
    const bool good = error == std::errc() && stop == end && value >= kLeast && value <= kMost;
    if (!good || ends.size() == 2 || (ends.size() == 1 && value < ends[0])) {
      refuse({"reading " + flag, in_quotes(text),
              fmt::format("a number from {} to {}, or two as in 1:5, the lesser first", kLeast, kMost), ""});
    }
    ends.push_back(value);
  }
  return {.least = ends.front(), .largest = ends.back()};
}

}  // namespace vesper
