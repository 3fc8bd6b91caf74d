#include "apps/bench_report.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace vesper {
namespace {

std::string bytes(double count) {
  return format_bytes(static_cast<std::int64_t>(count));
}

std::string time_table(const BenchReport& report) {
  std::string text =
      "| attention | context | batch | TTFT ms | TPOT ms | p50 | p99 | device ms | p50 | p99 | tokens/s | speed-up (95 "
      "%) "
      "| ceiling |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const BenchRow& row : report.rows) {
    Moments rates;
    for (const double tpot : row.tpot_s) rates.add(row.batch / tpot);
    const std::string interval =
        row.speedup.low ? fmt::format(" ({:.2f}-{:.2f})", *row.speedup.low, *row.speedup.high) : "";
    text += fmt::format(
        "| {} | {} | {} | {} | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.1f} ± {:.1f} | {:.2f}{} | "
        "{:.2f} "
        "|\n",
        row.attention, row.context, row.batch, row.ttft_s ? fmt::format("{:.1f}", *row.ttft_s * 1e3) : "-",
        mean_step_s(row) * 1e3, quantile(row.step_s, 0.5) * 1e3, quantile(row.step_s, 0.99) * 1e3,
        mean(row.device_s) * 1e3, quantile(row.device_s, 0.5) * 1e3, quantile(row.device_s, 0.99) * 1e3, rates.mean(),
        std::sqrt(rates.variance()), row.speedup.value, interval, speedup_ceiling(row));
  }
  return text;
}

std::string bytes_table(const BenchReport& report) {
  std::string text =
      "| attention | context | batch | weights | K and V | metadata | GB/s | of the roof | attention us a layer | kept "
      "tokens | p99 | kept mass | peak memory |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const BenchRow& row : report.rows) {
    const std::optional<double> share = roof_share(row);
    text += fmt::format("| {} | {} | {} | {} | {} | {} | {:.1f} | {} | {:.1f} | {:.0f} | {:.0f} | {:.3f} | {} |\n",
                        row.attention, row.context, row.batch, bytes(static_cast<double>(row.weight_bytes)),
                        bytes(row.kv_bytes), bytes(row.metadata_bytes), step_bytes(row) / mean_step_s(row) * 1e-9,
                        share ? fmt::format("{:.1f} %", 100.0 * *share) : "in cache", row.attention_s * 1e6,
                        row.kept_tokens, row.kept_tokens_p99, row.kept_mass, format_bytes(row.peak_bytes));
  }
  return text;
}

// The line that always stands by figures of scores that no text made.
std::string score_line(const BenchSetting& setting, const BenchReport& report) {
  const bool drawn = setting.fill == BenchFill::kSynthetic;
  if (!drawn && !is_synthetic(setting.model)) return "";
  std::string text = fmt::format("\n{}; the spread of q.k/sqrt(head_dim) over keys:\n\n",
                                 drawn ? "Keys and values are drawn" : "Weights are drawn, and with them the scores");
  for (const BenchRow& row : report.rows) {
    text += fmt::format(
        "- {}, context {}, batch {}: sigma {:.2f} ({:.2f} to {:.2f} over layers and heads), kept {:.0f} "
        "tokens (p99 {:.0f}) that carry {:.1f} % of the attention\n",
        row.attention, row.context, row.batch, row.sigma, row.sigma_least, row.sigma_largest, row.kept_tokens,
        row.kept_tokens_p99, 100.0 * row.kept_mass);
  }
  return text;
}

nlohmann::json clocks_json(const std::optional<ClockState>& clocks) {
  if (!clocks) return {};
  return {{"sm_mhz", clocks->sm_mhz},
          {"max_sm_mhz", clocks->max_sm_mhz},
          {"memory_mhz", clocks->memory_mhz},
          {"max_memory_mhz", clocks->max_memory_mhz},
          {"temperature_c", clocks->temperature_c},
          {"power_w", clocks->power_w},
          {"throttled_by", clocks->throttled_by}};
}

}  // namespace

std::string bench_markdown(const BenchSetting& setting, const BenchReport& report) {
  const BenchRow& first = report.rows.front();
  std::string text = fmt::format(
      "{} on {}: {} of weights in {} a step, {} layers; {} timed steps of {} repeats in turns, speed-ups over {}\n\n",
      first.model, first.device, format_bytes(first.weight_bytes), first.weights, first.layers,
      setting.max_tokens * setting.repeats, setting.repeats,
      setting.attentions[static_cast<std::size_t>(setting.baseline)]);
  text += time_table(report) + '\n' + bytes_table(report) + score_line(setting, report);
  text += fmt::format("\nRoof, probed in this run: reads {:.1f} GB/s, multiplies {:.2f} TFLOP/s.\n",
                      report.roof.read_bytes_per_s * 1e-9, report.roof.matrix_flops_per_s * 1e-12);
  text += fmt::format("Clocks before: {}; after: {}.\n", describe_clocks(report.clocks_before),
                      describe_clocks(report.clocks_after));
  if (setting.engine.limits.device == DeviceKind::kCpu) {
    text +=
        "On a CPU sparsity is shown, not speed: device times are those of the operations, the roof is a host read.\n";
  }
  for (const std::string& cell : report.skipped) text += "Left out: " + cell + ".\n";
  return text;
}

nlohmann::json bench_json(const BenchSetting& setting, const BenchReport& report) {
  nlohmann::json rows = nlohmann::json::array();
  for (const BenchRow& row : report.rows) {
    nlohmann::json& object = rows.emplace_back(nlohmann::json::object());
    for (const BenchColumn& column : bench_columns()) object[std::string(column.name)] = column.value(row);
    object["sigma_range"] = {row.sigma_least, row.sigma_largest};
  }
  return {{"model", setting.model},
          {"device", report.rows.front().device},
          {"baseline", setting.attentions[static_cast<std::size_t>(setting.baseline)]},
          {"seed", setting.engine.seed},
          {"roof",
           {{"read_gb_per_s", report.roof.read_bytes_per_s * 1e-9},
            {"matrix_tflop_per_s", report.roof.matrix_flops_per_s * 1e-12}}},
          {"clocks", {{"before", clocks_json(report.clocks_before)}, {"after", clocks_json(report.clocks_after)}}},
          {"rows", std::move(rows)},
          {"skipped", report.skipped}};
}

std::string bench_csv(const BenchReport& report) {
  std::string text = csv_head() + '\n';
  for (const BenchRow& row : report.rows) text += csv_line(row) + '\n';
  return text;
}

std::string bench_definitions() {
  std::string text;
  for (const BenchColumn& column : bench_columns()) text += fmt::format("  {:<18} {}\n", column.name, column.meaning);
  return text;
}

}  // namespace vesper
