// Quest's layer in one launch against its two on the GPU, which are tested against the CPU: the same lists, and the
// same bits of every output where lists are split alike.
#include "attention/attend_chosen.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/attend_selected.h"
#include "attention/sparse.h"
#include "tests/attention/attend_world.h"
#include "tests/attention/page_lists.h"
#include "tests/gpu.h"

namespace vesper {
namespace {

// Bounds, which need not be of the keys: what they are does not matter to the choice.
// The last three are random and wider, so that pages score better, the later in the context, near its end, or in every
// fourth tile of 16: what a few tiles let expect of the others is wrong.
enum class Bounds { kRandom, kTies, kEqual, kFarOutliers, kNotFinite, kRising, kHighAtEnd, kHighTiles };

// How much wider the bounds of each page and KV head are.
std::vector<float> make_widths(const RaggedBatch& ragged, Bounds kind, const AttentionShape& shape) {
  const auto kv_heads = static_cast<std::size_t>(shape.kv_heads);
  std::vector<float> widths(static_cast<std::size_t>(ragged.pages) * kv_heads);
  if (kind < Bounds::kRising) return widths;
  const Batch& batch = ragged.batch;
  for (std::int64_t s = 0; s < batch.seqs; ++s) {
    const int pages = page_count(batch.kv_len(s), shape.page_tokens);
    for (int p = 0; p < pages; ++p) {
      const bool high = kind == Bounds::kHighAtEnd ? 8 * p >= 7 * pages : p / 16 % 4 == 0;
      const float share = static_cast<float>(p) / static_cast<float>(pages);
      const float width = kind == Bounds::kRising ? share : high ? 1.0F : 0.0F;
      const auto row = static_cast<std::size_t>(batch.page_table(s, p)) * kv_heads;
      for (std::size_t g = 0; g < kv_heads; ++g) widths[row + g] = 3.0F * width;
    }
  }
  return widths;
}

std::vector<float> make_bounds(std::mt19937& random, Bounds kind, const std::vector<float>& widths, int row_channels) {
  const std::size_t rows = widths.size();
  std::vector<float> bounds = random_floats(random, rows * static_cast<std::size_t>(row_channels));
  std::uniform_int_distribution<int> die(0, 49);
  for (std::size_t row = 0; row < rows; ++row) {
    const auto begin = bounds.begin() + static_cast<std::ptrdiff_t>(row) * row_channels;
    const auto set = [&](float value) { std::fill(begin, begin + row_channels, value); };
    const int face = die(random);
    if (kind == Bounds::kTies) set(static_cast<float>(face % 4));
    if (kind == Bounds::kEqual) set(0.5F);
    if (kind == Bounds::kFarOutliers && face == 0) set(3e30F);
    if (kind == Bounds::kNotFinite && face < 5) set(face == 0 ? INFINITY : face == 1 ? -INFINITY : NAN);
    for (int i = 0; i < row_channels; ++i) begin[i] += i < row_channels / 2 ? -widths[row] : widths[row];
  }
  return bounds;
}

// Codes and scales of rows as those, likewise of no keys.
struct Codes {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
};
Codes make_codes(std::mt19937& random, Bounds kind, const std::vector<float>& widths, int row_channels) {
  const auto channels = static_cast<std::size_t>(row_channels);
  const std::vector<float> bounds = make_bounds(random, kind, widths, row_channels);
  Codes made{std::vector<std::uint8_t>(bounds.size()), std::vector<float>(bounds.size() / kBoundSpan)};
  for (std::size_t i = 0; i < bounds.size(); ++i) {
    const bool small = std::abs(bounds[i]) <= 4.0F;
    made.codes[i] = static_cast<std::uint8_t>(kBoundZero + (small ? static_cast<int>(bounds[i] * 31.0F) : 127));
  }
  std::uniform_real_distribution<float> scale(0.01F, 0.03F);
  for (std::size_t i = 0; i < made.scales.size(); ++i) {
    const float first = bounds[i * kBoundSpan / channels * channels];  // of the row, as far as rows are of one value
    const bool small = std::abs(first) <= 4.0F;
    made.scales[i] = !small ? first / 127.0F : kind == Bounds::kRandom ? scale(random) : 1.0F / 31.0F;
  }
  return made;
}

int widest_cluster() {
  return cuda::chosen_cluster(make_shape(1, 1, 128, 16), 1, 8192, 128);
}

template <typename T>
class ChosenWorld {
 public:
  ChosenWorld(std::mt19937& random, const AttentionShape& shape, const std::vector<int>& lengths, Bounds kind)
      : shape_(shape),
        ragged_(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), shape.page_tokens),
        device_(stream_, ragged_),
        capacity_(ragged_.batch.page_table.shape(1)),
        k_(upload_as<T>(stream_, random_floats(random, elements(shape.page_tokens)))),
        v_(upload_as<T>(stream_, random_floats(random, elements(shape.page_tokens)))),
        bounds_(
            upload_as<T>(stream_, make_bounds(random, kind, make_widths(ragged_, kind, shape), 2 * shape.head_dim))),
        q_(upload_as<T>(stream_, random_floats(random, query_elements()))) {
    const Codes made = make_codes(random, kind, make_widths(ragged_, kind, shape), 2 * shape.head_dim);
    codes_ = upload(stream_, made.codes);
    scales_ = upload_as<bf16>(stream_, made.scales);
  }

  struct Found {
    std::vector<float> out, lse;
    std::vector<std::int32_t> index, count, tail_begin;
    std::vector<std::int64_t> totals;

    // In words, where it is not the same; outputs by their bits, since NaN may be among them.
    [[nodiscard]] std::string differs_from(const Found& other) const {
      if (count != other.count || tail_begin != other.tail_begin) return "other counts";
      if (index != other.index) return "other lists";
      if (totals != other.totals) return "other totals";
      const auto same = [](float a, float b) { return std::bit_cast<unsigned>(a) == std::bit_cast<unsigned>(b); };
      if (!std::equal(out.begin(), out.end(), other.out.begin(), same)) return "other outputs";
      if (!std::equal(lse.begin(), lse.end(), other.lse.begin(), same)) return "another log-sum-exp";
      return "";
    }
  };

  Found in_two(PageScore page_score, const PageBudget& budget, GroupScore group_score, DenseLimit dense, int splits) {
    const std::int64_t seqs = ragged_.batch.seqs;
    const Buffer scores = upload(stream_, std::vector<float>(lists() * static_cast<std::size_t>(capacity_)));
    const Buffer tickets = upload(stream_, std::vector<std::int32_t>(lists()));
    const auto partial_rows = static_cast<std::size_t>(seqs * shape_.heads * splits);
    const Buffer part = upload(stream_, std::vector<float>(partial_rows * static_cast<std::size_t>(shape_.head_dim)));
    const Buffer part_lse = upload(stream_, std::vector<float>(partial_rows));
    return run(
        [&](const Selection& pages, const TensorRef& out, TensorView<float, 2> lse, const KeptCounters& counters) {
          cuda::choose_pages(stream_.exec(), shape_, q(), kv(), device_.batch, page_score, group_score, budget, dense,
                             {.scores = scores.template view<float>(seqs, shape_.kv_heads, capacity_),
                              .tickets = tickets.template view<std::int32_t>(seqs, shape_.kv_heads)},
                             pages);
          attend_selected(stream_.exec(), shape_, q(), kv(), device_.batch, pages, kMinEntries, dense,
                          {part.template view<float>(seqs, shape_.heads, splits, shape_.head_dim),
                           part_lse.template view<float>(seqs, shape_.heads, splits)},
                          out, lse);
          count_selected(stream_.exec(), shape_, device_.batch, pages, dense, counters);
        });
  }

  Found in_one(PageScore page_score, const PageBudget& budget, GroupScore group_score, DenseLimit dense, int cluster) {
    return run(
        [&](const Selection& pages, const TensorRef& out, TensorView<float, 2> lse, const KeptCounters& counters) {
          cuda::attend_chosen(stream_.exec(), shape_, q(), kv(), device_.batch, page_score, group_score, budget, dense,
                              cluster, kMinEntries, pages, out, lse, counters);
        });
  }

  Found in_choice(PageScore page_score, const PageBudget& budget, GroupScore group_score, DenseLimit dense,
                  int cluster) {
    return run([&](const Selection& pages, const TensorRef& /*out*/, TensorView<float, 2> /*lse*/,
                   const KeptCounters& /*counters*/) {
      cuda::choose_in_clusters(stream_.exec(), shape_, q(), kv(), device_.batch, page_score, group_score, budget, dense,
                               cluster, pages);
    });
  }

  void check(const PageBudget& budget, GroupScore group_score, DenseLimit dense, const std::string& what) {
    for (const PageScore page_score : {PageScore::kMinMax, PageScore::kMinMaxInt8}) {
      for (const int cluster : {2, 4, 8, 16}) {
        if (cluster > widest_cluster()) continue;
        const Found expected = in_two(page_score, budget, group_score, dense, cluster);
        EXPECT_EQ(in_one(page_score, budget, group_score, dense, cluster).differs_from(expected), "")
            << what << (page_score == PageScore::kMinMaxInt8 ? " in 8 bits" : "") << ", group " << shape_.group()
            << ", head_dim " << shape_.head_dim << ", page_tokens " << shape_.page_tokens << ", budget "
            << budget.tokens.value << ", group score " << static_cast<int>(group_score) << ", cluster " << cluster;
        if (cluster > 8) continue;  // wider ones are for finalists
        const Found chosen = in_choice(page_score, budget, group_score, dense, cluster);
        EXPECT_TRUE(chosen.count == expected.count && chosen.tail_begin == expected.tail_begin &&
                    chosen.index == expected.index)
            << what << ", chosen alone, group " << shape_.group() << ", budget " << budget.tokens.value << ", cluster "
            << cluster;
      }
    }
  }

 private:
  static constexpr int kMinEntries = 3;

  template <typename Attend>
  Found run(const Attend& attend) {
    const std::int64_t seqs = ragged_.batch.seqs;
    PageLists host(ragged_.batch, shape_.kv_heads);
    const Buffer index = upload(stream_, host.index);
    const Buffer count = upload(stream_, host.count);
    const Buffer tail_begin = upload(stream_, host.tail_begin);
    const std::vector<float> poison(query_elements(), -7.0F);
    const Buffer out = upload_as<T>(stream_, poison);
    const Buffer lse = upload(stream_, std::vector<float>(static_cast<std::size_t>(seqs * shape_.heads), -7.0F));
    const Buffer totals =
        upload(stream_, std::vector<std::int64_t>(std::size_t{4} * static_cast<std::size_t>(shape_.kv_heads), 7));
    const auto total = [&](int i) {
      return TensorView<std::int64_t, 1>(
          static_cast<std::int64_t*>(totals.data()) + std::ptrdiff_t{i} * shape_.kv_heads, shape_.kv_heads);
    };
    attend(Selection{.unit = SelectionUnit::kPages,
                     .index = index.view<std::int32_t>(seqs, shape_.kv_heads, capacity_),
                     .count = count.view<std::int32_t>(seqs, shape_.kv_heads),
                     .tail_begin = tail_begin.view<std::int32_t>(seqs, shape_.kv_heads),
                     .tail_log_weight = {}},
           out.ref(DTypeOf<T>::value, seqs, shape_.heads * shape_.head_dim), lse.view<float>(seqs, shape_.heads),
           KeptCounters{total(0), total(1), total(2), total(3)});
    return {download_floats<T>(stream_, out, poison.size()),
            download<float>(stream_, lse, static_cast<std::size_t>(seqs * shape_.heads)),
            download<std::int32_t>(stream_, index, host.index.size()),
            download<std::int32_t>(stream_, count, host.count.size()),
            download<std::int32_t>(stream_, tail_begin, host.tail_begin.size()),
            download<std::int64_t>(stream_, totals, std::size_t{4} * static_cast<std::size_t>(shape_.kv_heads))};
  }

  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(ragged_.pages) * shape_.kv_heads; }
  [[nodiscard]] std::size_t elements(int lines) const {
    return rows() * static_cast<std::size_t>(lines) * static_cast<std::size_t>(shape_.head_dim);
  }
  [[nodiscard]] std::size_t query_elements() const {
    return static_cast<std::size_t>(ragged_.batch.seqs) * static_cast<std::size_t>(shape_.heads * shape_.head_dim);
  }
  [[nodiscard]] std::size_t lists() const { return static_cast<std::size_t>(ragged_.batch.seqs) * shape_.kv_heads; }
  [[nodiscard]] TensorRef q() const {
    return q_.ref(DTypeOf<T>::value, ragged_.batch.seqs, shape_.heads * shape_.head_dim);
  }
  [[nodiscard]] LayerKv kv() const {
    const DType dtype = DTypeOf<T>::value;
    LayerKv kv{.k = k_.ref(dtype, ragged_.pages, shape_.kv_heads, shape_.page_tokens, shape_.head_dim),
               .v = v_.ref(dtype, ragged_.pages, shape_.kv_heads, shape_.page_tokens, shape_.head_dim)};
    kv.bounds = bounds_.ref(dtype, ragged_.pages, shape_.kv_heads, 2, shape_.head_dim);
    kv.int8_bounds = codes_.ref(DType::kU8, ragged_.pages, shape_.kv_heads, 2, shape_.head_dim);
    kv.int8_scales = scales_.ref(DType::kBf16, ragged_.pages, shape_.kv_heads, 2, bound_spans(shape_.head_dim));
    return kv;
  }

  Stream stream_{DeviceKind::kCuda};
  AttentionShape shape_;
  RaggedBatch ragged_;
  DeviceBatch device_;
  std::int64_t capacity_;
  Buffer k_, v_, bounds_, q_, codes_, scales_;
};

bool has_clusters() {
  return widest_cluster() > 1;
}

template <typename T>
class AttendChosenCuda : public testing::Test {};
using Types = testing::Types<bf16, f16>;
TYPED_TEST_SUITE(AttendChosenCuda, Types);

TYPED_TEST(AttendChosenCuda, DoesInOneLaunchWhatTwoDo) {
  VESPER_NEEDS_GPU();
  if (!has_clusters()) GTEST_SKIP() << "this GPU has no clusters";
  std::mt19937 random(1);
  for (const int group : {1, 2, 4, 7, 8, 16}) {
    ChosenWorld<TypeParam> world(random, make_shape(2, group, 128, 16), {1, 15, 16, 17, 1023, 1025, 16384, 40000},
                                 Bounds::kRandom);
    for (const PageBudget& budget : kBudgets) world.check(budget, GroupScore::kMax, {0}, "random bounds");
    world.check(kBudgets[0], GroupScore::kSum, {16}, "random bounds");
    world.check(kBudgets[0], GroupScore::kMean, {1023}, "random bounds");
  }
  for (const int page_tokens : {16, 32, 64}) {
    ChosenWorld<TypeParam> world(random, make_shape(3, 4, 64, page_tokens), {5000, 20, 3000, 64, 65}, Bounds::kRandom);
    for (const PageBudget& budget : kBudgets) world.check(budget, GroupScore::kMax, {20}, "random bounds");
  }
}

TYPED_TEST(AttendChosenCuda, ScoresThatAreEqualFarOffOrNoNumbers) {
  VESPER_NEEDS_GPU();
  if (!has_clusters()) GTEST_SKIP() << "this GPU has no clusters";
  std::mt19937 random(2);
  for (const Bounds kind : {Bounds::kTies, Bounds::kEqual, Bounds::kFarOutliers, Bounds::kNotFinite}) {
    ChosenWorld<TypeParam> world(random, make_shape(2, 3, 128, 16), {40000, 3001, 500}, kind);
    for (const PageBudget& budget : kBudgets) {
      world.check(budget, GroupScore::kMax, {0}, "bounds " + std::to_string(static_cast<int>(kind)));
    }
  }
}

// Whether blocks find lists by themselves or search them together.
TYPED_TEST(AttendChosenCuda, ScoresThatFirstTilesDoNotLetExpect) {
  VESPER_NEEDS_GPU();
  if (!has_clusters()) GTEST_SKIP() << "this GPU has no clusters";
  std::mt19937 random(4);
  for (const Bounds kind : {Bounds::kRising, Bounds::kHighAtEnd, Bounds::kHighTiles}) {
    ChosenWorld<TypeParam> world(random, make_shape(2, 3, 128, 16), {120000, 30000, 4000}, kind);
    for (const double tokens : {2048.0, 6000.0}) {
      world.check({.tokens = {tokens}}, GroupScore::kMax, {0}, "bounds " + std::to_string(static_cast<int>(kind)));
    }
  }
}

TYPED_TEST(AttendChosenCuda, GivesTheSameBitsAgain) {
  VESPER_NEEDS_GPU();
  if (!has_clusters()) GTEST_SKIP() << "this GPU has no clusters";
  std::mt19937 random(3);
  ChosenWorld<TypeParam> world(random, make_shape(8, 4, 128, 16), {32768}, Bounds::kRandom);
  for (const PageScore page_score : {PageScore::kMinMax, PageScore::kMinMaxInt8}) {
    for (const int cluster : {widest_cluster(), 4}) {  // searches, and finds finalists
      const auto in_one = [&] {
        return world.in_one(page_score, {.tokens = {2048.0}}, GroupScore::kMax, {0}, cluster);
      };
      const auto first = in_one();
      for (int again = 0; again < 3; ++again) ASSERT_EQ(in_one().differs_from(first), "");
    }
  }
}

}  // namespace
}  // namespace vesper
