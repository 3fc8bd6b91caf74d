// Attention to a selection on the CPU: against the formula in double precision over the lists' keys, and against dense
// attention, bit for bit, where the list is everything. Lines of a page behind the sequence's end hold NaN throughout.
#include "attention/attend_selected.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "tests/attention/attend_reference.h"
#include "tests/attention/lists.h"
#include "tests/paged.h"

namespace vesper {
namespace {

constexpr SelectionUnit kUnits[] = {SelectionUnit::kPages, SelectionUnit::kTokens};

// Partial results, poisoned.
struct Partials {
  std::vector<float> out, lse;
  SplitPartials view;
  Partials(const AttentionShape& shape, int seqs, std::int64_t splits)
      : out(static_cast<std::size_t>(seqs * shape.heads * splits * shape.head_dim), NAN),
        lse(static_cast<std::size_t>(seqs * shape.heads * splits), NAN),
        view{TensorView<float, 4>(out.data(), seqs, shape.heads, splits, shape.head_dim),
             TensorView<float, 3>(lse.data(), seqs, shape.heads, splits)} {}
};

struct World {
  AttentionShape shape;
  RaggedBatch ragged;
  PagedTensor k, v;
  std::vector<float> q, out, lse;

  World(std::mt19937& random, const AttentionShape& sizes, const std::vector<int>& lengths, float q_range = 4.0F)
      : shape(sizes),
        ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), sizes.page_tokens),
        k(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim),
        v(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim) {
    k.fill(ragged.batch, random);
    v.fill(ragged.batch, random);
    q = random_floats(random, static_cast<std::size_t>(seqs() * shape.heads * shape.head_dim), -q_range, q_range);
    poison();
  }
  [[nodiscard]] int seqs() const { return ragged.batch.seqs; }
  void poison() {
    out.assign(q.size(), NAN);
    lse.assign(static_cast<std::size_t>(seqs() * shape.heads), NAN);
  }
  TensorView<float, 2> rows(std::vector<float>& data) const {
    return TensorView<float, 2>(data.data(), seqs(), shape.heads * shape.head_dim);
  }
  TensorView<float, 2> lse_view() { return TensorView<float, 2>(lse.data(), seqs(), shape.heads); }

  void decode(const SplitPlan& plan, std::int32_t longest = INT32_MAX) {
    const Partials partials(shape, seqs(), plan.splits);
    attend_decode({}, shape, ref(q), {k.ref(), v.ref()}, ragged.batch, plan, partials.view, ref(out), lse_view(),
                  longest);
  }
  void attend(Lists& lists, int split_entries, DenseLimit dense = {}, bool with_lse = true) {
    const Partials partials(shape, seqs(), (lists.capacity() + split_entries - 1) / split_entries);
    attend_selected({}, shape, ref(q), {k.ref(), v.ref()}, ragged.batch, lists.view(seqs()), split_entries, dense,
                    partials.view, ref(out), with_lse ? lse_view() : TensorView<float, 2>());
  }
  TensorRef ref(std::vector<float>& data) const {
    return tensor_ref(data.data(), DType::kF32, seqs(), shape.heads * shape.head_dim);
  }

  [[nodiscard]] std::span<const float> row(int s, int h) const {
    const auto channels = static_cast<std::size_t>(shape.head_dim);
    return std::span(out).subspan(static_cast<std::size_t>(s * shape.heads + h) * channels, channels);
  }
  [[nodiscard]] float lse_of(int s, int h) const { return lse[static_cast<std::size_t>(s * shape.heads + h)]; }
  [[nodiscard]] bool untouched(int s) const {
    bool all = true;
    for (int h = 0; h < shape.heads; ++h) {
      for (const float value : row(s, h)) all = all && std::isnan(value);
      all = all && std::isnan(lse_of(s, h));
    }
    return all;
  }

  void check(const Lists& lists, const std::string& what, DenseLimit dense = {}) {
    Comparison outs;
    Comparison lses;
    for (int s = 0; s < seqs(); ++s) {
      if (ragged.batch.kv_len(s) <= dense.tokens) {
        EXPECT_TRUE(untouched(s)) << what << ", sequence " << s;
        continue;
      }
      for (int h = 0; h < shape.heads; ++h) {
        const int g = h / shape.group();
        const Reference truth = reference(shape, &q[static_cast<std::size_t>((s * shape.heads + h) * shape.head_dim)],
                                          k, v, ragged.batch, s, g, lists.keys(ragged.batch, s, g));
        outs.add(row(s, h), truth);
        lses.add(lse_of(s, h), truth.lse, truth.lse_bound);
      }
    }
    outs.expect(what + ", out");
    lses.expect(what + ", lse");
  }
};

std::string describe(const World& world, const Lists& lists, int split_entries) {
  return describe(world.shape) + ", " + describe(lists) + ", split_entries " + std::to_string(split_entries);
}

constexpr int kHeadDims[] = {64, 20, 128, 7, 96};
constexpr int kPages[] = {16, 32, 64};

TEST(AttendSelectedCpu, AListOfEverythingIsDenseBitForBit) {
  std::mt19937 random(1);
  for (int group = 1; group <= 16; ++group) {
    const AttentionShape shape = make_shape(1 + group % 2, group, kHeadDims[group % 5], kPages[group % 3]);
    World world(random, shape, {1, 2, 16, 65, 333, 1200});
    const int whole = (1200 + shape.page_tokens - 1) / shape.page_tokens * shape.page_tokens;
    for (const SplitPlan plan : {SplitPlan{1, whole}, SplitPlan{(1200 + 191) / 192, 192}}) {
      world.poison();
      world.decode(plan);
      const std::vector<float> dense_out = world.out;
      const std::vector<float> dense_lse = world.lse;
      for (const SelectionUnit unit : kUnits) {
        for (const int spare : {0, 40}) {  // splits behind every list's end
          Lists lists(unit, shape, world.ragged.batch, spare, everything);
          const int split_entries = plan.min_tokens / lists.entry_tokens();
          world.poison();
          world.attend(lists, split_entries);
          const std::string what = describe(world, lists, split_entries);
          ASSERT_EQ(world.out, dense_out) << what;
          ASSERT_EQ(world.lse, dense_lse) << what;
        }
      }
    }
  }
}

TEST(AttendSelectedCpu, RandomListsMatchTheFormula) {
  std::mt19937 random(2);
  for (int group = 1; group <= 16; ++group) {
    const AttentionShape shape = make_shape(1 + group % 3, group, kHeadDims[group % 5], kPages[group % 3]);
    World world(random, shape, {1, 2, 17, 64, 333, 900});
    for (const SelectionUnit unit : kUnits) {
      Lists lists(unit, shape, world.ragged.batch, group % 4, [&](int n) { return random_list(random, n, 0.3); });
      for (const int split_entries : {1, 3, 8, 100, 4096}) {
        world.poison();
        world.attend(lists, split_entries);
        world.check(lists, describe(world, lists, split_entries));
      }
    }
  }
}

// A tail enters with its weight, wherever splits begin and end.
TEST(AttendSelectedCpu, TailsAreWeighted) {
  std::mt19937 random(3);
  for (const int group : {1, 2, 3, 8}) {
    const AttentionShape shape = make_shape(2, group, kHeadDims[group % 5], kPages[group % 3]);
    World world(random, shape, {1, 18, 70, 333, 900});
    for (const SelectionUnit unit : kUnits) {
      for (const double tail : {0.02, 0.3, 1.0}) {
        Lists lists(unit, shape, world.ragged.batch, 2, [&](int n) { return random_list(random, n, 0.1, tail); });
        for (const int split_entries : {1, 5, 64, 1000}) {
          world.poison();
          world.attend(lists, split_entries);
          world.check(lists, describe(world, lists, split_entries) + ", tail " + std::to_string(tail));
        }
      }
    }
  }
}

// Every token of the rest drawn, in some order, with log-weight 0.
TEST(AttendSelectedCpu, AFullSampleIsDense) {
  std::mt19937 random(4);
  const AttentionShape shape = make_shape(2, 4, 64, 16);
  World world(random, shape, {3, 777});
  Lists lists(SelectionUnit::kTokens, shape, world.ragged.batch, 0,
              [&](int n) { return random_list(random, n, 0.2, 1.0); });
  world.attend(lists, 128);
  const Lists all(SelectionUnit::kTokens, shape, world.ragged.batch, 0, everything);
  world.check(all, "full sample");
}

TEST(AttendSelectedCpu, OneEntryLists) {
  std::mt19937 random(5);
  const AttentionShape shape = make_shape(2, 3, 64, 32);
  World world(random, shape, {1, 33, 500});
  for (const SelectionUnit unit : kUnits) {
    for (const int split_entries : {1, 16, 1000}) {
      Lists newest(unit, shape, world.ragged.batch, 0, newest_alone);
      world.poison();
      world.attend(newest, split_entries);
      world.check(newest, describe(world, newest, split_entries));
      Lists tail(unit, shape, world.ragged.batch, 0,
                 [](int n) { return Entries{.index = {n - 1}, .tail_begin = 0, .tail_log_weight = 3.5F}; });
      world.poison();
      world.attend(tail, split_entries);
      world.check(tail, describe(world, tail, split_entries) + ", tail alone");
    }
  }
}

TEST(AttendSelectedCpu, KeysThatAreNotListedAreNotRead) {
  std::mt19937 random(6);
  const AttentionShape shape = make_shape(2, 2, 64, 16);
  for (const SelectionUnit unit : kUnits) {
    World world(random, shape, {5, 300, 411});
    const Batch& batch = world.ragged.batch;
    Lists lists(unit, shape, batch, 0, [&](int n) { return random_list(random, n, 0.2, 0.2); });
    world.attend(lists, 7);
    const std::vector<float> before = world.out;
    for (int s = 0; s < world.seqs(); ++s) {
      for (int g = 0; g < shape.kv_heads; ++g) {
        std::vector<bool> listed(static_cast<std::size_t>(batch.kv_len(s)));
        for (const WeightedKey& key : lists.keys(batch, s, g)) listed[static_cast<std::size_t>(key.token)] = true;
        for (int t = 0; t < batch.kv_len(s); ++t) {
          for (int d = 0; d < shape.head_dim && !listed[static_cast<std::size_t>(t)]; ++d) {
            world.k.at(batch, s, t, g, d) = world.v.at(batch, s, t, g, d) = NAN;
          }
        }
      }
    }
    world.poison();
    world.attend(lists, 7);
    EXPECT_EQ(world.out, before) << describe(lists);
  }
}

TEST(AttendSelectedCpu, LongContexts) {
  std::mt19937 random(7);
  const AttentionShape shape = make_shape(1, 4, 128, 16);
  World world(random, shape, {40000, 12345});
  for (const SelectionUnit unit : kUnits) {
    Lists lists(unit, shape, world.ragged.batch, 0, [&](int n) { return random_list(random, n, 0.03, 0.02); });
    world.attend(lists, 256);
    world.check(lists, describe(world, lists, 256));
  }
}

// Scores of hundreds: the running maximum keeps every weight in range, the tail's too.
TEST(AttendSelectedCpu, LargeScoresStayFinite) {
  std::mt19937 random(8);
  const AttentionShape shape = make_shape(1, 2, 64, 16);
  World world(random, shape, {500}, 300.0F);
  Lists lists(SelectionUnit::kTokens, shape, world.ragged.batch, 0,
              [&](int n) { return random_list(random, n, 0.1, 0.1); });
  world.attend(lists, 32);
  world.check(lists, "large scores");
}

// In a batch of long and short sequences, attend_decode and attend_selected write each one exactly once.
TEST(AttendSelectedCpu, SharesAMixedBatchWithDense) {
  std::mt19937 random(9);
  const AttentionShape shape = make_shape(2, 3, 64, 16);
  World world(random, shape, {64, 65, 1, 300, 63, 900});
  const Batch& batch = world.ragged.batch;
  Lists lists(SelectionUnit::kPages, shape, batch, 0, [&](int n) { return random_list(random, n, 0.4); });
  for (const std::int32_t limit : {0, 63, 64, 65, 899, 900}) {
    for (const int splits : {1, 4}) {
      const SplitPlan plan{splits, 960 / splits};
      const int split_entries = (lists.capacity() + splits - 1) / splits;
      const std::string what = "limit " + std::to_string(limit) + ", splits " + std::to_string(splits);
      world.poison();
      world.decode(plan, limit);
      for (int s = 0; s < world.seqs(); ++s) {
        EXPECT_EQ(world.untouched(s), batch.kv_len(s) > limit) << what << ": dense, sequence " << s;
      }
      const std::vector<float> dense_out = world.out;
      world.poison();
      world.attend(lists, split_entries, {limit});
      world.check(lists, what, {limit});
      const std::vector<float> selected_out = world.out;

      world.poison();
      world.decode(plan, limit);
      world.attend(lists, split_entries, {limit});
      for (std::size_t i = 0; i < world.out.size(); ++i) {
        const auto s = static_cast<int>(i / (world.out.size() / static_cast<std::size_t>(world.seqs())));
        const float expected = batch.kv_len(s) > limit ? selected_out[i] : dense_out[i];
        ASSERT_EQ(world.out[i], expected) << what << ", element " << i;
      }
      for (const float value : world.lse) ASSERT_FALSE(std::isnan(value)) << what;
    }
  }
}

TEST(AttendSelectedCpu, WritesNoLseUnasked) {
  std::mt19937 random(10);
  const AttentionShape shape = make_shape(1, 2, 64, 16);
  World world(random, shape, {100});
  Lists lists(SelectionUnit::kTokens, shape, world.ragged.batch, 0, everything);
  world.attend(lists, 64, {}, false);
  for (const float value : world.lse) EXPECT_TRUE(std::isnan(value));
}

struct Totals {
  std::vector<std::int64_t> kept, visible, sampled, lists;
  explicit Totals(int kv_heads) {
    for (auto* total : {&kept, &visible, &sampled, &lists}) total->assign(static_cast<std::size_t>(kv_heads), 1000);
  }
  KeptCounters view() {
    const auto of = [](std::vector<std::int64_t>& total) {
      return TensorView<std::int64_t, 1>(total.data(), static_cast<std::int64_t>(total.size()));
    };
    return {of(kept), of(visible), of(sampled), of(lists)};
  }
};

TEST(CountSelectedCpu, AddsWhatListsHold) {
  std::mt19937 random(11);
  const AttentionShape shape = make_shape(3, 2, 64, 32);
  World world(random, shape, {20, 32, 33, 64, 1000});
  const Batch& batch = world.ragged.batch;
  for (const SelectionUnit unit : kUnits) {
    Lists lists(unit, shape, batch, 1, [&](int n) { return random_list(random, n, 0.3, 0.3); });
    Totals totals(shape.kv_heads);
    Totals expected(shape.kv_heads);
    for (const std::int32_t limit : {0, 32, 2000}) {
      count_selected({}, shape, batch, lists.view(batch.seqs), {limit}, totals.view());
      for (int s = 0; s < batch.seqs; ++s) {
        if (batch.kv_len(s) <= limit) continue;
        for (int g = 0; g < shape.kv_heads; ++g) {
          const auto head = static_cast<std::size_t>(g);
          const auto list = static_cast<std::size_t>(s * shape.kv_heads + g);
          expected.kept[head] += static_cast<std::int64_t>(lists.keys(batch, s, g).size());
          expected.visible[head] += batch.kv_len(s);
          expected.sampled[head] += lists.count[list] - lists.tail_begin[list];
          expected.lists[head] += 1;
        }
      }
    }
    EXPECT_EQ(totals.kept, expected.kept) << describe(lists);
    EXPECT_EQ(totals.visible, expected.visible) << describe(lists);
    EXPECT_EQ(totals.sampled, expected.sampled) << describe(lists);
    EXPECT_EQ(totals.lists, expected.lists) << describe(lists);
  }
}

}  // namespace
}  // namespace vesper
