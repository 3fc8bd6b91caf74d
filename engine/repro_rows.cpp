#include "engine/repro_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <nlohmann/json.hpp>
#include <sstream>

#include "engine/bench_figures.h"
#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

constexpr double kSame = 0.05;  // speed-ups within so much of each other count as the same
constexpr double kConfidence = 0.95;

constexpr std::array kVerdicts = {
    Verdict{"reproduced", "the speed-up is within 5 % of the paper's"},
    Verdict{"exceeded", "it is larger by more than 5 %"},
    Verdict{"missed", "it is smaller by more than 5 %, and the bytes allow more"},
    Verdict{"impossible", "it is smaller, and the bytes do not allow the paper's either"},
    Verdict{"baseline", "what the others of its panel are held against"},
    Verdict{"part", "a part of a line above it, judged with that"},
    Verdict{"inseparable", "a part that has no time of its own here; the note says why"},
    Verdict{"unpublished", "the paper prints no number here"},
    Verdict{"unfit", "this device cannot hold it; the note says what it would take"},
    Verdict{"unjudged", "measured on a CPU, whose times say nothing about a GPU's"},
};

constexpr std::array kColumns = {
    ReproColumn{"panel", "of the figure or table", [](const ReproRow& r) { return Json(r.panel->name); }},
    ReproColumn{"source", "where the paper's number stands", [](const ReproRow& r) { return Json(r.panel->source); }},
    ReproColumn{"paper_gpu", "what it was measured on", [](const ReproRow& r) { return Json(r.panel->gpu); }},
    ReproColumn{"label", "what the paper calls it", [](const ReproRow& r) { return Json(r.line->label); }},
    ReproColumn{"attention", "what is run for it", [](const ReproRow& r) { return Json(r.line->attention); }},
    ReproColumn{"stages", "of it, where it is not the whole",
                [](const ReproRow& r) { return Json(fmt::format("{}", fmt::join(r.line->stages, " "))); }},
    ReproColumn{
        "measure", "a layer's attention alone (operator) or a decode step",
        [](const ReproRow& r) { return Json(r.panel->measure == ReproMeasure::kOperator ? "operator" : "step"); }},
    ReproColumn{"model", "the model, or the shape", [](const ReproRow& r) { return Json(r.model); }},
    ReproColumn{"weights", "what matrices are held in",
                [](const ReproRow& r) { return Json(weight_format_name(r.panel->weights)); }},
    ReproColumn{"context", "tokens a sequence holds", [](const ReproRow& r) { return Json(r.context); }},
    ReproColumn{"batch", "sequences, each with keys and values of its own",
                [](const ReproRow& r) { return Json(r.panel->batch); }},
    ReproColumn{"unit", "of paper and ours", [](const ReproRow& r) { return Json(unit_name(r.panel->unit)); }},
    ReproColumn{"paper", "the paper's number: a speed-up is over what the source says",
                [](const ReproRow& r) { return optional_json(r.paper); }},
    ReproColumn{"ours", "ours: the median of a time; empty where the paper's is over something that is not run here",
                [](const ReproRow& r) { return optional_json(r.ours); }},
    ReproColumn{"ours_low", "the least time, or the lower end of a ratio's 95 % interval",
                [](const ReproRow& r) { return optional_json(r.ours_low); }},
    ReproColumn{"ours_high", "the most, or the upper end",
                [](const ReproRow& r) { return optional_json(r.ours_high); }},
    ReproColumn{"time_us", "the median of our times, whatever the unit",
                [](const ReproRow& r) { return optional_json(r.time_us); }},
    ReproColumn{"bound_us", "bytes that it cannot do without / the read rate probed in the same run",
                [](const ReproRow& r) { return optional_json(r.bound_us); }},
    ReproColumn{"bound_share", "bound / time; empty where the data need not come from memory",
                [](const ReproRow& r) { return optional_json(r.bound_share); }},
    ReproColumn{"paper_speedup", "over the panel's baseline, by the paper's numbers",
                [](const ReproRow& r) { return optional_json(r.paper_speedup); }},
    ReproColumn{"speedup", "ours over our own baseline, which ran in turns with it",
                [](const ReproRow& r) { return r.speedup.value > 0.0 ? Json(r.speedup.value) : Json(); }},
    ReproColumn{"speedup_low", "lower end of its 95 % interval",
                [](const ReproRow& r) { return optional_json(r.speedup.low); }},
    ReproColumn{"speedup_high", "upper end", [](const ReproRow& r) { return optional_json(r.speedup.high); }},
    ReproColumn{"speedup_bound", "the baseline's bytes / its bytes: both at the same rate",
                [](const ReproRow& r) { return optional_json(r.speedup_bound); }},
    ReproColumn{"kept_tokens", "tokens on a list, mean",
                [](const ReproRow& r) { return optional_json(r.kept_tokens); }},
    ReproColumn{"kept_tokens_p99", "99th percentile",
                [](const ReproRow& r) { return optional_json(r.kept_tokens_p99); }},
    ReproColumn{"kept_share", "kept tokens / context", [](const ReproRow& r) { return optional_json(r.kept_share); }},
    ReproColumn{"kept_mass", "share of the softmax that they carry",
                [](const ReproRow& r) { return optional_json(r.kept_mass); }},
    ReproColumn{"sigma", "standard deviation of the drawn scores",
                [](const ReproRow& r) { return optional_json(r.sigma); }},
    ReproColumn{"peer", "the fastest dense attention of --peer-csv", [](const ReproRow& r) { return Json(r.peer); }},
    ReproColumn{"peer_us", "its time", [](const ReproRow& r) { return optional_json(r.peer_us); }},
    ReproColumn{"peer_speedup", "its time / ours", [](const ReproRow& r) { return optional_json(r.peer_speedup); }},
    ReproColumn{"verdict", "in a word", [](const ReproRow& r) { return Json(r.verdict); }},
    ReproColumn{"note", "what the word leaves out", [](const ReproRow& r) { return Json(r.note); }},
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, separator);) words.push_back(word);
  return words;
}

// Fields of a line of CSV, quotes taken off.
std::vector<std::string> csv_fields(const std::string& line) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '"' && quoted && i + 1 < line.size() && line[i + 1] == '"') {
      fields.back() += line[++i];
    } else if (line[i] == '"') {
      quoted = !quoted;
    } else if (line[i] == ',' && !quoted) {
      fields.emplace_back();
    } else if (line[i] != '\r') {
      fields.back() += line[i];
    }
  }
  return fields;
}

// A line's time in a cell: the whole, or the stages that it names.
struct LineTime {
  std::vector<double> seconds;  // one entry where it is made of stages
  double bound_seconds = 0.0;
  std::vector<std::string> more;  // stages that run in one launch with those asked for
};

std::optional<LineTime> time_of(const ReproLine& line, const ReproArm& arm, const Roof& roof) {
  if (line.stages.empty()) return LineTime{arm.seconds, arm.bytes / roof.read_bytes_per_s, {}};
  LineTime time{{0.0}, 0.0, {}};
  bool found = false;
  for (const ReproStage& stage : arm.stages) {
    const std::vector<std::string> parts = split(stage.name, '+');
    const auto asked = [&](const std::string& part) {
      return std::find(line.stages.begin(), line.stages.end(), part) != line.stages.end();
    };
    if (std::none_of(parts.begin(), parts.end(), asked)) continue;
    found = true;
    time.seconds[0] += stage.seconds;
    time.bound_seconds += stage.bound_seconds;
    for (const std::string& part : parts) {
      if (!asked(part)) time.more.push_back(part);
    }
  }
  if (!found) return {};
  return time;
}

// A paper's number as a speed-up over the baseline of its panel.
std::optional<double> paper_speedup(const ReproPanel& panel, const ReproLine& line, std::size_t at) {
  if (!line.paper[at]) return {};
  if (panel.unit == ReproUnit::kShare) return 1.0 / *line.paper[at];
  const auto is_baseline = [&](const ReproLine& one) {
    return one.attention == panel.baseline && one.stages.empty() && one.paper[at].has_value();
  };
  const auto baseline = std::find_if(panel.lines.begin(), panel.lines.end(), is_baseline);
  if (panel.unit == ReproUnit::kTimes) {
    return *line.paper[at] / (baseline == panel.lines.end() ? 1.0 : *baseline->paper[at]);
  }
  if (baseline == panel.lines.end()) return {};
  return *baseline->paper[at] / *line.paper[at];
}

std::string verdict_of(const ReproPanel& panel, const ReproRow& row, bool judged) {
  const ReproLine& line = *row.line;
  if (line.attention == panel.baseline && line.stages.empty()) return "baseline";
  if (line.part) return "part";
  if (!line.stages.empty() && !row.time_us) return "inseparable";
  if (!row.paper_speedup) return "unpublished";
  if (!judged) return "unjudged";
  const double share = row.speedup.value / *row.paper_speedup;
  if (share > 1.0 + kSame) return "exceeded";
  if (share >= 1.0 - kSame) return "reproduced";
  return row.speedup_bound && *row.speedup_bound < (1.0 - kSame) * *row.paper_speedup ? "impossible" : "missed";
}

void set_ours(ReproRow& row, const LineTime& time) {
  const ReproUnit unit = row.panel->unit;
  const double median = quantile(time.seconds, 0.5);
  if (unit == ReproUnit::kTimes) return;
  if (unit == ReproUnit::kShare) {
    row.ours = 1.0 / row.speedup.value;
    if (row.speedup.high) row.ours_low = 1.0 / *row.speedup.high;
    if (row.speedup.low) row.ours_high = 1.0 / *row.speedup.low;
    return;
  }
  const double scale = unit == ReproUnit::kUs ? 1e6 : 1e3;
  row.ours = median * scale;
  if (time.seconds.size() < 2) return;
  row.ours_low = quantile(time.seconds, 0.0) * scale;
  row.ours_high = quantile(time.seconds, 1.0) * scale;
}

void set_peer(ReproRow& row, std::span<const PeerTime> peers, double seconds) {
  if (row.panel->measure != ReproMeasure::kOperator || !row.line->stages.empty()) return;
  for (const PeerTime& peer : peers) {
    if (peer.model != row.model || peer.context != row.context || peer.batch != row.panel->batch) continue;
    if (row.peer_us && *row.peer_us <= peer.attention_us) continue;
    row.peer = peer.engine;
    row.peer_us = peer.attention_us;
    row.peer_speedup = peer.attention_us * 1e-6 / seconds;
  }
}

const ReproArm& arm_of(const ReproResult& result, const std::string& attention) {
  return *std::find_if(result.arms.begin(), result.arms.end(),
                       [&](const ReproArm& arm) { return arm.attention == attention; });
}

void measure_row(ReproRow& row, const ReproResult& result, std::span<const PeerTime> peers) {
  const ReproArm& arm = arm_of(result, row.line->attention);
  const ReproArm& baseline = arm_of(result, row.panel->baseline);
  row.kept_tokens = arm.kept_tokens;
  row.kept_tokens_p99 = arm.kept_tokens_p99;
  row.kept_share = arm.kept_tokens / row.context;
  row.kept_mass = arm.kept_mass;
  row.sigma = result.sigma;
  const std::optional<LineTime> time = time_of(*row.line, arm, result.roof);
  if (!time) {
    row.note = "no such stage here: its work is part of another's";
    return;
  }
  const double median = quantile(time->seconds, 0.5);
  if (!time->more.empty()) {
    row.note = fmt::format("in one launch with {}, {:.1f} us together", fmt::join(time->more, ", "), median * 1e6);
    return;
  }
  if (median <= 0.0) {
    row.note = "too short to tell from the events around it";
    return;
  }
  row.time_us = median * 1e6;
  row.bound_us = time->bound_seconds * 1e6;
  if (arm.cold) row.bound_share = time->bound_seconds / median;
  row.speedup = row.line->stages.empty()
                    ? ratio_of_means(baseline.seconds, time->seconds, kConfidence)
                    : Ratio{.value = quantile(baseline.seconds, 0.5) / median, .low = {}, .high = {}};
  if (time->bound_seconds > 0.0) {
    row.speedup_bound = baseline.bytes / result.roof.read_bytes_per_s / time->bound_seconds;
  }
  set_ours(row, *time);
  set_peer(row, peers, median);
}

}  // namespace

std::vector<PeerTime> parse_peers(const std::string& text, const std::string& source) {
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line);
  const std::vector<std::string> head = csv_fields(line);
  const auto column = [&](const std::string& name) {
    const auto found = std::find(head.begin(), head.end(), name);
    if (found == head.end()) {
      refuse({"reading --peer-csv " + source, "no column " + name, "the columns that apps/peers write", ""});
    }
    return static_cast<std::size_t>(found - head.begin());
  };
  const std::size_t engine = column("engine"), attention = column("attention"), model = column("model");
  const std::size_t context = column("context"), batch = column("batch"), us = column("attention_us");
  std::vector<PeerTime> peers;
  while (std::getline(lines, line)) {
    const std::vector<std::string> fields = csv_fields(line);
    if (fields == head || fields.size() != head.size() || fields[us].empty() || fields[engine] == "vesper") continue;
    const auto number = [&](std::size_t at, auto& value) {
      const std::string& field = fields[at];
      const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
      if (error == std::errc() && end == field.data() + field.size()) return;
      refuse({"reading --peer-csv " + source, fmt::format("{} in {}", in_quotes(field), head[at]), "a number", ""});
    };
    PeerTime& peer = peers.emplace_back();
    peer.engine = fmt::format("{} {}", fields[engine], fields[attention]);
    peer.model = fields[model];
    number(context, peer.context);
    number(batch, peer.batch);
    number(us, peer.attention_us);
  }
  return peers;
}

std::vector<ReproRow> make_rows(const Experiment& experiment, std::span<const ReproCell> cells,
                                std::span<const ReproResult> results, std::span<const PeerTime> peers, bool judged) {
  std::vector<ReproRow> rows;
  for (const ReproPanel& panel : experiment.panels) {
    for (std::size_t at = 0; at < panel.contexts.size(); ++at) {
      const auto cell = std::find_if(cells.begin(), cells.end(),
                                     [&](const ReproCell& one) { return one.serves(panel, panel.contexts[at]); });
      const ReproResult& result = results[static_cast<std::size_t>(cell - cells.begin())];
      for (const ReproLine& line : panel.lines) {
        ReproRow& row = rows.emplace_back();
        row.panel = &panel;
        row.line = &line;
        row.model = panel.model;
        row.context = panel.contexts[at];
        row.paper = line.paper[at];
        row.paper_speedup = paper_speedup(panel, line, at);
        if (result.skipped) {
          row.verdict = "unfit";
          row.note = *result.skipped;
          continue;
        }
        measure_row(row, result, peers);
        row.verdict = verdict_of(panel, row, judged);
      }
    }
  }
  return rows;
}

std::span<const Verdict> verdicts() {
  return kVerdicts;
}

std::span<const ReproColumn> repro_columns() {
  return kColumns;
}

}  // namespace vesper
