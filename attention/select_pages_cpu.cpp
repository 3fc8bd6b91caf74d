// Quest's selector on the CPU; see attention/select_pages.h.
//
// Every page score is the largest that q . k can be for k in a box [low_d, high_d]: of the page's keys themselves
// (min_max; with int8 bounds a box of whole steps around that one), or of one standard deviation around their mean
// (mean_std: q mu + |q| sigma is q (mu + sigma) where q > 0 and q (mu - sigma) where q < 0). So score = relu(q) . high
// - relu(-q) . low.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "attention/page_choice.h"
#include "attention/select_pages.h"
#include "engine/core/parallel.h"

namespace vesper::cpu {
namespace {

constexpr std::size_t kLanes = 8;  // partial sums side by side, which the compiler can hold in one register

// What the boxes of pages are made from; one page and KV head at a time.
struct Boxes {
  const LayerKv& kv;
  PageScore page_score;

  void read(std::int64_t page, std::int64_t g, int lines, std::vector<float>& low, std::vector<float>& high) const {
    switch (page_score) {
      case PageScore::kMinMax:
        return read_bounds(page, g, low, high);
      case PageScore::kMeanStd:
        return read_moments(page, g, lines, low, high);
      case PageScore::kMinMaxInt8:
        return read_int8_bounds(page, g, low, high);
    }
  }

 private:
  void read_bounds(std::int64_t page, std::int64_t g, std::vector<float>& low, std::vector<float>& high) const {
    const auto bounds = kv.bounds.as<const float, 4>();
    std::copy_n(&bounds(page, g, 0, 0), low.size(), low.begin());
    std::copy_n(&bounds(page, g, 1, 0), high.size(), high.begin());
  }

  void read_int8_bounds(std::int64_t page, std::int64_t g, std::vector<float>& low, std::vector<float>& high) const {
    const auto codes = kv.int8_bounds.as<const std::uint8_t, 4>();
    const auto scales = kv.int8_scales.as<const bf16, 4>();
    for (std::size_t d = 0; d < low.size(); ++d) {
      const auto value = [&](int side) {
        const int code = codes(page, g, side, d) - kBoundZero;
        return static_cast<float>(code) * to_float(scales(page, g, side, d / kBoundSpan));
      };
      low[d] = value(0);
      high[d] = value(1);
    }
  }

  void read_moments(std::int64_t page, std::int64_t g, int lines, std::vector<float>& low,
                    std::vector<float>& high) const {
    const auto moments = kv.moments.as<const float, 4>();
    const float* first = &moments(page, g, 0, 0);
    const float* second = &moments(page, g, 1, 0);
    const float per_line = 1.0F / static_cast<float>(lines);
    for (std::size_t d = 0; d < low.size(); ++d) {
      const float mean = first[d] * per_line;
      const float variance = std::max(0.0F, second[d] * per_line - mean * mean);  // rounding may leave it below zero
      const float deviation = std::sqrt(variance);
      low[d] = mean - deviation;
      high[d] = mean + deviation;
    }
  }
};

float largest_product(const float* q, const std::vector<float>& low, const std::vector<float>& high) {
  std::array<float, kLanes> sums{};
  for (std::size_t d = 0; d < low.size(); d += kLanes) {
    const std::size_t lanes = std::min(kLanes, low.size() - d);
    for (std::size_t i = 0; i < lanes; ++i) {
      sums[i] += std::max(q[d + i], 0.0F) * high[d + i] + std::min(q[d + i], 0.0F) * low[d + i];
    }
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0F);
}

// The group's one score; a head whose score is NaN does not count towards the largest.
float group_score_of(GroupScore group_score, const float* q, int group, const std::vector<float>& low,
                     const std::vector<float>& high) {
  float largest = -INFINITY;
  float sum = 0.0F;
  for (int h = 0; h < group; ++h) {
    const float score = largest_product(q + static_cast<std::size_t>(h) * low.size(), low, high);
    if (score > largest) largest = score;
    sum += score;
  }
  switch (group_score) {
    case GroupScore::kMax:
      return largest;
    case GroupScore::kSum:
      return sum;
    case GroupScore::kMean:
      return sum / static_cast<float>(group);
  }
  return sum;
}

}  // namespace

void score_pages(const AttentionShape& shape, TensorView<const float, 2> q, const LayerKv& kv, const Batch& batch,
                 PageScore page_score, GroupScore group_score, DenseLimit dense, TensorView<float, 3> scores) {
  const Boxes boxes{.kv = kv, .page_score = page_score};
  const auto head_dim = static_cast<std::size_t>(shape.head_dim);
  const std::int64_t capacity = scores.shape(2);

  parallel_for(std::int64_t{batch.seqs} * shape.kv_heads * capacity, 16, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> low(head_dim);
    std::vector<float> high(head_dim);
    for (std::int64_t i = begin; i < end; ++i) {
      const auto p = static_cast<int>(i % capacity);
      const auto g = static_cast<int>(i / capacity % shape.kv_heads);
      const std::int64_t s = i / capacity / shape.kv_heads;
      const int lines = std::min(shape.page_tokens, batch.kv_len(s) - p * shape.page_tokens);
      if (batch.kv_len(s) <= dense.tokens || lines <= 0) continue;
      boxes.read(batch.page_table(s, p), g, lines, low, high);
      scores(s, g, p) = group_score_of(group_score, &q(s, std::int64_t{g} * shape.group() * shape.head_dim),
                                       shape.group(), low, high);
    }
  });
}

void select_pages(const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                  const PageBudget& budget, DenseLimit dense, const Selection& pages) {
  parallel_for(std::int64_t{batch.seqs} * shape.kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int32_t> between;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t s = i / shape.kv_heads;
      const std::int64_t g = i % shape.kv_heads;
      if (batch.kv_len(s) <= dense.tokens) continue;
      const PageChoice choice = page_choice(budget, batch.kv_len(s), shape.page_tokens);

      const auto better = [&](std::int32_t a, std::int32_t b) {
        const auto score = [&](std::int32_t p) { return std::isnan(scores(s, g, p)) ? -INFINITY : scores(s, g, p); };
        return score(a) > score(b) || (score(a) == score(b) && a < b);
      };
      between.resize(static_cast<std::size_t>(choice.window_begin - choice.sink_end));
      std::iota(between.begin(), between.end(), choice.sink_end);
      const auto chosen_end = between.begin() + choice.chosen;
      std::nth_element(between.begin(), chosen_end, between.end(), better);
      std::sort(between.begin(), chosen_end);

      std::int32_t* index = &pages.index(s, g, 0);
      std::int32_t* to = index;
      for (std::int32_t p = 0; p < choice.sink_end; ++p) *to++ = p;
      to = std::copy(between.begin(), chosen_end, to);
      for (std::int32_t p = choice.window_begin; p < choice.pages; ++p) *to++ = p;
      pages.count(s, g) = pages.tail_begin(s, g) = static_cast<std::int32_t>(to - index);
    }
  });
}

}  // namespace vesper::cpu
