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
      "| weights | attention | context | batch | TTFT ms | TPOT ms | p50 | p99 | device ms | p50 | p99 | tokens/s | "
      "speed-up (95 "
      "%) "
      "| ceiling |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const BenchRow& row : report.rows) {
    Moments rates;
    for (const double tpot : row.tpot_s) rates.add(row.batch / tpot);
    const std::string interval =
        row.speedup.low ? fmt::format(" ({:.2f}-{:.2f})", *row.speedup.low, *row.speedup.high) : "";
    text += fmt::format(
        "| {} | {} | {} | {} | {} | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.1f} ± {:.1f} | {:.2f}{} | "
        "{:.2f} "
        "|\n",
        row.weights, row.attention, row.context, row.batch, row.ttft_s ? fmt::format("{:.1f}", *row.ttft_s * 1e3) : "-",
        mean_step_s(row) * 1e3, quantile(row.step_s, 0.5) * 1e3, quantile(row.step_s, 0.99) * 1e3,
        mean(row.device_s) * 1e3, quantile(row.device_s, 0.5) * 1e3, quantile(row.device_s, 0.99) * 1e3, rates.mean(),
        std::sqrt(rates.variance()), row.speedup.value, interval, speedup_ceiling(row));
  }
  return text;
}

std::string bytes_table(const BenchReport& report) {
  std::string text =
      "| weights | attention | context | batch | weight bytes | K and V | metadata | GB/s | of the roof | attention us "
      "a layer | kept "
      "tokens | p99 | kept mass | peak memory |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const BenchRow& row : report.rows) {
    const std::optional<double> share = roof_share(row);
    text +=
        fmt::format("| {} | {} | {} | {} | {} | {} | {} | {:.1f} | {} | {:.1f} | {:.0f} | {:.0f} | {:.3f} | {} |\n",
                    row.weights, row.attention, row.context, row.batch, bytes(static_cast<double>(row.weight_bytes)),
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
        "- {}, {}, context {}, batch {}: sigma {:.2f} ({:.2f} to {:.2f} over layers and heads), kept {:.0f} "
        "tokens (p99 {:.0f}) that carry {:.1f} % of the attention\n",
        row.weights, row.attention, row.context, row.batch, row.sigma, row.sigma_least, row.sigma_largest,
        row.kept_tokens, row.kept_tokens_p99, 100.0 * row.kept_mass);
  }
  return text;
}

std::string rulers(const Roof& roof, const std::optional<ClockState>& before, const std::optional<ClockState>& after,
                   DeviceKind device) {
  std::string text = fmt::format(
      "\nRoof, probed in this run: reads {:.1f} GB/s, multiplies {:.2f} TFLOP/s.\nClocks before: {}; after: {}.\n",
      roof.read_bytes_per_s * 1e-9, roof.matrix_flops_per_s * 1e-12, describe_clocks(before), describe_clocks(after));
  if (device == DeviceKind::kCpu) {
    text +=
        "On a CPU sparsity is shown, not speed: device times are those of the operations, the roof is a host read.\n";
  }
  return text;
}

std::string left_out(const std::vector<std::string>& skipped) {
  std::string text;
  for (const std::string& cell : skipped) text += "Left out: " + cell + ".\n";
  return text;
}

nlohmann::json roof_json(const Roof& roof) {
  return {{"read_gb_per_s", roof.read_bytes_per_s * 1e-9}, {"matrix_tflop_per_s", roof.matrix_flops_per_s * 1e-12}};
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
  std::string text = fmt::format("{} on {}, {} layers; {} timed steps of {} repeats in turns, speed-ups over {}\n\n",
                                 first.model, first.device, first.layers, setting.max_tokens * setting.repeats,
                                 setting.repeats, setting.attentions[static_cast<std::size_t>(setting.baseline)]);
  text += time_table(report) + '\n' + bytes_table(report) + score_line(setting, report);
  return text + rulers(report.roof, report.clocks_before, report.clocks_after, setting.engine.limits.device) +
         left_out(report.skipped);
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
          {"roof", roof_json(report.roof)},
          {"clocks", {{"before", clocks_json(report.clocks_before)}, {"after", clocks_json(report.clocks_after)}}},
          {"rows", std::move(rows)},
          {"skipped", report.skipped}};
}

std::string bench_csv(const BenchReport& report) {
  std::string text = csv_head() + '\n';
  for (const BenchRow& row : report.rows) text += csv_line(row) + '\n';
  return text;
}

std::string kernels_markdown(const KernelSetting& setting, const KernelReport& report) {
  std::string text = fmt::format("Kernels of {} on {}, each alone, data cold but where it says in cache\n\n",
                                 setting.model, device_info(setting.device).name);
  text +=
      "| stage | kernel | context | batch | us | least-most | GB/s | bound us | of the bound | cuBLASLt us | checked "
      "|\n"
      "|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const KernelRow& row : report.rows) {
    const double median = quantile(row.seconds, 0.5);
    const double bound = bound_seconds(row, report.roof);
    text += fmt::format("| {} | {} | {} | {} | {:.2f} | {:.2f}-{:.2f} | {:.0f} | {:.2f} | {} | {} | {} |\n", row.stage,
                        row.kernel, row.context == 0 ? "-" : fmt::format("{}", row.context), row.batch, median * 1e6,
                        quantile(row.seconds, 0.0) * 1e6, quantile(row.seconds, 1.0) * 1e6,
                        static_cast<double>(row.cost.bytes) / median * 1e-9, bound * 1e6,
                        is_cold(row, report.cache_bytes) ? fmt::format("{:.1f} %", 100.0 * bound / median) : "in cache",
                        row.rival_s ? fmt::format("{:.2f}", *row.rival_s * 1e6) : "-", row.check);
  }
  return text + rulers(report.roof, report.clocks_before, report.clocks_after, setting.device) +
         left_out(report.skipped);
}

nlohmann::json kernels_json(const KernelSetting& setting, const KernelReport& report) {
  nlohmann::json rows = nlohmann::json::array();
  for (const KernelRow& row : report.rows) {
    rows.push_back({{"stage", row.stage},
                    {"kernel", row.kernel},
                    {"context", row.context},
                    {"batch", row.batch},
                    {"us", quantile(row.seconds, 0.5) * 1e6},
                    {"us_least", quantile(row.seconds, 0.0) * 1e6},
                    {"us_most", quantile(row.seconds, 1.0) * 1e6},
                    {"bytes", row.cost.bytes},
                    {"flops", row.cost.flops},
                    {"bound_us", bound_seconds(row, report.roof) * 1e6},
                    {"cublaslt_us", row.rival_s ? nlohmann::json(*row.rival_s * 1e6) : nlohmann::json()},
                    {"cold", is_cold(row, report.cache_bytes)},
                    {"checked", row.check}});
  }
  return {{"model", setting.model},
          {"device", device_info(setting.device).name},
          {"roof", roof_json(report.roof)},
          {"clocks", {{"before", clocks_json(report.clocks_before)}, {"after", clocks_json(report.clocks_after)}}},
          {"kernels", std::move(rows)},
          {"skipped", report.skipped}};
}

std::string kernels_csv(const KernelReport& report) {
  std::string text = "stage,kernel,context,batch,us,us_least,us_most,bytes,flops,bound_us,cublaslt_us,cold,checked\n";
  for (const KernelRow& row : report.rows) {
    text += fmt::format(
        "{},\"{}\",{},{},{:.6g},{:.6g},{:.6g},{},{},{:.6g},{},{},\"{}\"\n", row.stage, row.kernel, row.context,
        row.batch, quantile(row.seconds, 0.5) * 1e6, quantile(row.seconds, 0.0) * 1e6, quantile(row.seconds, 1.0) * 1e6,
        row.cost.bytes, row.cost.flops, bound_seconds(row, report.roof) * 1e6,
        row.rival_s ? fmt::format("{:.6g}", *row.rival_s * 1e6) : "", is_cold(row, report.cache_bytes), row.check);
  }
  return text;
}

std::string bench_definitions() {
  std::string text;
  for (const BenchColumn& column : bench_columns()) text += fmt::format("  {:<18} {}\n", column.name, column.meaning);
  return text;
}

}  // namespace vesper
