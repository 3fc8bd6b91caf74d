#include "apps/bench_report.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace vesper {
namespace {

std::string bytes(double count) {
  return format_bytes(static_cast<std::int64_t>(count));
}

std::string first_token(const BenchRow& row) {
  if (!row.ttft_s) return "-";
  return fmt::format("{:.1f} ({:.0f} %)", *row.ttft_s * 1e3, 100.0 * *prefill_share(row));
}

std::string time_table(const BenchReport& report) {
  std::string text =
      "| weights | attention | context | batch | TTFT ms (matrix rate) | TPOT ms | p50 | p99 | device ms | p50 | p99 | "
      "tokens/s | "
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
        row.weights, row.attention, row.context, row.batch, first_token(row), mean_step_s(row) * 1e3,
        quantile(row.step_s, 0.5) * 1e3, quantile(row.step_s, 0.99) * 1e3, mean(row.device_s) * 1e3,
        quantile(row.device_s, 0.5) * 1e3, quantile(row.device_s, 0.99) * 1e3, rates.mean(),
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

// Stages of attention in place, where they were timed.
std::string stage_table(const BenchReport& report) {
  std::string text;
  for (const BenchRow& row : report.rows) {
    for (const StageFigure& stage : row.stages) {
      const double bound = bound_seconds(stage.cost, row.roof);
      text += fmt::format("| {} | {} | {} | {} | {} | {} | {} | {:.2f} | {:.2f} | {} | {:.2f} | {} |\n", row.weights,
                          row.attention, row.context, row.batch, stage.backend, stage.layers, stage.stage,
                          stage.seconds * 1e6, stage.seam_seconds * 1e6, bytes(static_cast<double>(stage.cost.bytes)),
                          bound * 1e6,
                          !roof_share(row)      ? "in cache"
                          : stage.seconds > 0.0 ? fmt::format("{:.1f} %", 100.0 * bound / stage.seconds)
                                                : "-");
    }
  }
  if (text.empty()) return "";
  return "\nStages of a layer's attention in place; what the event nodes around each add is taken off (seam):\n\n"
         "| weights | attention | context | batch | backend | layers | stage | us a layer | seam us | bytes | bound us "
         "| of the "
         "bound |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n" +
         text;
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

nlohmann::json stages_json(const BenchRow& row) {
  nlohmann::json stages = nlohmann::json::array();
  for (const StageFigure& stage : row.stages) {
    stages.push_back({{"backend", stage.backend},
                      {"layers", stage.layers},
                      {"stage", stage.stage},
                      {"us", stage.seconds * 1e6},
                      {"seam_us", stage.seam_seconds * 1e6},
                      {"bytes", stage.cost.bytes},
                      {"flops", stage.cost.flops},
                      {"bound_us", bound_seconds(stage.cost, row.roof) * 1e6}});
  }
  return stages;
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
  text += time_table(report) + '\n' + bytes_table(report) + stage_table(report) + score_line(setting, report);
  return text + rulers(report.roof, report.clocks_before, report.clocks_after, setting.engine.limits.device) +
         left_out(report.skipped);
}

nlohmann::json bench_json(const BenchSetting& setting, const BenchReport& report) {
  nlohmann::json rows = nlohmann::json::array();
  for (const BenchRow& row : report.rows) {
    nlohmann::json& object = rows.emplace_back(nlohmann::json::object());
    for (const BenchColumn& column : bench_columns()) object[std::string(column.name)] = column.value(row);
    object["sigma_range"] = {row.sigma_least, row.sigma_largest};
    if (setting.stages) object["stages"] = stages_json(row);
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
    const double bound = bound_seconds(row.cost, report.roof);
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
                    {"bound_us", bound_seconds(row.cost, report.roof) * 1e6},
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
        row.cost.bytes, row.cost.flops, bound_seconds(row.cost, report.roof) * 1e6,
        row.rival_s ? fmt::format("{:.6g}", *row.rival_s * 1e6) : "", is_cold(row, report.cache_bytes), row.check);
  }
  return text;
}

std::string crossover_markdown(const BenchSetting& setting, const CrossoverReport& report) {
  std::string text =
      fmt::format("{} on {}, weights {}, batch {}: from which context on a decode step is faster than dense\n",
                  setting.model, report.device, report.weights, setting.batches[0]);
  for (const Crossover& crossover : report.crossovers) {
    text += fmt::format("\n{}\n\n| context | speed-up over dense (95 %) |\n|---|---|\n", crossover.attention);
    for (const CrossoverPoint& point : crossover.points) {
      const Ratio& ratio = point.speedup;
      text += fmt::format("| {} | {:.3f}{}{} |\n", point.context, ratio.value,
                          ratio.low ? fmt::format(" ({:.3f}-{:.3f})", *ratio.low, *ratio.high) : "",
                          point.dense ? ", dense: the budget covers the context" : "");
    }
    if (!crossover.dense_below) {
      text += fmt::format("\nNot faster up to {} tokens: no dense_below helps there.\n", setting.contexts[1]);
      continue;
    }
    if (*crossover.dense_below == 0) {
      text += fmt::format("\nFaster from {} tokens on, the least context measured.\n", setting.contexts[0]);
    }
    if (is_attention_file(crossover.attention)) {
      text += fmt::format("\nIn its rules: \"dense_below\": {}\n", *crossover.dense_below);
    } else {
      text += fmt::format("\n    --attention {}\n    {}\n", crossover_shorthand(crossover), crossover_rule(crossover));
    }
  }
  if (setting.engine.limits.device == DeviceKind::kCpu) text += "\nOn a CPU; a GPU's differ.\n";
  return text + fmt::format("\nClocks before: {}; after: {}.\n", describe_clocks(report.clocks_before),
                            describe_clocks(report.clocks_after));
}

nlohmann::json crossover_json(const BenchSetting& setting, const CrossoverReport& report) {
  nlohmann::json all = nlohmann::json::array();
  for (const Crossover& crossover : report.crossovers) {
    nlohmann::json points = nlohmann::json::array();
    for (const CrossoverPoint& point : crossover.points) {
      points.push_back({{"context", point.context},
                        {"speedup", point.speedup.value},
                        {"speedup_low", point.speedup.low ? nlohmann::json(*point.speedup.low) : nlohmann::json()},
                        {"speedup_high", point.speedup.high ? nlohmann::json(*point.speedup.high) : nlohmann::json()},
                        {"dense", point.dense}});
    }
    all.push_back({{"attention", crossover.attention},
                   {"dense_below", crossover.dense_below ? nlohmann::json(*crossover.dense_below) : nlohmann::json()},
                   {"points", std::move(points)}});
  }
  return {{"model", setting.model},
          {"device", report.device},
          {"weights", report.weights},
          {"batch", setting.batches[0]},
          {"contexts", setting.contexts},
          {"clocks", {{"before", clocks_json(report.clocks_before)}, {"after", clocks_json(report.clocks_after)}}},
          {"crossovers", std::move(all)}};
}

std::string crossover_csv(const CrossoverReport& report) {
  const auto end = [](const std::optional<double>& value) { return value ? fmt::format("{:.6g}", *value) : ""; };
  std::string text = "attention,context,speedup,speedup_low,speedup_high,dense,dense_below\n";
  for (const Crossover& crossover : report.crossovers) {
    for (const CrossoverPoint& point : crossover.points) {
      text += fmt::format("\"{}\",{},{:.6g},{},{},{},{}\n", crossover.attention, point.context, point.speedup.value,
                          end(point.speedup.low), end(point.speedup.high), point.dense,
                          crossover.dense_below ? std::to_string(*crossover.dense_below) : "");
    }
  }
  return text;
}

std::string bench_definitions() {
  std::string text;
  for (const BenchColumn& column : bench_columns()) text += fmt::format("  {:<18} {}\n", column.name, column.meaning);
  return text;
}

}  // namespace vesper
