// Top-p pruning on CUDA against the CPU's: the same scores give the same lists, entry by entry.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/mass.h"
#include "attention/prune_top_p.h"
#include "engine/core/error.h"
#include "tests/gpu.h"
#include "tests/paged_device.h"
#include "tests/score_rows.h"

namespace vesper {
namespace {

struct World : ScoredBatch {
  Stream stream{DeviceKind::kCuda};

  using ScoredBatch::ScoredBatch;

  // Lists as on the device, -1 wherever nothing was written.
  void on_device(const TopPRule& rule, DenseLimit dense, TokenLists& lists) {
    constexpr std::size_t kGuard = 1024;
    const int seqs = ragged.batch.seqs;
    const int kv_heads = shape.kv_heads;
    const Buffer device_scores = upload(stream, scores);
    const DeviceBatch device(stream, ragged);
    Selection listed = pages;
    Buffer page_index;
    Buffer page_count;
    if (pages.index.data() != nullptr) {
      page_index =
          upload(stream, std::vector<std::int32_t>(pages.index.data(), pages.index.data() + pages.index.size()));
      page_count =
          upload(stream, std::vector<std::int32_t>(pages.count.data(), pages.count.data() + pages.count.size()));
      listed.index = page_index.view<std::int32_t>(seqs, kv_heads, pages.index.shape(2));
      listed.count = page_count.view<std::int32_t>(seqs, kv_heads);
      listed.tail_begin = listed.count;
    }
    std::vector<std::int32_t> guarded = lists.index;
    guarded.resize(guarded.size() + kGuard, -1);
    const Buffer index = upload(stream, guarded);
    const Buffer count = upload(stream, lists.count);
    const Buffer tail_begin = upload(stream, lists.tail_begin);
    Selection tokens;
    tokens.index = index.view<std::int32_t>(seqs, kv_heads, capacity);
    tokens.count = count.view<std::int32_t>(seqs, kv_heads);
    tokens.tail_begin = tail_begin.view<std::int32_t>(seqs, kv_heads);
    prune_top_p(stream.exec(), shape, device.batch, device_scores.view<const float>(seqs, shape.heads, capacity),
                listed, rule, dense, tokens);
    guarded = download<std::int32_t>(stream, index, guarded.size());
    for (std::size_t i = lists.index.size(); i < guarded.size(); ++i) EXPECT_EQ(guarded[i], -1) << "behind the lists";
    std::copy_n(guarded.begin(), lists.index.size(), lists.index.begin());
    lists.count = download<std::int32_t>(stream, count, lists.count.size());
    lists.tail_begin = download<std::int32_t>(stream, tail_begin, lists.tail_begin.size());
    // The views follow the vectors.
    lists.tokens.count = TensorView<std::int32_t, 2>(lists.count.data(), seqs, kv_heads);
    lists.tokens.tail_begin = TensorView<std::int32_t, 2>(lists.tail_begin.data(), seqs, kv_heads);
  }

  void check(const TopPRule& rule, DenseLimit dense, const std::string& what) {
    const int seqs = ragged.batch.seqs;
    TokenLists expected(seqs, shape.kv_heads, capacity);
    TokenLists found(seqs, shape.kv_heads, capacity);
    cpu::prune_top_p(shape, ragged.batch, TensorView<const float, 3>(scores.data(), seqs, shape.heads, capacity), pages,
                     rule, dense, expected.tokens);
    on_device(rule, dense, found);
    const std::string at = what + ", p " + std::to_string(rule.top_p);
    for (int s = 0; s < seqs; ++s) {
      for (int g = 0; g < shape.kv_heads; ++g) {
        ASSERT_EQ(found.tokens.count(s, g), expected.tokens.count(s, g))
            << at << ": sequence " << s << " of " << ragged.batch.kv_len(s) << " tokens, KV head " << g;
        ASSERT_EQ(found.tokens.tail_begin(s, g), expected.tokens.tail_begin(s, g)) << at;
      }
    }
    const auto [here, there] = std::mismatch(found.index.begin(), found.index.end(), expected.index.begin());
    ASSERT_TRUE(here == found.index.end())
        << at << ": list " << (here - found.index.begin()) / capacity << ", entry "
        << (here - found.index.begin()) % capacity << ": expected token " << *there << ", found " << *here;
  }
};

TEST(PruneTopPCuda, GivesTheCpusListsOnEveryKindOfRow) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(1);
  for (const ScoreRows& rows : score_rows()) {
    World world(random, 1, 1, 16, {1, 2, 16, 17, 100, 1000, 1023, 1024, 1025, 8192});
    world.score(random, {}, [&](int) -> const ScoreRows& { return rows; });
    for (const float p : {0.01F, 0.1F, 0.5F, 0.85F, 0.95F, 0.99F, 0.9999F, 0.9999999F, 1.0F}) {
      world.check({.top_p = p, .min_tokens = 1}, {}, rows.name);
    }
    for (const int floor : {16, 500, 5000}) {
      world.check({.top_p = 0.3F, .min_tokens = floor}, {}, rows.name + ", floor " + std::to_string(floor));
    }
  }
}

TEST(PruneTopPCuda, GivesTheCpusListsForGroupsAndPageLists) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(2);
  for (const auto& [group, page_tokens] :
       {std::pair{1, 16}, {2, 32}, {3, 16}, {4, 64}, {5, 16}, {7, 32}, {8, 16}, {16, 16}}) {
    World world(random, 2, group, page_tokens, {1, 40, 333, 2000});
    for (std::size_t first = 0; first < score_rows().size(); first += 3) {
      const PageLists lists(random, world.ragged.batch, 2, page_tokens, 0.4, first % 2 == 0);
      for (const Selection& pages : {Selection{}, lists.pages}) {
        world.score(random, pages, [&](int h) -> const ScoreRows& {
          return score_rows()[(first + static_cast<std::size_t>(h)) % score_rows().size()];
        });
        const std::string what = "group " + std::to_string(group) + ", rows from " + score_rows()[first].name;
        world.check({.top_p = 0.1F}, {}, what);
        world.check({.top_p = 0.95F}, {.tokens = 40}, what + ", a dense limit");
        world.check({.top_p = 0.85F, .sink_tokens = {20}, .window_tokens = {0.1}}, {}, what + ", sink and window");
      }
    }
  }
}

// Rows that fit into shared memory and rows that do not, up to the most candidates there may be.
TEST(PruneTopPCuda, GivesTheCpusListsForLongContexts) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(3);
  for (const ScoreRows& rows : score_rows()) {
    World world(random, 1, 2, 16, {40000, 20479, 20480, 20481});
    world.score(random, {}, [&](int) -> const ScoreRows& { return rows; });
    for (const float p : {0.5F, 0.95F, 0.9999F}) world.check({.top_p = p}, {}, rows.name);
  }
  for (const char* name : {"no sink", "all equal", "one-hot"}) {
    const auto rows = std::find_if(score_rows().begin(), score_rows().end(), [&](auto& r) { return r.name == name; });
    World world(random, 1, 1, 16, {static_cast<int>(kMaxCandidates)});
    world.score(random, {}, [&](int) -> const ScoreRows& { return *rows; });
    for (const float p : {0.5F, 0.95F}) world.check({.top_p = p}, {}, rows->name + ", 2^20 candidates");
  }
}

// Where blocks are few each has a multiprocessor for itself, as in the tests above; here some have not.
TEST(PruneTopPCuda, GivesTheCpusListsWhereListsFillTheDevice) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(4);
  for (const auto& [kv_heads, group] : {std::pair{30, 1}, {60, 1}, {5, 4}, {12, 4}}) {
    World world(random, kv_heads, group, 16, {6000, 1, 5001, 4096});
    for (std::size_t kind = static_cast<std::size_t>(group) % 2; kind < score_rows().size(); kind += 2) {
      const ScoreRows& rows = score_rows()[kind];
      const PageLists lists(random, world.ragged.batch, kv_heads, 16, 0.7, false);
      for (const Selection& pages : {Selection{}, lists.pages}) {
        world.score(random, pages, [&](int) -> const ScoreRows& { return rows; });
        const std::string what = rows.name + ", " + std::to_string(kv_heads) + " KV heads";
        world.check({.top_p = 0.9F}, {}, what);
        world.check({.top_p = 0.3F, .min_tokens = 700, .sink_tokens = {20}}, {}, what + ", floor 700");
      }
    }
  }
}

// The longest row that fits and the shortest that does not, few enough that slow tools can watch.
TEST(PruneTopPCuda, GivesTheCpusListsOnBothSidesOfSharedMemory) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(5);
  for (const char* name : {"sink first", "heavy ties"}) {
    const auto rows = std::find_if(score_rows().begin(), score_rows().end(), [&](auto& r) { return r.name == name; });
    World world(random, 1, 2, 16, {32768, 32769});
    world.score(random, {}, [&](int) -> const ScoreRows& { return *rows; });
    world.check({.top_p = 0.95F}, {}, rows->name);
  }
}

TEST(PruneTopPCuda, RefusesMoreCandidatesThanItsSumsHold) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const AttentionShape shape{.heads = 1, .kv_heads = 1, .head_dim = 64, .page_tokens = 16, .scale = 1.0F};
  float nothing = 0.0F;
  Batch batch;
  batch.seqs = 1;
  const TensorView<const float, 3> scores(&nothing, 1, 1, kMaxCandidates + 1);
  EXPECT_THROW(cuda::prune_top_p(stream.exec(), shape, batch, scores, {}, {}, {}, {}), Error);
}

}  // namespace
}  // namespace vesper
