// Page scores on CUDA against the CPU's on the same 16-bit numbers; page lists against a sort, exactly.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/select_pages.h"
#include "kvcache/side_tables.h"
#include "tests/attention/page_lists.h"
#include "tests/gpu.h"
#include "tests/paged_device.h"
#include "tests/side_tables.h"

namespace vesper {
namespace {

struct Case {
  int heads, kv_heads, head_dim, page_tokens;

  [[nodiscard]] AttentionShape shape() const {
    return {.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .page_tokens = page_tokens, .scale = 0.125F};
  }
};

// Of all channels of the page and KV head that element `at` of the bounds, one of its least keys, belongs to.
double largest_bound(const SideTensors& tables, std::size_t at, int head_dim) {
  const std::size_t begin = at - at % static_cast<std::size_t>(2 * head_dim);
  double largest = 0.0;
  for (std::size_t i = begin; i < begin + static_cast<std::size_t>(2 * head_dim); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(tables.bounds[i])));
  }
  return largest;
}

// Both devices read the same boxes, so only the order of summation differs: twice the bound of a sum of 2 head_dim
// products, a head, then of the group's scores.
double score_bound(const SideTensors& tables, const Case& c, PageScore page_score, GroupScore group_score,
                   std::int64_t page, int g, int lines, const float* q) {
  const int group = c.heads / c.kv_heads;
  double largest = 0.0;
  double sum = 0.0;
  for (int h = 0; h < group; ++h) {
    double magnitudes = 0.0;
    for (int d = 0; d < c.head_dim; ++d) {
      const auto at = static_cast<std::size_t>(((page * c.kv_heads + g) * 2) * c.head_dim + d);
      const auto next = at + static_cast<std::size_t>(c.head_dim);
      // Of the larger side of the box: sqrt(sum of squares / n) is at least |mean| and at least the deviation.
      // In 8 bits a bound grows by less than a step, and the largest of a span has 126 of them or more.
      const double step = page_score == PageScore::kMinMaxInt8 ? largest_bound(tables, at, c.head_dim) / 126.0 : 0.0;
      const double side = page_score != PageScore::kMeanStd
                              ? std::max(std::abs(tables.bounds[at]), std::abs(tables.bounds[next])) + step
                              : 2.0 * std::sqrt(static_cast<double>(tables.moments[next]) / lines);
      magnitudes += std::abs(q[h * c.head_dim + d]) * side;
    }
    largest = std::max(largest, magnitudes);
    sum += magnitudes;
  }
  const double of_sum = sum_bound(2 * c.head_dim, sum) + sum_bound(group, sum);
  switch (group_score) {
    case GroupScore::kMax:
      return 2 * sum_bound(2 * c.head_dim, largest);
    case GroupScore::kSum:
      return 2 * of_sum;
    case GroupScore::kMean:
      return 2 * (of_sum + kRoundF32 * sum) / group;
  }
  return 0.0;
}

template <typename T>
void check_scores(const Case& c, const std::vector<int>& lengths, DenseLimit dense, std::mt19937& random) {
  const Stream stream(DeviceKind::kCuda);
  const RaggedBatch ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), c.page_tokens);
  const Batch& batch = ragged.batch;
  PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  k.fill(batch, random);
  round_to<T>(k.data);
  SideTensors tables(k);
  const LayerKv kv = tables.layer(k);
  const RaggedPrefill all(ragged);
  cpu::update_side_tables(all.batch, kv);
  std::vector<float> q = random_floats(random, static_cast<std::size_t>(batch.seqs * c.heads * c.head_dim));
  round_to<T>(q);
  const std::int64_t capacity = batch.page_table.shape(1);
  const std::vector<float> poison(static_cast<std::size_t>(batch.seqs * c.kv_heads * capacity), NAN);

  const DType dtype = DTypeOf<T>::value;
  const std::int64_t pages = ragged.pages;
  const Buffer device_q = upload_as<T>(stream, q);
  const Buffer bounds = upload_as<T>(stream, tables.bounds);
  const Buffer int8_bounds = upload(stream, tables.int8_bounds);
  const Buffer int8_scales = upload(stream, tables.int8_scales);
  const Buffer moments = upload(stream, tables.moments);
  const DeviceBatch device(stream, ragged);
  LayerKv device_kv{.k = tensor_ref(nullptr, dtype, pages, c.kv_heads, c.page_tokens, c.head_dim), .v = {}};
  device_kv.bounds = bounds.ref(dtype, pages, c.kv_heads, 2, c.head_dim);
  device_kv.int8_bounds = int8_bounds.ref(DType::kU8, pages, c.kv_heads, 2, c.head_dim);
  device_kv.int8_scales = int8_scales.ref(DType::kBf16, pages, c.kv_heads, 2, bound_spans(c.head_dim));
  device_kv.moments = moments.ref(DType::kF32, pages, c.kv_heads, 2, c.head_dim);

  for (const PageScore page_score : {PageScore::kMinMax, PageScore::kMeanStd, PageScore::kMinMaxInt8}) {
    for (const GroupScore group_score : {GroupScore::kMax, GroupScore::kSum, GroupScore::kMean}) {
      std::vector<float> truth = poison;
      cpu::score_pages(c.shape(), TensorView<const float, 2>(q.data(), batch.seqs, c.heads * c.head_dim), kv, batch,
                       page_score, group_score, dense,
                       TensorView<float, 3>(truth.data(), batch.seqs, c.kv_heads, capacity));
      const Buffer scores = upload(stream, poison);
      score_pages(stream.exec(), c.shape(), device_q.ref(dtype, batch.seqs, c.heads * c.head_dim), device_kv,
                  device.batch, page_score, group_score, dense, scores.view<float>(batch.seqs, c.kv_heads, capacity));
      const std::vector<float> got = download<float>(stream, scores, truth.size());

      const std::string what = "heads " + std::to_string(c.heads) + ", kv_heads " + std::to_string(c.kv_heads) +
                               ", head_dim " + std::to_string(c.head_dim) + ", page_tokens " +
                               std::to_string(c.page_tokens) + ", page score " +
                               std::to_string(static_cast<int>(page_score)) + ", group score " +
                               std::to_string(static_cast<int>(group_score));
      std::vector<float> found;
      std::vector<double> expected;
      std::vector<double> bound;
      int written_beside = 0;
      for (std::size_t i = 0; i < truth.size(); ++i) {
        if (std::isnan(truth[i])) {
          written_beside += std::isnan(got[i]) ? 0 : 1;
          continue;
        }
        const auto p = static_cast<int>(static_cast<std::int64_t>(i) % capacity);
        const auto g = static_cast<int>(static_cast<std::int64_t>(i) / capacity % c.kv_heads);
        const auto s = static_cast<int>(static_cast<std::int64_t>(i) / capacity / c.kv_heads);
        const int lines = std::min(c.page_tokens, batch.kv_len(s) - p * c.page_tokens);
        found.push_back(got[i]);
        expected.push_back(truth[i]);
        bound.push_back(
            score_bound(tables, c, page_score, group_score, batch.page_table(s, p), g, lines,
                        &q[static_cast<std::size_t>((s * c.heads + g * (c.heads / c.kv_heads)) * c.head_dim)]));
      }
      expect_within(found, expected, bound, what);
      EXPECT_EQ(written_beside, 0) << what << ": wrote scores of pages that do not exist or attend dense";
    }
  }
}

// choose_pages against its composition: the same bits of every score, the same lists, and its counters back at zero.
template <typename T>
void check_choice(const Case& c, const std::vector<int>& lengths, DenseLimit dense, std::mt19937& random) {
  const Stream stream(DeviceKind::kCuda);
  const RaggedBatch ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), c.page_tokens);
  const DeviceBatch device(stream, ragged);
  const int seqs = ragged.batch.seqs;
  const std::int64_t capacity = ragged.batch.page_table.shape(1);
  const DType dtype = DTypeOf<T>::value;
  const auto elements = static_cast<std::size_t>(ragged.pages) * static_cast<std::size_t>(2 * c.kv_heads * c.head_dim);
  const Buffer bounds = upload_as<T>(stream, random_floats(random, elements));
  std::vector<std::uint8_t> codes(elements);
  std::generate(codes.begin(), codes.end(), [&] { return static_cast<std::uint8_t>(1 + random() % 255); });
  const Buffer int8_bounds = upload(stream, codes);
  const Buffer int8_scales = upload_as<bf16>(stream, random_floats(random, elements / kBoundSpan, 0.0F, 1.0F));
  const Buffer q = upload_as<T>(stream, random_floats(random, static_cast<std::size_t>(seqs * c.heads * c.head_dim)));
  LayerKv kv{.k = tensor_ref(nullptr, dtype, ragged.pages, c.kv_heads, c.page_tokens, c.head_dim), .v = {}};
  kv.bounds = bounds.ref(dtype, ragged.pages, c.kv_heads, 2, c.head_dim);
  kv.int8_bounds = int8_bounds.ref(DType::kU8, ragged.pages, c.kv_heads, 2, c.head_dim);
  kv.int8_scales = int8_scales.ref(DType::kBf16, ragged.pages, c.kv_heads, 2, bound_spans(c.head_dim));
  const TensorRef queries = q.ref(dtype, seqs, c.heads * c.head_dim);
  const std::vector<std::int32_t> zeros(static_cast<std::size_t>(seqs * c.kv_heads), 0);
  const Buffer tickets = upload(stream, zeros);

  struct Found {
    std::vector<float> scores;
    std::vector<std::int32_t> index, count, tail_begin;
    bool operator==(const Found&) const = default;
  };
  const auto run = [&](const auto& choose) {
    const Buffer scores = upload(stream, std::vector<float>(static_cast<std::size_t>(seqs * c.kv_heads * capacity)));
    PageLists lists(ragged.batch, c.kv_heads);
    const Buffer index = upload(stream, lists.index);
    const Buffer count = upload(stream, lists.count);
    const Buffer tail_begin = upload(stream, lists.tail_begin);
    choose(scores.view<float>(seqs, c.kv_heads, capacity),
           Selection{.unit = SelectionUnit::kPages,
                     .index = index.view<std::int32_t>(seqs, c.kv_heads, capacity),
                     .count = count.view<std::int32_t>(seqs, c.kv_heads),
                     .tail_begin = tail_begin.view<std::int32_t>(seqs, c.kv_heads),
                     .tail_log_weight = {}});
    return Found{download<float>(stream, scores, static_cast<std::size_t>(seqs * c.kv_heads * capacity)),
                 download<std::int32_t>(stream, index, lists.index.size()),
                 download<std::int32_t>(stream, count, lists.count.size()),
                 download<std::int32_t>(stream, tail_begin, lists.tail_begin.size())};
  };
  const auto check_budget = [&](const PageBudget& budget, PageScore page_score) {
    const Found composed = run([&](const TensorView<float, 3>& scores, const Selection& pages) {
      score_pages(stream.exec(), c.shape(), queries, kv, device.batch, page_score, GroupScore::kMax, dense, scores);
      select_pages(stream.exec(), c.shape(), device.batch, scores, budget, dense, pages);
    });
    const Found fused = run([&](const TensorView<float, 3>& scores, const Selection& pages) {
      cuda::choose_pages(stream.exec(), c.shape(), queries, kv, device.batch, page_score, GroupScore::kMax, budget,
                         dense, {.scores = scores, .tickets = tickets.view<std::int32_t>(seqs, c.kv_heads)}, pages);
    });
    EXPECT_TRUE(fused == composed) << "group " << c.heads / c.kv_heads << ", budget " << budget.tokens.value
                                   << ", page score " << static_cast<int>(page_score);
    EXPECT_EQ(download<std::int32_t>(stream, tickets, zeros.size()), zeros);
  };
  for (const PageBudget& budget : kBudgets) check_budget(budget, PageScore::kMinMax);
  check_budget(kBudgets[0], PageScore::kMinMaxInt8);
}

template <typename T>
class ScorePagesCuda : public testing::Test {};
using Types = testing::Types<bf16, f16>;
TYPED_TEST_SUITE(ScorePagesCuda, Types);

TYPED_TEST(ScorePagesCuda, AreTheCpus) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(1);
  for (const Case& c : {Case{4, 4, 64, 16}, Case{32, 8, 128, 16}, Case{6, 2, 128, 32}, Case{16, 1, 64, 64}}) {
    check_scores<TypeParam>(c, {1, 16, 17, 300, 64, 1023, 1025}, {0}, random);
    check_scores<TypeParam>(c, {1, 16, 17, 300, 64}, {17}, random);
  }
  for (int group = 1; group <= 8; ++group) check_scores<TypeParam>({2 * group, 2, 128, 16}, {1, 33, 2500}, {0}, random);
  check_scores<TypeParam>({4, 1, 64, 16}, {40000, 39999}, {0}, random);
}

TYPED_TEST(ScorePagesCuda, ChooseInOneLaunchWhatTwoChoose) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(4);
  for (const int group : {1, 4, 7, 16}) {
    check_choice<TypeParam>({2 * group, 2, 128, 16}, {1, 15, 16, 17, 1023, 1025, 16384, 40000}, {0}, random);
  }
  check_choice<TypeParam>({8, 8, 64, 32}, {5000, 20, 3000}, {64}, random);
  check_choice<TypeParam>({32, 32, 128, 16}, {3000, 3001}, {0}, random);
  check_choice<TypeParam>({1, 1, 64, 16}, {200000}, {0}, random);
}

void check_lists(const std::vector<int>& lengths, int page_tokens, std::mt19937& random) {
  const Stream stream(DeviceKind::kCuda);
  const AttentionShape shape{.heads = 4, .kv_heads = 2, .head_dim = 64, .page_tokens = page_tokens, .scale = 1.0F};
  const RaggedBatch ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), page_tokens);
  const DeviceBatch device(stream, ragged);
  const std::int64_t capacity = ragged.batch.page_table.shape(1);
  for (const ScoreKind kind : kScoreKinds) {
    const std::vector<float> scores = make_scores(random, kind, ragged.batch, shape.kv_heads);
    const Buffer device_scores = upload(stream, scores);
    for (const PageBudget& budget : kBudgets) {
      for (const DenseLimit dense : {DenseLimit{0}, DenseLimit{64}}) {
        PageLists lists(ragged.batch, shape.kv_heads);
        const Buffer index = upload(stream, lists.index);
        const Buffer count = upload(stream, lists.count);
        const Buffer tail_begin = upload(stream, lists.tail_begin);
        select_pages(stream.exec(), shape, device.batch,
                     device_scores.view<const float>(lists.seqs, lists.kv_heads, capacity), budget, dense,
                     {.unit = SelectionUnit::kPages,
                      .index = index.view<std::int32_t>(lists.seqs, lists.kv_heads, capacity),
                      .count = count.view<std::int32_t>(lists.seqs, lists.kv_heads),
                      .tail_begin = tail_begin.view<std::int32_t>(lists.seqs, lists.kv_heads),
                      .tail_log_weight = {}});
        lists.index = download<std::int32_t>(stream, index, lists.index.size());
        lists.count = download<std::int32_t>(stream, count, lists.count.size());
        lists.tail_begin = download<std::int32_t>(stream, tail_begin, lists.tail_begin.size());
        expect_as_sorted(shape, ragged.batch, scores, budget, dense, lists, describe(kind, budget, page_tokens));
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(SelectPagesCuda, AsASortWould) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(2);
  check_lists({1, 15, 16, 17, 64, 65, 1000, 16384, 16385, 40000}, 16, random);
  check_lists({1, 63, 64, 65, 40000}, 64, random);
}

TEST(SelectPagesCuda, OfAMillionTokens) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(3);
  check_lists({1 << 20}, 16, random);
}

}  // namespace
}  // namespace vesper
