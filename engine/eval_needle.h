// Needle questions as token ids with known answers (configs/demo/questions), teacher-forced through decode.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/eval.h"

namespace vesper {

// What a needle's value is made of.
enum class NeedleKind : std::uint8_t { kWords, kNumbers };
inline constexpr std::array kNeedleKinds = {NeedleKind::kWords, NeedleKind::kNumbers};
std::string_view needle_kind_name(NeedleKind kind);

// A row asks this many questions, at its end.
inline constexpr int kQuestionsARow = 4;

struct NeedleRow {
  NeedleKind kind = NeedleKind::kWords;
  TokenIds ids;              // a text, then questions and answers
  std::vector<int> answers;  // ascending positions of the answers' ids, the same count for each question
};

// Rows of context + 1 ids from a u16 file and its index: a JSON object with, under the context's number, "rows",
// "row_tokens", "kind" and "answer_positions". Throws an input error where they do not fit each other.
std::vector<NeedleRow> read_needle_rows(const std::string& ids_path, const std::string& index_path, int context);

struct NeedleCount {
  int right = 0;
  int total = 0;
};

struct NeedleScore {
  std::array<NeedleCount, kNeedleKinds.size()> of_kind;

  NeedleCount& operator[](NeedleKind kind) { return of_kind[static_cast<std::size_t>(kind)]; }
  const NeedleCount& operator[](NeedleKind kind) const { return of_kind[static_cast<std::size_t>(kind)]; }
};

// An answer is right where each of its ids is the likeliest after the true ids before it, which is to say where greedy
// decoding writes it. The row's last id is only a target; of the others, those from 41 before the first answer on go
// through decode, at most 400.
NeedleScore eval_needle_rows(Engine& engine, std::span<const NeedleRow> rows, const Progress& progress);

}  // namespace vesper
