// Side tables against tables made naively, key by key, from the stored keys.
#include "kvcache/side_tables.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kvcache/append.h"
#include "kvcache/kv_cache.h"
#include "tests/compare.h"
#include "tests/side_tables.h"

namespace vesper {
namespace {

struct Case {
  int kv_heads, head_dim, page_tokens;
};

// The code of one key by the contract, in double precision: the division of two floats, rounded to float, is the
// division in double rounded to float (double has more than twice float's digits and two; Figueroa, 1995).
int naive_code(float key, float scale, float zero) {
  if (scale == 0.0F) return 0;
  const auto difference = static_cast<float>(static_cast<double>(key) - static_cast<double>(zero));
  const auto steps = static_cast<float>(static_cast<double>(difference) / static_cast<double>(scale));
  const double floor = std::floor(steps);
  const double rest = static_cast<double>(steps) - floor;
  const bool odd = std::fmod(floor, 2.0) != 0.0;
  const double rounded = rest > 0.5 || (rest == 0.5 && odd) ? floor + 1 : floor;
  return static_cast<int>(std::clamp(rounded, 0.0, 15.0));
}

// Rules of the contract that one span of one side breaks. `outward`: -1 for least keys, 1 for largest. Products of 8
// bits by 8 are exact in double precision.
int wrong_in_span(const std::vector<float>& bounds, bf16 scale, const std::vector<std::uint8_t>& stored, int outward) {
  double largest = 0.0;
  for (const float x : bounds) largest = std::max(largest, std::abs(static_cast<double>(x)));
  int wrong = 127.0 * to_float(scale) >= largest ? 0 : 1;
  if (scale.bits > 0) wrong += 127.0 * to_float(bf16{static_cast<std::uint16_t>(scale.bits - 1)}) < largest ? 0 : 1;
  for (std::size_t i = 0; i < bounds.size(); ++i) {
    const int code = stored[i] - kBoundZero;
    const double x = outward * static_cast<double>(bounds[i]);
    wrong += outward * code * static_cast<double>(to_float(scale)) >= x ? 0 : 1;
    if (scale.bits > 0) wrong += (outward * code - 1) * static_cast<double>(to_float(scale)) < x ? 0 : 1;
    if (scale.bits == 0) wrong += code == 0 ? 0 : 1;
    wrong += std::abs(code) <= 127 ? 0 : 1;
  }
  return wrong;
}

// Every page of every sequence in `touched` holds what its keys say, and nothing else was written.
void expect_tables(const Case& c, const RaggedBatch& ragged, PagedTensor& k, const SideTensors& tables,
                   const std::set<std::pair<int, int>>& touched, const std::string& what) {
  const Batch& batch = ragged.batch;
  const SideTensors poison(k);
  std::vector<bool> page_written(static_cast<std::size_t>(k.pages), false);
  std::vector<bool> line_written(static_cast<std::size_t>(k.pages * c.page_tokens), false);
  int wrong_bounds = 0;
  int wrong_int8 = 0;
  int wrong_codes = 0;
  int wrong_params = 0;
  std::vector<float> found;
  std::vector<double> expected;
  std::vector<double> bound;
  for (const auto& [s, p] : touched) {
    const std::int32_t page = batch.page_table(s, p);
    const int begin = p * c.page_tokens;
    const int end = std::min(begin + c.page_tokens, batch.kv_len(s));
    page_written[static_cast<std::size_t>(page)] = true;
    for (int g = 0; g < c.kv_heads; ++g) {
      const auto at = [&](const auto& table, std::int64_t row, std::int64_t rows, std::int64_t column,
                          std::int64_t columns) {
        return table[static_cast<std::size_t>(((std::int64_t{page} * c.kv_heads + g) * rows + row) * columns + column)];
      };
      std::vector<float> of_span[2];
      std::vector<std::uint8_t> codes[2];
      for (int d = 0; d < c.head_dim; ++d) {
        float least = INFINITY;
        float largest = -INFINITY;
        double sum = 0.0;
        double magnitude = 0.0;
        double squares = 0.0;
        for (int t = begin; t < end; ++t) {
          const float key = k.at(batch, s, t, g, d);
          least = std::min(least, key);
          largest = std::max(largest, key);
          sum += key;
          magnitude += std::abs(key);
          squares += static_cast<double>(key) * key;
        }
        wrong_bounds += at(tables.bounds, 0, 2, d, c.head_dim) == least ? 0 : 1;
        wrong_bounds += at(tables.bounds, 1, 2, d, c.head_dim) == largest ? 0 : 1;
        for (const int side : {0, 1}) {
          of_span[side].push_back(side == 0 ? least : largest);
          codes[side].push_back(at(tables.int8_bounds, side, 2, d, c.head_dim));
          if ((d + 1) % kBoundSpan != 0 && d + 1 != c.head_dim) continue;
          const bf16 scale = at(tables.int8_scales, side, 2, d / kBoundSpan, bound_spans(c.head_dim));
          wrong_int8 += wrong_in_span(of_span[side], scale, codes[side], side == 0 ? -1 : 1);
          of_span[side].clear();
          codes[side].clear();
        }
        found.push_back(at(tables.moments, 0, 2, d, c.head_dim));
        expected.push_back(sum);
        bound.push_back(sum_bound(end - begin, magnitude));
        found.push_back(at(tables.moments, 1, 2, d, c.head_dim));
        expected.push_back(squares);
        bound.push_back(sum_bound(end - begin, squares));
      }
      for (int t = begin; t < end; ++t) {
        const int line = t - begin;
        line_written[static_cast<std::size_t>(page * c.page_tokens + line)] = true;
        float least = INFINITY;
        float largest = -INFINITY;
        for (int d = 0; d < c.head_dim; ++d) {
          least = std::min(least, k.at(batch, s, t, g, d));
          largest = std::max(largest, k.at(batch, s, t, g, d));
        }
        const f16 zero_bits = to_f16(least);
        const float zero = to_float(zero_bits);
        const f16 scale_bits = to_f16((largest - zero) / 15.0F);
        wrong_params += at(tables.int4_params, line, c.page_tokens, 0, 2).bits == scale_bits.bits ? 0 : 1;
        wrong_params += at(tables.int4_params, line, c.page_tokens, 1, 2).bits == zero_bits.bits ? 0 : 1;
        for (int d = 0; d < c.head_dim; ++d) {
          const std::uint8_t byte = at(tables.int4, line, c.page_tokens, d / 2, c.head_dim / 2);
          const int code = d % 2 == 0 ? byte & 15 : byte >> 4;
          wrong_codes += code == naive_code(k.at(batch, s, t, g, d), to_float(scale_bits), zero) ? 0 : 1;
        }
      }
    }
  }
  EXPECT_EQ(wrong_bounds, 0) << what;
  EXPECT_EQ(wrong_int8, 0) << what;
  EXPECT_EQ(wrong_params, 0) << what;
  EXPECT_EQ(wrong_codes, 0) << what;
  expect_within(found, expected, bound, what + ", moments");

  int written_beside = 0;
  for (std::size_t i = 0; i < tables.bounds.size(); ++i) {
    const std::size_t page = i / static_cast<std::size_t>(c.kv_heads * 2 * c.head_dim);
    if (page_written[page]) continue;
    written_beside += std::isnan(tables.bounds[i]) && std::isnan(tables.moments[i]) ? 0 : 1;
    written_beside += tables.int8_bounds[i] == kPoisonByte ? 0 : 1;
  }
  for (std::size_t i = 0; i < tables.int8_scales.size(); ++i) {
    const std::size_t page = i / static_cast<std::size_t>(c.kv_heads * 2 * bound_spans(c.head_dim));
    if (!page_written[page]) written_beside += tables.int8_scales[i].bits == kPoisonBf16.bits ? 0 : 1;
  }
  const auto line_of = [&](std::size_t i, std::size_t row) {  // element i of rows [pages, kv_heads, page_tokens]
    const auto page_tokens = static_cast<std::size_t>(c.page_tokens);
    const std::size_t page = i / row / page_tokens / static_cast<std::size_t>(c.kv_heads);
    return page * page_tokens + i / row % page_tokens;
  };
  for (std::size_t i = 0; i < tables.int4.size(); ++i) {
    if (!line_written[line_of(i, static_cast<std::size_t>(c.head_dim / 2))]) {
      written_beside += tables.int4[i] == kPoisonByte ? 0 : 1;
    }
  }
  for (std::size_t i = 0; i < tables.int4_params.size(); ++i) {
    if (!line_written[line_of(i, 2)]) written_beside += tables.int4_params[i].bits == kPoisonF16.bits ? 0 : 1;
  }
  EXPECT_EQ(written_beside, 0) << what;
}

std::set<std::pair<int, int>> pages_of_step(const Batch& batch, int page_tokens) {
  std::set<std::pair<int, int>> pages;
  for (int t = 0; t < batch.tokens; ++t) pages.emplace(batch.seq_of_token(t), batch.positions(t) / page_tokens);
  return pages;
}

const std::vector<Case> kCases = {{4, 64, 16}, {2, 128, 32}, {1, 20, 16}, {3, 96, 64}, {1, 2, 16}};

std::string describe(const Case& c) {
  return "kv_heads " + std::to_string(c.kv_heads) + ", head_dim " + std::to_string(c.head_dim) + ", page_tokens " +
         std::to_string(c.page_tokens);
}

// Chunks from the start, of one token (a page of one token), from mid-page, across pages, from a page's first line.
TEST(SideTables, HoldWhatThePagesOfAChunkSay) {
  std::mt19937 random(1);
  for (const Case& c : kCases) {
    const RaggedBatch ragged(random, Phase::kPrefill, {40, 1, 70, 129, 65}, {40, 1, 33, 60, 1}, c.page_tokens);
    PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
    k.fill(ragged.batch, random);
    SideTensors tables(k);
    cpu::update_side_tables(ragged.batch, tables.layer(k));
    expect_tables(c, ragged, k, tables, pages_of_step(ragged.batch, c.page_tokens), describe(c));
  }
}

TEST(SideTables, FollowDecodeStepsTokenByToken) {
  std::mt19937 random(2);
  for (const Case& c : kCases) {
    const int length = 2 * c.page_tokens + 3;
    const RaggedBatch whole(random, Phase::kPrefill, {length}, {length}, c.page_tokens);
    PagedTensor k(whole.pages, c.kv_heads, c.page_tokens, c.head_dim);
    k.fill(whole.batch, random);
    SideTensors tables(k);
    for (std::int32_t t = 0; t < length; ++t) {
      const std::vector<std::int32_t> start = {0, 1};
      const std::int32_t kv_len = t + 1;
      Batch step = whole.batch;
      step.phase = Phase::kDecode;
      step.tokens = step.max_query_tokens = 1;
      step.positions = TensorView<const std::int32_t, 1>(&t, 1);
      step.query_start = TensorView<const std::int32_t, 1>(start.data(), 2);
      step.kv_len = TensorView<const std::int32_t, 1>(&kv_len, 1);
      cpu::update_side_tables(step, tables.layer(k));
    }
    expect_tables(c, whole, k, tables, pages_of_step(whole.batch, c.page_tokens), describe(c));
  }
}

// A page that another sequence filled with larger keys, then one that starts on it with one token.
TEST(SideTables, ForgetThePageBefore) {
  std::mt19937 random(3);
  const Case c{2, 64, 16};
  const RaggedBatch before(random, Phase::kPrefill, {16}, {16}, c.page_tokens);
  PagedTensor k(before.pages, c.kv_heads, c.page_tokens, c.head_dim);
  k.fill(before.batch, random);
  for (float& key : k.data) key *= 100.0F;
  SideTensors tables(k);
  cpu::update_side_tables(before.batch, tables.layer(k));
  SideTensors fresh(k);

  RaggedBatch after(random, Phase::kDecode, {1}, {1}, c.page_tokens);
  after.page_table[0] = before.page_table[0];
  for (int g = 0; g < c.kv_heads; ++g) {
    for (int d = 0; d < c.head_dim; ++d) k.at(after.batch, 0, 0, g, d) = 0.01F * static_cast<float>(d - 20);
  }
  cpu::update_side_tables(after.batch, tables.layer(k));
  cpu::update_side_tables(after.batch, fresh.layer(k));
  expect_tables(c, after, k, fresh, {{0, 0}}, "fresh tables");
  for (std::size_t i = 0; i < fresh.bounds.size(); ++i) {
    if (std::isnan(fresh.bounds[i])) continue;
    EXPECT_EQ(tables.bounds[i], fresh.bounds[i]);
    EXPECT_EQ(tables.moments[i], fresh.moments[i]);
    EXPECT_EQ(tables.int8_bounds[i], fresh.int8_bounds[i]);
  }
  for (std::size_t i = 0; i < fresh.int8_scales.size(); ++i) {
    if (fresh.int8_scales[i].bits != kPoisonBf16.bits) {
      EXPECT_EQ(tables.int8_scales[i].bits, fresh.int8_scales[i].bits);
    }
  }
}

// Bounds of one page of one token, then of two, whose codes are worked out by hand: the second token widens the range,
// so the first one's codes change with the scale.
TEST(SideTables, RoundEightBitBoundsOutward) {
  std::mt19937 random(7);
  const Case c{1, 4, 16};
  const RaggedBatch ragged(random, Phase::kPrefill, {2}, {2}, c.page_tokens);
  const RaggedBatch first(random, Phase::kPrefill, {1}, {1}, c.page_tokens);
  PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  const float rows[2][4] = {{127.0F, 0.25F, -0.25F, -3.0F}, {-254.0F, 0.0F, -0.0F, 2.5F}};
  for (int t = 0; t < 2; ++t) {
    for (int d = 0; d < 4; ++d) k.at(ragged.batch, 0, t, 0, d) = rows[t][d];
  }
  SideTensors tables(k);
  const auto page = static_cast<std::size_t>(ragged.page_table[0]);
  const auto expect = [&](const Batch& batch, float below, float above, const std::vector<int>& codes) {
    cpu::update_side_tables(batch, tables.layer(k));
    EXPECT_EQ(to_float(tables.int8_scales[page * 2]), below);
    EXPECT_EQ(to_float(tables.int8_scales[page * 2 + 1]), above);
    for (std::size_t i = 0; i < 8; ++i) EXPECT_EQ(tables.int8_bounds[page * 8 + i] - kBoundZero, codes[i]) << i;
  };
  Batch of_first = first.batch;
  of_first.page_table = ragged.batch.page_table;
  expect(of_first, 1.0F, 1.0F, {127, 0, -1, -3, 127, 1, 0, -3});
  // Least -254, 0, -0.25, -3 in steps of 2; largest 127, 0.25, -0, 2.5 in steps of 1.
  expect(ragged.batch, 2.0F, 1.0F, {-127, 0, -1, -2, 127, 1, 0, 3});
}

// Scales at both ends of what fp32 holds, and a span whose largest bound is not a multiple of 127.
TEST(SideTables, EightBitBoundsHoldAtTheEndsOfTheRange) {
  std::mt19937 random(8);
  const Case c{1, 64, 16};
  for (const float size : {1e-44F, 3e-38F, 1e-6F, 1.0F, 1.003F, 6e4F, 1e38F}) {
    const RaggedBatch ragged(random, Phase::kPrefill, {40}, {40}, c.page_tokens);
    PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
    k.fill(ragged.batch, random);
    for (float& key : k.data) key *= size;
    SideTensors tables(k);
    cpu::update_side_tables(ragged.batch, tables.layer(k));
    const auto spans = static_cast<std::size_t>(bound_spans(c.head_dim));
    for (std::size_t i = 0; i < tables.bounds.size(); ++i) {
      if (std::isnan(tables.bounds[i])) continue;
      const int outward = i / 64 % 2 == 0 ? -1 : 1;
      const double scale = to_float(tables.int8_scales[i / 64 * spans + i % 64 / kBoundSpan]);
      EXPECT_GE(outward * (tables.int8_bounds[i] - kBoundZero) * scale,
                outward * static_cast<double>(tables.bounds[i]));
    }
  }
}

// Rows whose bits are worked out by hand, and rows that f16 rounds in an awkward place.
TEST(SideTables, PackFourBitsAsTheContractSays) {
  std::mt19937 random(4);
  const Case c{1, 4, 16};
  const RaggedBatch ragged(random, Phase::kPrefill, {6}, {6}, c.page_tokens);
  PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  const float rows[6][4] = {
      {0.0F, 15.0F, 1.0F, 14.0F},                 // scale 1, zero 0: codes 0 15 1 14
      {-1.0F, 0.5F, 2.0F, 6.5F},                  // scale 0.5: codes 0 3 6 15
      {0.5F, 2.5F, 15.0F, 0.0F},                  // halves to even: codes 0 2 15 0
      {3.25F, 3.25F, 3.25F, 3.25F},               // scale 0: codes 0
      {-0.0F, 0.0F, -0.0F, 0.0F},                 // zeros of both signs: all bits 0
      {0.99999F, 0.99999F, 0.999985F, 0.99999F},  // zero rounds up to 1, above the largest key
  };
  for (int t = 0; t < 6; ++t) {
    for (int d = 0; d < 4; ++d) k.at(ragged.batch, 0, t, 0, d) = rows[t][d];
  }
  SideTensors tables(k);
  cpu::update_side_tables(ragged.batch, tables.layer(k));
  const auto page = static_cast<std::size_t>(ragged.page_table[0]);
  const std::uint8_t* codes = tables.int4.data() + page * 16 * 2;
  const f16* params = tables.int4_params.data() + page * 16 * 2;
  const std::uint8_t expected[5][2] = {{0xF0, 0xE1}, {0x30, 0xF6}, {0x20, 0x0F}, {0, 0}, {0, 0}};
  const float scales[5] = {1.0F, 0.5F, 1.0F, 0.0F, 0.0F};
  const float zeros[5] = {0.0F, -1.0F, 0.0F, 3.25F, 0.0F};
  for (int t = 0; t < 5; ++t) {
    EXPECT_EQ(codes[2 * t], expected[t][0]) << t;
    EXPECT_EQ(codes[2 * t + 1], expected[t][1]) << t;
    EXPECT_EQ(params[2 * t].bits, to_f16(scales[t]).bits) << t;
    EXPECT_EQ(params[2 * t + 1].bits, to_f16(zeros[t]).bits) << t;
  }
  for (int d = 0; d < 4; ++d) {
    const int code = d % 2 == 0 ? codes[10 + d / 2] & 15 : codes[10 + d / 2] >> 4;
    const float back = static_cast<float>(code) * to_float(params[10]) + to_float(params[11]);
    EXPECT_NEAR(back, rows[5][d], 0x1p-11F);  // one rounding to f16 beside 1
  }
}

// What four bits lose: half a step, the rounding of zero (a key below it is cut off) and that of 15 scales.
TEST(SideTables, Int4KeysAreNearTheKeys) {
  std::mt19937 random(5);
  const Case c{2, 128, 16};
  const RaggedBatch ragged(random, Phase::kPrefill, {100}, {100}, c.page_tokens);
  PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  k.fill(ragged.batch, random);
  SideTensors tables(k);
  const LayerKv kv = tables.layer(k);
  cpu::update_side_tables(ragged.batch, kv);
  const auto codes = kv.int4.as<const std::uint8_t, 4>();
  const auto params = kv.int4_params.as<const f16, 4>();
  std::vector<float> found;
  std::vector<double> expected;
  std::vector<double> bound;
  for (int t = 0; t < 100; ++t) {
    const std::int32_t page = ragged.batch.page_table(0, t / 16);
    for (int g = 0; g < c.kv_heads; ++g) {
      const double scale = to_float(params(page, g, t % 16, 0));
      const double zero = to_float(params(page, g, t % 16, 1));
      for (int d = 0; d < c.head_dim; ++d) {
        const std::uint8_t byte = codes(page, g, t % 16, d / 2);
        found.push_back(static_cast<float>((d % 2 == 0 ? byte & 15 : byte >> 4) * scale + zero));
        expected.push_back(k.at(ragged.batch, 0, t, g, d));
        bound.push_back(0.5 * scale + kRoundF16 * (std::abs(zero) + 16 * scale) + 8 * kRoundF32);
      }
    }
  }
  expect_within(found, expected, bound, "codes * scale + zero");
}

// The cache's own life: a prompt in chunks with a border in mid-page, decode, a truncation into mid-page, then other
// tokens; and a second sequence on pages that the first gave back. Tables must be those of the stored keys each time.
TEST(SideTables, SurviveTheLifeOfACache) {
  const Case c{2, 64, 16};
  const KvShape shape{.layers = 2, .kv_heads = 2, .head_dim = 64, .page_tokens = 16, .dtype = DType::kF32};
  const std::vector<SideTables> wanted = {
      {}, {.page_bounds = true, .int8_bounds = true, .page_moments = true, .int4_keys = true}};
  KvCache cache(shape, 5, DeviceKind::kCpu, wanted);
  const LayerKv& kv = cache.layer(1);
  std::mt19937 random(6);
  CachedSequence sequence;
  std::vector<float> inv_freq(32, 0.5F);
  const Rope rope{TensorView<const float, 1>(inv_freq.data(), 32)};

  const auto feed = [&](int tokens, float scale) {
    const int begin = sequence.length;
    ASSERT_TRUE(cache.reserve(sequence, begin + tokens));
    sequence.length = begin + tokens;
    RaggedBatch step(random, Phase::kPrefill, {begin + tokens}, {tokens}, c.page_tokens);
    std::copy(sequence.pages.begin(), sequence.pages.end(), step.page_table.begin());
    std::vector<float> qkv = random_floats(random, static_cast<std::size_t>(tokens) * 6 * 64, -scale, scale);
    std::vector<float> q(static_cast<std::size_t>(tokens) * 2 * 64);
    append_kv({}, tensor_ref(qkv.data(), DType::kF32, tokens, 6 * 64), rope, step.batch, kv,
              tensor_ref(q.data(), DType::kF32, tokens, 2 * 64));
  };
  const auto expect_consistent = [&](const std::string& what) {
    RaggedBatch all(random, Phase::kPrefill, {sequence.length}, {sequence.length}, c.page_tokens);
    std::copy(sequence.pages.begin(), sequence.pages.end(), all.page_table.begin());
    PagedTensor keys(5, c.kv_heads, c.page_tokens, c.head_dim);
    const auto* stored = static_cast<const float*>(kv.k.data);
    std::copy(stored, stored + keys.data.size(), keys.data.begin());
    SideTensors rebuilt(keys);
    cpu::update_side_tables(all.batch, rebuilt.layer(keys));
    expect_tables(c, all, keys, rebuilt, pages_of_step(all.batch, c.page_tokens), what);
    const auto same = [&](const auto& expected, const TensorRef& found, const auto& is_poison) {
      using T = typename std::decay_t<decltype(expected)>::value_type;
      const T* elements = static_cast<const T*>(found.data);
      int different = 0;
      for (std::size_t i = 0; i < expected.size(); ++i) {
        if (!is_poison(expected[i])) different += std::memcmp(&expected[i], &elements[i], sizeof(T)) == 0 ? 0 : 1;
      }
      EXPECT_EQ(different, 0) << what;
    };
    same(rebuilt.bounds, kv.bounds, [](float x) { return std::isnan(x); });
    same(rebuilt.moments, kv.moments, [](float x) { return std::isnan(x); });
    same(rebuilt.int8_scales, kv.int8_scales, [](bf16 x) { return x.bits == kPoisonBf16.bits; });
    same(rebuilt.int4_params, kv.int4_params, [](f16 x) { return x.bits == kPoisonF16.bits; });
    // Bytes may be 0xA5 by right: what holds no token is told by its bounds or parameters.
    const auto* codes = static_cast<const std::uint8_t*>(kv.int4.data);
    const auto* bound_codes = static_cast<const std::uint8_t*>(kv.int8_bounds.data);
    int different = 0;
    for (std::size_t i = 0; i < rebuilt.bounds.size(); ++i) {
      if (!std::isnan(rebuilt.bounds[i])) different += rebuilt.int8_bounds[i] == bound_codes[i] ? 0 : 1;
    }
    for (std::size_t i = 0; i < rebuilt.int4.size(); ++i) {
      if (rebuilt.int4_params[i / 32 * 2].bits != kPoisonF16.bits) different += rebuilt.int4[i] == codes[i] ? 0 : 1;
    }
    EXPECT_EQ(different, 0) << what;
  };

  feed(23, 1.0F);
  expect_consistent("a chunk that ends in mid-page");
  feed(20, 2.0F);
  expect_consistent("a chunk that starts in mid-page");
  for (int i = 0; i < 6; ++i) feed(1, 3.0F);
  expect_consistent("decode steps over a page's end");
  cache.truncate(sequence, 21);
  feed(1, 0.1F);
  expect_consistent("one token after a truncation into mid-page");
  cache.truncate(sequence, 16);
  feed(1, 0.1F);
  expect_consistent("one token after a truncation to a page's end");
  cache.truncate(sequence, 0);
  feed(70, 0.01F);
  expect_consistent("pages used again");
}

}  // namespace
}  // namespace vesper
