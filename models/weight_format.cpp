#include "models/weight_format.h"

#include <algorithm>
#include <array>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "models/weight_table.h"

namespace vesper {
namespace {

constexpr std::array<std::string_view, 3> kNames = {"stored", "int4", "int4,head"};  // by WeightFormat
constexpr std::int64_t kAlignment = 256;

}  // namespace

std::string_view weight_format_name(WeightFormat format) {
  return kNames[static_cast<std::size_t>(format)];
}

WeightFormat weight_format_of(const std::string& name) {
  const auto* const found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) {
    refuse({"reading --weights", in_quotes(name), "stored, int4 or int4,head", ""});
  }
  return static_cast<WeightFormat>(found - kNames.begin());
}

const Int4Part* Int4Layout::of(std::size_t weight) const {
  const auto found =
      std::find_if(parts.begin(), parts.end(), [&](const Int4Part& part) { return part.weight == weight; });
  return found == parts.end() ? nullptr : &*found;
}

bool Int4Layout::replaces(std::size_t weight) const {
  const Int4Part* part = of(weight);
  return part != nullptr && !part->beside;
}

Int4Layout lay_out_int4(std::span<const ExpectedWeight> expected, bool tied_head, WeightFormat format) {
  Int4Layout layout;
  const auto add = [&](std::size_t first, std::size_t end, bool beside) {
    Int4Part part{.weight = first,
                  .offset = (layout.bytes + kAlignment - 1) / kAlignment * kAlignment,
                  .columns = expected[first].shape[1],
                  .beside = beside};
    for (std::size_t i = first; i < end; ++i) part.rows += expected[i].shape[0];
    for (; part.weight < end; ++part.weight) {
      layout.parts.push_back(part);
      part.first_row += expected[part.weight].shape[0];
    }
    layout.bytes = part.offset + Int4Matrix{.rows = part.rows, .columns = part.columns}.bytes();
  };
  for (std::size_t i = 0; format != WeightFormat::kStored && i < expected.size();) {
    std::size_t end = i + 1;  // of the parts of its matrix
    while (end < expected.size() && expected[end].rule->destination == expected[i].rule->destination) ++end;
    const bool is_embedding = i == 0;
    const bool is_head = !is_embedding && !expected[i].rule->is_per_layer();
    if (is_embedding && tied_head && format == WeightFormat::kInt4Head) add(i, end, true);
    if (expected[i].rule->is_matrix() && !is_embedding && (!is_head || format == WeightFormat::kInt4Head)) {
      add(i, end, false);
    }
    i = end;
  }
  return layout;
}

}  // namespace vesper
