// Attention to a selection on CUDA: against the CPU's on the same 16-bit inputs and lists, under a bound derived from
// the number formats, and against dense attention on CUDA, bit for bit, where the list is everything. Lines of a page
// behind the sequence's end hold NaN throughout, index entries behind a list's count name pages that do not exist.
#include "attention/attend_selected.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "engine/core/error.h"
#include "tests/attention/attend_world.h"
#include "tests/attention/lists.h"
#include "tests/gpu.h"

namespace vesper {
namespace {

constexpr SelectionUnit kUnits[] = {SelectionUnit::kPages, SelectionUnit::kTokens};
constexpr int kGroups[] = {1, 2, 3, 4, 5, 7, 8, 9, 16};
constexpr int kPages[] = {16, 32, 64};

int draw(std::mt19937& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

// Lists on the device.
struct DeviceLists {
  Buffer index, count, tail_begin, tail_log_weight;
  Selection view;
  DeviceLists(const Stream& stream, Lists& lists, int seqs)
      : index(upload(stream, lists.index)),
        count(upload(stream, lists.count)),
        tail_begin(upload(stream, lists.tail_begin)),
        tail_log_weight(upload(stream, lists.tail_log_weight)),
        view(lists.view(seqs)) {
    const std::int64_t kv_heads = view.count.shape(1);
    view.index = index.view<std::int32_t>(seqs, kv_heads, lists.capacity());
    view.count = count.view<std::int32_t>(seqs, kv_heads);
    view.tail_begin = tail_begin.view<std::int32_t>(seqs, kv_heads);
    view.tail_log_weight = tail_log_weight.view<float>(seqs, kv_heads);
  }
};

template <typename T>
struct SelectedWorld : World<T> {
  using World<T>::shape, World<T>::ragged, World<T>::stream;

  SelectedWorld(std::mt19937& random, const AttentionShape& sizes, const std::vector<int>& lengths,
                float q_range = 4.0F)
      : World<T>(random, Phase::kDecode, sizes, lengths, std::vector<int>(lengths.size(), 1), q_range) {}

  // On the device, over poisoned outputs and partial results.
  void attend(Lists& lists, int split_entries, DenseLimit dense = {}) {
    attend_in((lists.capacity() + split_entries - 1) / split_entries, lists, split_entries, dense, false);
  }

  // The same by `splits` blocks a list that are shared out by the lists' counts.
  void attend_shared(Lists& lists, int splits, int min_entries, DenseLimit dense = {}) {
    attend_in(splits, lists, min_entries, dense, true);
  }

  void attend_in(int splits, Lists& lists, int min_entries, DenseLimit dense, bool shared) {
    const int seqs = ragged.batch.seqs;
    const std::size_t partial_rows = this->rows() * static_cast<std::size_t>(splits);
    const Buffer partial_out =
        upload(stream, std::vector<float>(partial_rows * static_cast<std::size_t>(shape.head_dim), NAN));
    const Buffer partial_lse = upload(stream, std::vector<float>(partial_rows, NAN));
    const Buffer device_lse = upload(stream, std::vector<float>(this->rows(), NAN));
    const DeviceLists device(stream, lists, seqs);
    const std::vector<std::int32_t> zeros(static_cast<std::size_t>(seqs) * shape.kv_heads, 0);
    const Buffer tickets = upload(stream, zeros);
    const Buffer parts(Memory::kDevice, std::int64_t{seqs} * shape.kv_heads * splits * 16, "test data");
    const SplitPartials partials{
        partial_out.view<float>(seqs, shape.heads, splits, shape.head_dim),
        partial_lse.view<float>(seqs, shape.heads, splits),
        shared ? tickets.view<std::int32_t>(seqs, shape.kv_heads) : TensorView<std::int32_t, 2>(),
        parts.view<std::int32_t>(std::int64_t{seqs} * shape.kv_heads * splits, 4)};
    this->on_device([&](const TensorRef& dq, const LayerKv& kv, const Batch& batch, const TensorRef& dout) {
      attend_selected(stream.exec(), shape, dq, kv, batch, device.view, min_entries, dense, partials, dout,
                      device_lse.view<float>(seqs, shape.heads));
    });
    this->lse = download<float>(stream, device_lse, this->rows());
    EXPECT_EQ(download<std::int32_t>(stream, tickets, zeros.size()), zeros);
  }

  // What the CPU finds for these lists, in one split, and how far the device may be from it.
  void find_expected_of(Lists& lists, DenseLimit dense = {}) {
    const int seqs = ragged.batch.seqs;
    this->expected.assign(this->elements(), NAN);
    this->expected_lse.assign(this->rows(), NAN);
    std::vector<float> partial_out(this->elements());
    std::vector<float> partial_lse(this->rows());
    cpu::attend_selected(shape, this->view(this->q), {this->k.ref(), this->v.ref()}, ragged.batch, lists.view(seqs),
                         lists.capacity(), dense,
                         {TensorView<float, 4>(partial_out.data(), seqs, shape.heads, 1, shape.head_dim),
                          TensorView<float, 3>(partial_lse.data(), seqs, shape.heads, 1)},
                         this->view(this->expected),
                         TensorView<float, 2>(this->expected_lse.data(), seqs, shape.heads));
    this->find_bounds([&](std::int64_t s, int g) {
      if (ragged.batch.kv_len(s) <= dense.tokens) return std::vector<WeightedKey>();
      return lists.keys(ragged.batch, static_cast<int>(s), g);
    });
  }
};

std::string describe(const AttentionShape& shape, const Lists& lists, int split_entries) {
  return describe(shape) + ", " + describe(lists) + ", capacity " + std::to_string(lists.capacity()) +
         ", split_entries " + std::to_string(split_entries);
}

template <typename T>
class AttendSelectedCuda : public testing::Test {};
using Types = testing::Types<bf16, f16>;
TYPED_TEST_SUITE(AttendSelectedCuda, Types);

TYPED_TEST(AttendSelectedCuda, AListOfEverythingIsDenseBitForBit) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(1);
  int i = 0;
  for (const int group : kGroups) {
    for (const int head_dim : {64, 128}) {
      const AttentionShape shape = make_shape(1 + i % 2, group, head_dim, kPages[i % 3]);
      ++i;
      SelectedWorld<TypeParam> world(random, shape, {1, 15, 16, 65, 333, draw(random, 600, 1200)});
      for (const SplitPlan& plan : {SplitPlan{1, 1216}, SplitPlan{7, 192}, SplitPlan{19, 64}}) {
        world.decode(plan);
        const std::vector<float> dense_out = world.out;
        const std::vector<float> dense_lse = world.lse;
        for (const SelectionUnit unit : kUnits) {
          for (const int spare : {0, 40}) {  // splits behind every list's end
            Lists lists(unit, shape, world.ragged.batch, spare, everything);
            const int split_entries = plan.min_tokens / lists.entry_tokens();
            world.attend(lists, split_entries);
            const std::string what = describe(shape, lists, split_entries);
            for (std::size_t e = 0; e < dense_out.size(); ++e)
              ASSERT_EQ(world.out[e], dense_out[e]) << what << ": " << e;
            for (std::size_t e = 0; e < dense_lse.size(); ++e)
              ASSERT_EQ(world.lse[e], dense_lse[e]) << what << ": " << e;
          }
        }
      }
    }
  }
}

TYPED_TEST(AttendSelectedCuda, RandomListsOverRandomShapes) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(2);
  int i = 0;
  for (const int group : kGroups) {
    for (const int head_dim : {64, 128}) {
      const AttentionShape shape = make_shape(draw(random, 1, 3), group, head_dim, kPages[i++ % 3]);
      std::vector<int> lengths = {draw(random, 1, 1500), 1};
      while (static_cast<int>(lengths.size()) < i % 7 + 1) lengths.push_back(draw(random, 1, 300));
      SelectedWorld<TypeParam> world(random, shape, lengths);
      for (const SelectionUnit unit : kUnits) {
        for (const double tail : {0.0, 0.3}) {
          Lists lists(unit, shape, world.ragged.batch, i % 4,
                      [&](int n) { return random_list(random, n, 0.25, tail); });
          world.find_expected_of(lists);
          // One entry a split, borders inside pieces of 16, one split.
          for (const int split_entries : {1, 5, 16, 64, 250, lists.capacity()}) {
            if (lists.capacity() / split_entries > 500) continue;  // partial results of this many splits
            world.attend(lists, split_entries);
            world.check(describe(shape, lists, split_entries) + ", tail " + std::to_string(tail), true);
          }
        }
      }
    }
  }
}

// Lists of all the entries there are beside lists of a hundredth of them and of one, more lists than threads of a
// block.
TYPED_TEST(AttendSelectedCuda, SharesOutListsOfVeryDifferentLengths) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(10);
  int i = 0;
  for (const int group : {1, 4, 9}) {
    for (const int head_dim : {64, 128}) {
      const AttentionShape shape = make_shape(3 + i % 2, group, head_dim, kPages[i % 3]);
      std::vector<int> lengths = {3000, 1, 40};
      while (static_cast<int>(lengths.size()) < (i % 2 == 0 ? 7 : 60)) lengths.push_back(draw(random, 1, 200));
      ++i;
      SelectedWorld<TypeParam> world(random, shape, lengths);
      for (const SelectionUnit unit : kUnits) {
        int number = 0;
        Lists lists(unit, shape, world.ragged.batch, i % 4, [&](int n) {
          ++number;
          return random_list(random, n, number % 3 == 0 ? 0.9 : 0.01, number % 2 == 0 ? 0.0 : 0.05);
        });
        for (const DenseLimit dense : {DenseLimit{0}, DenseLimit{150}}) {
          world.find_expected_of(lists, dense);
          for (const auto& [splits, min_entries] : {std::pair{2, 1}, std::pair{2, 128}, std::pair{9, 5}}) {
            world.attend_shared(lists, splits, min_entries, dense);
            world.check(describe(shape, lists, min_entries) + ", shared, splits " + std::to_string(splits), true);
            const std::vector<float> first = world.out;
            world.attend_shared(lists, splits, min_entries, dense);
            for (std::size_t e = 0; e < first.size(); ++e) {  // what is left alone is NaN
              ASSERT_TRUE(world.out[e] == first[e] || std::isnan(first[e])) << describe(shape, lists, min_entries);
            }
          }
        }
      }
    }
  }
}

// What a list is cut into follows from the counts, whoever stands before it: equal lists are cut alike, and a list
// whose share is one part is read as the one block of a list would read it.
TYPED_TEST(AttendSelectedCuda, SharesEqualListsOutAlike) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(11);
  const AttentionShape shape = make_shape(8, 4, 128, 16);
  SelectedWorld<TypeParam> world(random, shape, std::vector<int>(8, 700));
  for (const SelectionUnit unit : kUnits) {
    Lists lists(unit, shape, world.ragged.batch, 0, everything);
    world.attend(lists, lists.capacity());
    const std::vector<float> whole = world.out;
    world.attend_shared(lists, 2, 1);
    EXPECT_EQ(world.out, whole) << describe(lists);
    // Copies of one sequence have one output, in many parts as well.
    for (int s = 1; s < world.ragged.batch.seqs; ++s) {
      for (int p = 0; p < (700 + 15) / 16; ++p) {
        const auto pages = static_cast<std::int64_t>(world.ragged.batch.page_table.shape(1));
        world.ragged.page_table[static_cast<std::size_t>(s * pages + p)] =
            world.ragged.page_table[static_cast<std::size_t>(p)];
      }
      const auto row = static_cast<std::ptrdiff_t>(shape.heads) * shape.head_dim;
      std::copy_n(world.q.begin(), row, world.q.begin() + s * row);
    }
    world.attend_shared(lists, 6, 1);
    const auto row = static_cast<std::size_t>(shape.heads) * static_cast<std::size_t>(shape.head_dim);
    for (std::size_t e = row; e < world.out.size(); ++e) ASSERT_EQ(world.out[e], world.out[e % row]);
  }
}

TYPED_TEST(AttendSelectedCuda, OneEntryLists) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(3);
  for (const int page_tokens : kPages) {
    const AttentionShape shape = make_shape(2, 4, 128, page_tokens);
    SelectedWorld<TypeParam> world(random, shape, {1, 17, 33, 64, 500});
    for (const SelectionUnit unit : kUnits) {
      Lists newest(unit, shape, world.ragged.batch, 0, newest_alone);
      Lists tail(unit, shape, world.ragged.batch, 0,
                 [](int n) { return Entries{.index = {n - 1}, .tail_begin = 0, .tail_log_weight = 3.5F}; });
      for (Lists* lists : {&newest, &tail}) {
        world.find_expected_of(*lists);
        for (const int split_entries : {1, 16, 1000}) {
          world.attend(*lists, split_entries);
          world.check(describe(shape, *lists, split_entries), true);
        }
      }
    }
  }
}

TYPED_TEST(AttendSelectedCuda, KeysThatAreNotListedAreNotRead) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(4);
  const AttentionShape shape = make_shape(2, 4, 128, 32);
  for (const SelectionUnit unit : kUnits) {
    SelectedWorld<TypeParam> world(random, shape, {5, 300, 411});
    const Batch& batch = world.ragged.batch;
    Lists lists(unit, shape, batch, 0, [&](int n) { return random_list(random, n, 0.2, 0.2); });
    world.attend(lists, 7);
    const std::vector<float> before = world.out;
    for (int s = 0; s < batch.seqs; ++s) {
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
    world.attend(lists, 7);
    EXPECT_EQ(world.out, before) << describe(lists);
  }
}

TYPED_TEST(AttendSelectedCuda, LongContexts) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(5);
  const AttentionShape shape = make_shape(2, 4, 128, 16);
  SelectedWorld<TypeParam> world(random, shape, {40000, 12345, 1});
  for (const SelectionUnit unit : kUnits) {
    Lists lists(unit, shape, world.ragged.batch, 0, [&](int n) { return random_list(random, n, 0.03, 0.02); });
    world.find_expected_of(lists);
    for (const int split_entries : {64, 1000}) {
      world.attend(lists, split_entries);
      world.check(describe(shape, lists, split_entries), true);
    }
  }
}

// Scores of hundreds: the running maximum keeps every weight in range, the tail's too.
TYPED_TEST(AttendSelectedCuda, LargeScoresStayFinite) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(6);
  const AttentionShape shape = make_shape(1, 4, 64, 16);
  SelectedWorld<TypeParam> world(random, shape, {900}, 300.0F);
  Lists lists(SelectionUnit::kTokens, shape, world.ragged.batch, 0,
              [&](int n) { return random_list(random, n, 0.1, 0.1); });
  world.find_expected_of(lists);
  world.attend(lists, 32);
  world.check("large scores", true);
}

// In a batch of long and short sequences, attend_decode writes the short ones and attend_selected the others.
TYPED_TEST(AttendSelectedCuda, SharesAMixedBatchWithDense) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(7);
  const AttentionShape shape = make_shape(2, 3, 64, 16);
  SelectedWorld<TypeParam> world(random, shape, {64, 65, 1, 300, 63, 900});
  const Batch& batch = world.ragged.batch;
  Lists lists(SelectionUnit::kPages, shape, batch, 0, [&](int n) { return random_list(random, n, 0.4); });
  for (const std::int32_t limit : {0, 63, 64, 65, 899, 900}) {
    world.find_expected();
    for (std::size_t i = 0; i < world.rows(); ++i) {
      if (batch.kv_len(i / static_cast<std::size_t>(shape.heads)) > limit) world.bounds[i] = {};
    }
    for (const SplitPlan& plan : {SplitPlan{1, 960}, SplitPlan{4, 240}}) {
      world.decode(plan, true, limit);
      world.check("dense up to " + std::to_string(limit) + ", splits " + std::to_string(plan.splits), true);
    }
    world.find_expected_of(lists, {limit});
    for (const int split_entries : {lists.capacity(), 15}) {
      world.attend(lists, split_entries, {limit});
      world.check("selected above " + std::to_string(limit) + ", split_entries " + std::to_string(split_entries), true);
    }
  }
}

TYPED_TEST(AttendSelectedCuda, GivesTheSameBitsAgain) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(8);
  const AttentionShape shape = make_shape(4, 8, 128, 16);
  SelectedWorld<TypeParam> world(random, shape, {3000, 1500});
  Lists lists(SelectionUnit::kTokens, shape, world.ragged.batch, 0,
              [&](int n) { return random_list(random, n, 0.2, 0.1); });
  world.attend(lists, 100);
  const std::vector<float> first = world.out;
  for (int again = 0; again < 5; ++again) {
    world.attend(lists, 100);
    ASSERT_EQ(world.out, first);
  }
}

TEST(CountSelectedCuda, CountsAsTheCpuDoes) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(9);
  const AttentionShape shape = make_shape(5, 2, 64, 32);
  std::vector<int> lengths = {20, 32, 33, 64};
  while (lengths.size() < 75) lengths.push_back(draw(random, 1, 400));  // more than a warp has lanes
  const RaggedBatch ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), shape.page_tokens);
  const DeviceBatch device_batch(stream, ragged);
  for (const SelectionUnit unit : kUnits) {
    Lists lists(unit, shape, ragged.batch, 1, [&](int n) { return random_list(random, n, 0.3, 0.3); });
    const DeviceLists device(stream, lists, ragged.batch.seqs);
    constexpr std::int64_t kStart = std::int64_t{1} << 40;  // totals are of 64 bits
    std::vector<std::int64_t> expected(static_cast<std::size_t>(4 * shape.kv_heads), kStart);
    const Buffer found = upload(stream, expected);
    const auto counters = [&](std::int64_t* totals) {
      const auto of = [&](int i) {
        return TensorView<std::int64_t, 1>(totals + std::ptrdiff_t{i} * shape.kv_heads, shape.kv_heads);
      };
      return KeptCounters{of(0), of(1), of(2), of(3)};
    };
    for (const std::int32_t limit : {0, 32, 2000}) {
      count_selected({}, shape, ragged.batch, lists.view(ragged.batch.seqs), {limit}, counters(expected.data()));
      count_selected(stream.exec(), shape, device_batch.batch, device.view, {limit},
                     counters(static_cast<std::int64_t*>(found.data())));
    }
    EXPECT_EQ(download<std::int64_t>(stream, found, expected.size()), expected) << describe(lists);
  }
}

TEST(AttendSelectedCudaShapes, RefusesWhatDenseRefuses) {
  const AttentionShape shape = make_shape(1, 17, 64, 16);
  EXPECT_THROW(cuda::attend_selected({}, shape, {}, {}, {}, {}, 1, {}, {}, {}, {}), Error);
}

}  // namespace
}  // namespace vesper
