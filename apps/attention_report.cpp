#include "apps/attention_report.h"

#include <fmt/format.h>

#include <algorithm>

#include <nlohmann/json.hpp>

#include "engine/memory_plan.h"

namespace vesper {
namespace {

AttentionTotals sum_of(const std::vector<AttentionTotals>& totals, int first, int last) {
  AttentionTotals sum;
  for (int l = first; l <= last; ++l) {
    const AttentionTotals& layer = totals[static_cast<std::size_t>(l)];
    sum.backend = layer.backend;
    sum.steps += layer.steps;
    sum.sparse_steps += layer.sparse_steps;
    sum.lists += layer.lists;
    sum.visible_tokens += layer.visible_tokens;
    sum.kept_tokens += layer.kept_tokens;
    sum.sampled_tokens += layer.sampled_tokens;
    sum.guard_hits += layer.guard_hits;
    sum.dense_bytes += layer.dense_bytes;
    sum.kv_bytes += layer.kv_bytes;
    sum.metadata_bytes += layer.metadata_bytes;
  }
  return sum;
}

double share(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

std::vector<std::pair<int, int>> layer_runs(const AttentionConfig& attention) {
  std::vector<std::pair<int, int>> runs;
  const int layers = static_cast<int>(attention.layers.size());
  for (int first = 0; first < layers;) {
    int last = first;
    while (last + 1 < layers &&
           attention.layers[static_cast<std::size_t>(last) + 1] == attention.layers[static_cast<std::size_t>(first)]) {
      ++last;
    }
    runs.emplace_back(first, last);
    first = last + 1;
  }
  return runs;
}

std::string layer_range(int first, int last) {
  return first == last ? fmt::format("{}", first) : fmt::format("{}-{}", first, last);
}

std::vector<std::string> attention_report(const AttentionConfig& attention,
                                          const std::vector<AttentionTotals>& totals) {
  std::vector<std::string> lines;
  for (const auto& [first, last] : layer_runs(attention)) {
    const AttentionTotals sum = sum_of(totals, first, last);
    if (sum.backend == "dense" || sum.steps == 0) continue;
    const std::string head = fmt::format("layers {} {}", layer_range(first, last), sum.backend);
    if (sum.sparse_steps == 0) {
      lines.push_back(head + ": never sparse, every context was at or under the threshold");
      continue;
    }
    std::string line = fmt::format("{}: kept {:.2f} % of {} tokens a KV head", head,
                                   100.0 * share(sum.kept_tokens, sum.visible_tokens),
                                   sum.visible_tokens / std::max<std::int64_t>(1, sum.lists));
    if (sum.sampled_tokens > 0) {
      line += fmt::format(" ({:.2f} % sampled)", 100.0 * share(sum.sampled_tokens, sum.visible_tokens));
    }
    if (sum.guard_hits > 0) line += fmt::format(", {} guard hits", sum.guard_hits);
    line +=
        fmt::format(" | read {} of dense {}: K and V {}, metadata {}", format_bytes(sum.kv_bytes + sum.metadata_bytes),
                    format_bytes(sum.dense_bytes), format_bytes(sum.kv_bytes), format_bytes(sum.metadata_bytes));
    if (sum.sparse_steps < sum.steps) line += fmt::format(" | {} of {} steps sparse", sum.sparse_steps, sum.steps);
    lines.push_back(line);
  }
  return lines;
}

nlohmann::json attention_report_json(const AttentionConfig& attention, const std::vector<AttentionTotals>& totals) {
  nlohmann::json report = nlohmann::json::array();
  for (const auto& [first, last] : layer_runs(attention)) {
    const AttentionTotals sum = sum_of(totals, first, last);
    // Of a run without lists there is no share, and a 0 would read as one.
    const auto of_visible = [&](std::int64_t tokens) -> nlohmann::json {
      if (sum.visible_tokens == 0) return nullptr;
      return share(tokens, sum.visible_tokens);
    };
    report.push_back({{"layers", layer_range(first, last)},
                      {"backend", describe(attention.layers[static_cast<std::size_t>(first)])},
                      {"steps", sum.steps},
                      {"sparse_steps", sum.sparse_steps},
                      {"visible_tokens", sum.visible_tokens},
                      {"kept_tokens", sum.kept_tokens},
                      {"kept_share", of_visible(sum.kept_tokens)},
                      {"sampled_share", of_visible(sum.sampled_tokens)},
                      {"guard_hits", sum.guard_hits},
                      {"dense_bytes", sum.dense_bytes},
                      {"kv_bytes", sum.kv_bytes},
                      {"metadata_bytes", sum.metadata_bytes}});
  }
  return report;
}

}  // namespace vesper
