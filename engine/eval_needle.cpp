#include "engine/eval_needle.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

// Ours: a line of text before the first question, so that decode is under way when it comes; a bound on the cost of a
// row whose answers lie far apart.
constexpr int kLeadTokens = 40;
constexpr int kMaxDecoded = 400;

int decoded_tokens(const NeedleRow& row) {
  const int tokens = static_cast<int>(row.ids.size());
  return std::min({tokens - row.answers.front() + kLeadTokens, kMaxDecoded, tokens - 1});
}

std::optional<NeedleKind> needle_kind_of(const nlohmann::json& name) {
  for (const NeedleKind kind : kNeedleKinds) {
    if (name == needle_kind_name(kind)) return kind;
  }
  return std::nullopt;
}

// Ascending, all inside the row, within reach of decode, the same count for each question.
bool fits_row(const NeedleRow& row) {
  const std::vector<int>& answers = row.answers;
  const int tokens = static_cast<int>(row.ids.size());
  return !answers.empty() && answers.size() % kQuestionsARow == 0 && answers.front() >= 1 && answers.back() < tokens &&
         std::adjacent_find(answers.begin(), answers.end(), std::greater_equal<>()) == answers.end() &&
         answers.front() >= tokens - decoded_tokens(row);
}

// The entry of one context length. nlohmann's own exceptions name no file, so types are checked here.
nlohmann::json read_entry(const std::string& path, int context) {
  const nlohmann::json index = read_json_file(path);
  std::string known;
  if (index.is_object()) {
    for (const auto& [name, value] : index.items()) known += (known.empty() ? "" : ", ") + in_quotes(name);
  }
  const std::string wanted = std::to_string(context);
  if (!index.is_object() || !index.contains(wanted)) {
    refuse({"reading " + path, "no entry \"" + wanted + "\"",
            known.empty() ? "an object of lengths" : "one of " + known, "change --context"});
  }
  const nlohmann::json& entry = index[wanted];
  const auto integer = [&](const char* name) { return entry.contains(name) && entry[name].is_number_unsigned(); };
  const auto array = [&](const char* name) { return entry.contains(name) && entry[name].is_array(); };
  if (!entry.is_object() || !integer("rows") || !integer("row_tokens") || !array("kind") ||
      !array("answer_positions") || entry["kind"].size() != entry["rows"].get<std::size_t>() ||
      entry["answer_positions"].size() != entry["rows"].get<std::size_t>() ||
      entry["row_tokens"].get<std::uint64_t>() != static_cast<std::uint64_t>(context) + 1) {
    refuse({"reading entry \"" + wanted + "\" of " + path, "another shape",
            fmt::format("\"rows\", \"row_tokens\" ({}), and a \"kind\" and an \"answer_positions\" for each row",
                        context + 1),
            ""});
  }
  return entry;
}

int right_answers(Engine& engine, int request, const NeedleRow& row, const std::function<void(int tokens)>& on_step) {
  std::array<bool, kQuestionsARow> right;
  right.fill(true);
  const std::size_t answer_tokens = row.answers.size() / kQuestionsARow;
  feed_through_decode(
      engine, request, std::span(row.ids).first(row.ids.size() - 1), decoded_tokens(row),
      [&](int position, std::span<const float> logits) {
        const auto answer = std::lower_bound(row.answers.begin(), row.answers.end(), position + 1);
        if (answer == row.answers.end() || *answer != position + 1) return;
        const std::size_t question = static_cast<std::size_t>(answer - row.answers.begin()) / answer_tokens;
        right[question] = right[question] && likeliest(logits) == row.ids[static_cast<std::size_t>(*answer)];
      },
      on_step);
  return static_cast<int>(std::count(right.begin(), right.end(), true));
}

}  // namespace

std::string_view needle_kind_name(NeedleKind kind) {
  return kind == NeedleKind::kWords ? "words" : "numbers";
}

std::vector<NeedleRow> read_needle_rows(const std::string& ids_path, const std::string& index_path, int context) {
  const nlohmann::json entry = read_entry(index_path, context);
  const TokenIds ids = read_u16_ids(ids_path);
  const auto count = entry["rows"].get<std::size_t>();
  const std::size_t row_tokens = static_cast<std::size_t>(context) + 1;
  if (ids.size() % row_tokens != 0 || ids.size() / row_tokens != count) {
    refuse({"reading needle rows from " + ids_path, fmt::format("{} ids", ids.size()),
            fmt::format("{} rows of {}, as {} says", count, row_tokens, index_path),
            "check that --ids, --index and --context belong together"});
  }
  std::vector<NeedleRow> rows(count);
  for (std::size_t i = 0; i < count; ++i) {
    NeedleRow& row = rows[i];
    const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(i * row_tokens);
    row.ids.assign(begin, begin + static_cast<std::ptrdiff_t>(row_tokens));
    const std::optional<NeedleKind> kind = needle_kind_of(entry["kind"][i]);
    const nlohmann::json& answers = entry["answer_positions"][i];
    bool whole = kind.has_value() && answers.is_array();
    for (std::size_t a = 0; whole && a < answers.size(); ++a) {
      whole = answers[a].is_number_unsigned() && answers[a].get<std::uint64_t>() < row_tokens;
      if (whole) row.answers.push_back(answers[a].get<int>());
    }
    if (!whole || !fits_row(row)) {
      refuse({fmt::format("reading row {} of {}", i, index_path), "a kind or answer positions that cannot be",
              fmt::format("words or numbers, and ascending positions of {} answers in the last {} ids", kQuestionsARow,
                          kMaxDecoded),
              ""});
    }
    row.kind = *kind;
  }
  return rows;
}

NeedleScore eval_needle_rows(Engine& engine, std::span<const NeedleRow> rows, const Progress& progress) {
  std::int64_t total = 0;
  for (const NeedleRow& row : rows) total += static_cast<std::int64_t>(row.ids.size()) - 1;
  std::int64_t done = 0;
  NeedleScore score;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    NeedleCount& count = score[rows[i].kind];
    count.right += right_answers(engine, static_cast<int>(i), rows[i], [&](int tokens) {
      done += tokens;
      if (progress) progress(done, total);
    });
    count.total += kQuestionsARow;
  }
  return score;
}

}  // namespace vesper
