#include "apps/repro_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/bench_figures.h"

namespace vesper {
namespace {

std::string number(const std::optional<double>& value, ReproUnit unit) {
  if (!value) return "-";
  if (unit == ReproUnit::kUs) return fmt::format("{:.1f}", *value);
  if (unit == ReproUnit::kMs) return fmt::format("{:.3f}", *value);
  return unit == ReproUnit::kTimes ? fmt::format("{:.2f}", *value) : fmt::format("{:.3f}", *value);
}

// Least and most of times, ends of an interval of ratios.
std::string spread(const ReproRow& row) {
  if (!row.ours_low || !row.ours_high) return "";
  return fmt::format(" ({}-{})", number(row.ours_low, row.panel->unit), number(row.ours_high, row.panel->unit));
}

std::string speedup_text(const Ratio& ratio) {
  if (ratio.value <= 0.0) return "-";
  const std::string text = fmt::format("{:.2f}", ratio.value);
  return ratio.low ? fmt::format("{} ({:.2f}-{:.2f})", text, *ratio.low, *ratio.high) : text;
}

std::string text_or_dash(const std::optional<double>& value, const char* form, double scale = 1.0) {
  return value ? fmt::format(fmt::runtime(form), scale * *value) : "-";
}

std::string time_text(const ReproRow& row) {
  if (row.panel->measure == ReproMeasure::kOperator) return number(row.time_us, ReproUnit::kUs);
  return row.time_us ? number(*row.time_us * 1e-3, ReproUnit::kMs) : "-";
}

std::string share_text(const ReproRow& row) {
  if (!row.line->stages.empty() && row.bound_us && *row.bound_us == 0.0) return "-";
  if (row.bound_share) return fmt::format("{:.0f} %", 100.0 * *row.bound_share);
  return row.time_us ? "in cache" : "-";
}

std::string panel_table(const ReproPanel& panel, std::span<const ReproRow> rows) {
  const auto of_panel = [&](const ReproRow& row) { return row.panel == &panel; };
  const bool peers = std::any_of(rows.begin(), rows.end(),
                                 [&](const ReproRow& row) { return of_panel(row) && row.peer_us.has_value(); });
  const std::string where = panel.source.empty() ? "no published number" : panel.source + ", " + panel.gpu;
  const auto first = std::find_if(rows.begin(), rows.end(), of_panel);
  std::string text = fmt::format(
      "\n## {} ({})\n\n{} of {}, batch {}{}; speed-ups over {}{}\n\n", panel.name, where,
      panel.measure == ReproMeasure::kOperator ? "A layer's attention" : "A decode step", first->model, panel.batch,
      panel.measure == ReproMeasure::kStep ? fmt::format(", weights {}", weight_format_name(panel.weights)) : "",
      panel.baseline,
      first->sigma ? fmt::format("; sigma of the drawn scores {:.2f} at context {}", *first->sigma, first->context)
                   : "");
  const bool step = panel.measure == ReproMeasure::kStep;
  const char* time_unit = step ? "ms" : "us";
  const bool is_share = panel.unit == ReproUnit::kShare;
  text += fmt::format(
      "| context | line | paper, {} |{} ours, {} | bound, {} | of the bound | paper's speed-up | ours (95 %) | by "
      "bytes | "
      "kept tokens (p99) | share | mass |{} verdict |\n|---|---|---|{}---|---|---|---|---|---|---|---|---|{}---|\n",
      unit_name(panel.unit), is_share ? " ours |" : "", time_unit, time_unit, peers ? " peer us | over peer |" : "",
      is_share ? "---|" : "", peers ? "---|---|" : "");
  for (const ReproRow& row : rows) {
    if (!of_panel(row)) continue;
    const bool part = row.line->part;  // what stands in the line above is not said again
    text += fmt::format("| {} | {} | {} |", row.context, row.line->label, number(row.paper, panel.unit));
    if (is_share) text += fmt::format(" {}{} |", number(row.ours, panel.unit), spread(row));
    text += fmt::format(" {}{} | {} | {} |", time_text(row), is_share ? "" : spread(row),
                        step ? text_or_dash(row.bound_us, "{:.3f}", 1e-3) : text_or_dash(row.bound_us, "{:.1f}"),
                        share_text(row));
    text += part ? " | | |"
                 : fmt::format(" {} | {} | {} |", text_or_dash(row.paper_speedup, "{:.2f}"), speedup_text(row.speedup),
                               text_or_dash(row.speedup_bound, "{:.2f}"));
    text += part || !row.kept_tokens
                ? " | | |"
                : fmt::format(" {:.0f} ({:.0f}) | {:.1f} % | {:.1f} % |", *row.kept_tokens, *row.kept_tokens_p99,
                              100.0 * *row.kept_share, 100.0 * *row.kept_mass);
    if (peers) {
      text += fmt::format(" {} | {} |", text_or_dash(row.peer_us, "{:.1f}"), text_or_dash(row.peer_speedup, "{:.2f}"));
    }
    text += fmt::format(" {}{} |\n", row.verdict, row.note.empty() ? "" : ": " + row.note);
  }
  return text;
}

std::string paragraphs(const std::vector<std::string>& texts, const char* before) {
  std::string all;
  for (const std::string& text : texts) all += before + text + '\n';
  return all;
}

nlohmann::json run_json(const ReproRun& run) {
  return {{"command", run.command},
          {"binary", run.binary},
          {"device", run.device},
          {"read_gb_per_s", run.roof.read_bytes_per_s * 1e-9},
          {"matrix_tflop_per_s", run.roof.matrix_flops_per_s * 1e-12},
          {"clocks_before", describe_clocks(run.clocks_before)},
          {"clocks_after", describe_clocks(run.clocks_after)}};
}

}  // namespace

std::string repro_markdown(const Experiment& experiment, const ReproRun& run, std::span<const ReproRow> rows) {
  std::string text =
      fmt::format("# {}\n\n{}\n{}", experiment.title, experiment.paper, paragraphs(experiment.about, "\n"));
  for (const ReproPanel& panel : experiment.panels) text += panel_table(panel, rows);
  text += "\n## How to read it\n\n";
  for (const Verdict& verdict : verdicts()) {
    const bool used =
        std::any_of(rows.begin(), rows.end(), [&](const ReproRow& row) { return row.verdict == verdict.word; });
    if (used) text += fmt::format("- {}: {}\n", verdict.word, verdict.meaning);
  }
  text += paragraphs(experiment.limits, "- ");
  if (run.kind == DeviceKind::kCpu) {
    text +=
        "- On a CPU this shows sparsity (kept tokens, mass, bytes), not speed: times are a CPU's, the roof is a "
        "host read.\n";
  }
  text += fmt::format("\n{}; `{}`; {}.\nRoof, probed in this run: reads {:.1f} GB/s. Clocks before: {}; after: {}.\n",
                      run.device, run.command, run.binary, run.roof.read_bytes_per_s * 1e-9,
                      describe_clocks(run.clocks_before), describe_clocks(run.clocks_after));
  return text;
}

nlohmann::json repro_json(const Experiment& experiment, const ReproRun& run, std::span<const ReproRow> rows) {
  nlohmann::json all = nlohmann::json::array();
  for (const ReproRow& row : rows) {
    nlohmann::json& object = all.emplace_back(nlohmann::json::object());
    for (const ReproColumn& column : repro_columns()) object[std::string(column.name)] = column.value(row);
  }
  return {{"experiment", experiment.name},
          {"title", experiment.title},
          {"paper", experiment.paper},
          {"run", run_json(run)},
          {"rows", std::move(all)}};
}

std::string repro_csv(std::span<const ReproRow> rows) {
  std::vector<std::string> fields;
  for (const ReproColumn& column : repro_columns()) fields.emplace_back(column.name);
  std::string text = fmt::format("{}\n", fmt::join(fields, ","));
  for (const ReproRow& row : rows) {
    fields.clear();
    for (const ReproColumn& column : repro_columns()) fields.push_back(csv_value(column.value(row)));
    text += fmt::format("{}\n", fmt::join(fields, ","));
  }
  return text;
}

std::string repro_definitions() {
  std::string text;
  for (const ReproColumn& column : repro_columns()) text += fmt::format("  {:<18} {}\n", column.name, column.meaning);
  text += "\nVerdicts:\n";
  for (const Verdict& verdict : verdicts()) text += fmt::format("  {:<18} {}\n", verdict.word, verdict.meaning);
  return text;
}

}  // namespace vesper
