// Prefill and decode attention against the formula in double precision, under a bound derived from fp32.
#include "attention/attend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "attention/attend_lanes.h"
#include "attention/kv_tiles.h"
#include "engine/core/lanes.h"
#include "tests/attention/attend_reference.h"
#include "tests/paged.h"

namespace vesper {
namespace {

struct World {
  AttentionShape shape;
  RaggedBatch ragged;
  PagedTensor k, v;
  std::vector<float> q, out, lse;

  World(std::mt19937& random, Phase phase, const AttentionShape& sizes, const std::vector<int>& lengths,
        const std::vector<int>& query_tokens, float q_range = 4.0F)
      : shape(sizes),
        ragged(random, phase, lengths, query_tokens, sizes.page_tokens),
        k(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim),
        v(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim) {
    k.fill(ragged.batch, random);
    v.fill(ragged.batch, random);
    const auto elements = static_cast<std::size_t>(ragged.batch.tokens * shape.heads * shape.head_dim);
    q = random_floats(random, elements, -q_range, q_range);
    out.assign(elements, NAN);
    lse.assign(static_cast<std::size_t>(ragged.batch.tokens * shape.heads), NAN);
  }
  TensorView<float, 2> rows(std::vector<float>& data) const {
    return TensorView<float, 2>(data.data(), ragged.batch.tokens, shape.heads * shape.head_dim);
  }

  void prefill() { cpu::attend_prefill(shape, rows(q), {k.ref(), v.ref()}, ragged.batch, rows(out)); }

  void decode(const SplitPlan& plan, bool with_lse = true) {
    const int seqs = ragged.batch.seqs;
    std::vector<float> partial_out(static_cast<std::size_t>(seqs * shape.heads * plan.splits * shape.head_dim), NAN);
    std::vector<float> partial_lse(static_cast<std::size_t>(seqs * shape.heads * plan.splits), NAN);
    const SplitPartials partials{
        TensorView<float, 4>(partial_out.data(), seqs, shape.heads, plan.splits, shape.head_dim),
        TensorView<float, 3>(partial_lse.data(), seqs, shape.heads, plan.splits)};
    cpu::attend_decode(shape, rows(q), {k.ref(), v.ref()}, ragged.batch, plan, partials, rows(out),
                       with_lse ? TensorView<float, 2>(lse.data(), seqs, shape.heads) : TensorView<float, 2>(),
                       INT32_MAX);
  }

  void check(const std::string& what, bool with_lse) {
    Comparison outs;
    Comparison lses;
    for (int t = 0; t < ragged.batch.tokens; ++t) {
      for (int h = 0; h < shape.heads; ++h) {
        const std::size_t row = static_cast<std::size_t>(t * shape.heads + h);
        const std::size_t first = row * static_cast<std::size_t>(shape.head_dim);
        const Reference truth = reference(shape, q.data() + first, k, v, ragged.batch, ragged.batch.seq_of_token(t),
                                          h / shape.group(), first_keys(ragged.batch.positions(t) + 1));
        outs.add(std::span(out).subspan(first, truth.out.size()), truth);
        if (with_lse) lses.add(lse[row], truth.lse, truth.lse_bound);
      }
    }
    outs.expect(what + ", out");
    lses.expect(what + ", lse");
  }
};

TEST(AttendCpu, PrefillMatchesTheFormula) {
  std::mt19937 random(1);
  const int head_dims[] = {64, 20, 128, 7, 96};
  const int pages[] = {16, 32, 64};
  for (int group = 1; group <= 8; ++group) {
    const AttentionShape shape = make_shape(1 + group % 2, group, head_dims[group % 5], pages[group % 3]);
    // From the start, one token, a chunk from mid-page after earlier context, one that ends on a page border.
    World world(random, Phase::kPrefill, shape, {65, 1, 150, 192, 33}, {65, 1, 37, 64, 2});
    world.prefill();
    world.check(describe(shape), false);
  }
}

TEST(AttendCpu, PrefillOfALongPrompt) {
  std::mt19937 random(2);
  const AttentionShape shape = make_shape(2, 2, 64, 16);
  World world(random, Phase::kPrefill, shape, {700, 2000}, {700, 130});
  world.prefill();
  world.check(describe(shape), false);
}

TEST(AttendCpu, PrefillInChunksIsPrefillAtOnce) {
  std::mt19937 random(3);
  const AttentionShape shape = make_shape(2, 3, 64, 16);
  World whole(random, Phase::kPrefill, shape, {300}, {300});
  whole.prefill();
  // The last 77 queries alone, over the same cache.
  World chunk(random, Phase::kPrefill, shape, {300}, {77});
  chunk.k.data = whole.k.data;
  chunk.v.data = whole.v.data;
  chunk.ragged.page_table = whole.ragged.page_table;
  chunk.ragged.batch.page_table = whole.ragged.batch.page_table;
  const auto skipped = static_cast<std::ptrdiff_t>((300 - 77) * shape.heads * shape.head_dim);
  chunk.q.assign(whole.q.begin() + skipped, whole.q.end());
  chunk.prefill();
  for (std::size_t i = 0; i < chunk.out.size(); ++i) {
    ASSERT_EQ(chunk.out[i], whole.out[i + static_cast<std::size_t>(skipped)]) << "element " << i;
  }
}

TEST(AttendCpu, DecodeMatchesTheFormula) {
  std::mt19937 random(4);
  const int head_dims[] = {64, 20, 128, 7, 96};
  const int pages[] = {16, 32, 64};
  for (int group = 1; group <= 8; ++group) {
    const AttentionShape shape = make_shape(1 + group % 2, group, head_dims[group % 5], pages[group % 3]);
    World world(random, Phase::kDecode, shape, {1, 2, 16, 65, 333, 2000}, {1, 1, 1, 1, 1, 1});
    // Split borders inside, on and past the ends of sequences; the short ones leave all splits but the first empty.
    for (const SplitPlan plan : {SplitPlan{1, 2048}, SplitPlan{3, 704}, SplitPlan{32, 64}}) {
      world.decode(plan);
      world.check(describe(shape) + ", splits " + std::to_string(plan.splits), true);
    }
  }
}

TEST(AttendCpu, DecodeTakesThePlanOfPlanSplits) {
  std::mt19937 random(5);
  const AttentionShape shape = make_shape(2, 4, 64, 16);
  World world(random, Phase::kDecode, shape, {1999, 3}, {1, 1});
  world.decode(plan_splits(shape, 2, 1999, 16, 64), false);
  world.check("planned", false);
  for (const float value : world.lse) EXPECT_TRUE(std::isnan(value)) << "lse was written without being asked for";
}

// Scores of hundreds: the running maximum keeps every weight in range, and one key takes all.
TEST(AttendCpu, LargeScoresStayFinite) {
  std::mt19937 random(6);
  const AttentionShape shape = make_shape(1, 2, 64, 16);
  World decode(random, Phase::kDecode, shape, {500}, {1}, 300.0F);
  decode.decode({4, 128});
  decode.check("decode", true);
  World prefill(random, Phase::kPrefill, shape, {200}, {200}, 300.0F);
  prefill.prefill();
  prefill.check("prefill", false);
}

// A sequence's result does not depend on its neighbours in the batch.
TEST(AttendCpu, DecodeAloneIsDecodeInABatch) {
  std::mt19937 random(7);
  const AttentionShape shape = make_shape(2, 2, 64, 16);
  World batched(random, Phase::kDecode, shape, {70, 400, 1}, {1, 1, 1});
  batched.decode({4, 128});
  World alone(random, Phase::kDecode, shape, {400}, {1});
  for (int t = 0; t < 400; ++t) {
    for (int g = 0; g < shape.kv_heads; ++g) {
      for (int d = 0; d < shape.head_dim; ++d) {
        alone.k.at(alone.ragged.batch, 0, t, g, d) = batched.k.at(batched.ragged.batch, 1, t, g, d);
        alone.v.at(alone.ragged.batch, 0, t, g, d) = batched.v.at(batched.ragged.batch, 1, t, g, d);
      }
    }
  }
  const auto row = static_cast<std::ptrdiff_t>(alone.q.size());
  alone.q.assign(batched.q.begin() + row, batched.q.begin() + 2 * row);
  alone.decode({4, 128});
  for (std::size_t i = 0; i < alone.out.size(); ++i) ASSERT_EQ(alone.out[i], batched.out[alone.out.size() + i]);
}

// The baseline and the AVX2 build, to the bit.
TEST(AttendLanes, BothBuildsGiveTheSameBits) {
  if (!cpu::has_avx2()) GTEST_SKIP() << "this machine has no AVX2";
  std::mt19937 random(8);
  for (const AttentionShape& shape : {make_shape(1, 2, 64, 16), make_shape(1, 3, 20, 16), make_shape(1, 1, 128, 32)}) {
    World world(random, Phase::kPrefill, shape, {277}, {277}, 20.0F);
    const std::vector<std::int32_t> offsets = cpu::chunk_offsets(shape);
    cpu::TileList pages;
    const cpu::KvTiles kv = pages.list(shape, {world.k.ref(), world.v.ref()}, world.ragged.batch, 0, 0, 277, offsets);
    const int group = shape.group();
    std::vector<float> wide_out(world.out.size());
    std::vector<float> wide_lse(static_cast<std::size_t>(group));
    const auto equal = [&](std::size_t count) {
      for (std::size_t i = 0; i < count; ++i) {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(wide_out[i]), std::bit_cast<std::uint32_t>(world.out[i]))
            << describe(shape) << ", element " << i;
      }
    };

    cpu::LaneScratch scratch(std::max(cpu::avx2::prefill_scratch(277, group, shape.head_dim),
                                      cpu::baseline::prefill_scratch(277, group, shape.head_dim)));
    cpu::PrefillTile tile{.kv = kv,
                          .q = world.q.data(),
                          .out = world.out.data(),
                          .row_stride = std::int64_t{shape.heads} * shape.head_dim,
                          .queries = 277,
                          .group = group,
                          .first_position = 0,
                          .scale = shape.scale,
                          .scratch = scratch.data()};
    cpu::baseline::attend(tile);
    tile.out = wide_out.data();
    cpu::avx2::attend(tile);
    equal(wide_out.size());

    cpu::DecodeSplit split{.kv = kv,
                           .q = world.q.data(),
                           .group = group,
                           .key_begin = 32,
                           .key_end = 277,
                           .tail_begin = 100,
                           .tail_log_weight = 1.5F,
                           .scale = shape.scale,
                           .out = world.out.data(),
                           .out_stride = shape.head_dim,
                           .lse = world.lse.data(),
                           .lse_stride = 1,
                           .scratch = scratch.data()};
    cpu::baseline::attend(split);
    split.out = wide_out.data();
    split.lse = wide_lse.data();
    cpu::avx2::attend(split);
    equal(static_cast<std::size_t>(group * shape.head_dim));
    for (std::size_t h = 0; h < wide_lse.size(); ++h) ASSERT_EQ(wide_lse[h], world.lse[h]);
  }
}

TEST(PlanSplits, CoverEveryLengthInWholePages) {
  for (const int page_tokens : {16, 32, 64}) {
    const AttentionShape shape = make_shape(2, 2, 64, page_tokens);
    for (const int kv_len : {1, 15, 16, 17, 127, 128, 129, 1000, 4096, 100000}) {
      for (const int units : {1, 2, 132, 1000}) {
        for (const int most : {1, 8, 64}) {
          const SplitPlan plan = plan_splits(shape, 3, kv_len, units, most);
          EXPECT_GE(plan.splits, 1);
          EXPECT_LE(plan.splits, most);
          // Made for kv_len, it serves every shorter length: all of it is covered, by runs as even as pages allow.
          for (const int length : {kv_len, (kv_len + 1) / 2, 1}) {
            const int run = split_length(length, plan.splits, plan.min_tokens, page_tokens);
            EXPECT_EQ(run % page_tokens, 0);
            EXPECT_GE(std::int64_t{plan.splits} * run, length);
            if (run == plan.min_tokens) continue;
            EXPECT_LT(std::int64_t{plan.splits} * (run - page_tokens), length);
          }
          const int longest = split_length(kv_len, plan.splits, plan.min_tokens, page_tokens);
          EXPECT_LT(std::int64_t{plan.splits - 1} * longest, kv_len) << "the last split is empty";
        }
      }
    }
  }
}

// Scratch is sized once, for the longest context; a plan for a shorter one may have more splits.
TEST(PlanSplits, StayWithinTheMost) {
  for (const int kv_heads : {1, 2, 8, 32}) {
    const AttentionShape shape = make_shape(kv_heads, 4, 128, 16);
    for (const int seqs : {1, 2, 4, 17, 64}) {
      for (const int longest : {100, 2080, 40000}) {
        const int most = most_splits(shape, seqs, longest, 264);
        for (int kv_len = 1; kv_len <= longest; kv_len += kv_len < 5000 ? 1 : 977) {
          ASSERT_LE(plan_splits(shape, seqs, kv_len, 264, 264).splits, most) << kv_len << " of " << longest;
        }
      }
    }
  }
}

// On a device that runs 264 blocks at once, 64 draw all its bandwidth (docs/kernels.md).
TEST(PlanSplits, FillTheDeviceWithFewBlocks) {
  EXPECT_EQ(wanted_splits(1, 8, 264), 8);
  EXPECT_EQ(wanted_splits(1, 32, 264), 2);
  EXPECT_EQ(wanted_splits(8, 8, 264), 4) << "one long sequence among short ones has 32 blocks";
  for (int kv_heads = 1; kv_heads <= 1024; ++kv_heads) {
    const int blocks = kv_heads * wanted_splits(1, kv_heads, 264);
    const int last = blocks % 264 == 0 ? 264 : blocks % 264;
    EXPECT_GE(blocks, 62);
    // What a last round of fewer than 66 blocks leaves idle is a sixteenth of the whole at most.
    EXPECT_LE(16 * std::max(0, 66 - last), blocks) << kv_heads << " KV heads";
  }
  const auto splits = [](int seqs, int kv_heads, int max_kv_len) {
    return plan_splits(make_shape(kv_heads, 4, 128, 16), seqs, max_kv_len, 264, 264).splits;
  };
  EXPECT_EQ(splits(1, 8, 4096), 8);
  EXPECT_EQ(splits(1, 8, 32768), 33) << "long splits fill the device";
  EXPECT_EQ(splits(1, 32, 32768), 8) << "in one round";
  EXPECT_EQ(splits(8, 8, 512), 1);
  EXPECT_EQ(splits(8, 8, 8192), 4);
  EXPECT_EQ(splits(4, 8, 8192), 8);
  EXPECT_EQ(splits(32, 8, 32768), 4) << "a batch's longest sequence has 32 blocks";
  EXPECT_EQ(splits(8, 32, 32768), 1);
}

}  // namespace
}  // namespace vesper
