// Side tables as the engine's steps leave them, for every backend, over and under its threshold, replayed from graphs
// where there are any: those that the CPU makes of the stored keys. And what a step may not depend on: what the pages
// of its newest tokens had in them before.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <random>
#include <string>
#include <vector>

#include "engine/core/stream.h"
#include "engine/engine.h"
#include "kvcache/side_tables.h"
#include "tests/engine/device.h"
#include "tests/paged.h"
#include "tests/side_tables.h"

namespace vesper {
namespace {

using Element = std::conditional_t<kTestDevice == DeviceKind::kCuda, bf16, float>;
constexpr int kPageTokens = 16;

float widened(float x) {
  return x;
}
template <typename T>
float widened(T x) {
  return to_float(x);
}

// Sequences in an engine, the cache's layers beside it.
class World {
 public:
  World(const std::string& attention, const std::vector<int>& lengths)
      : engine_("synthetic:tiny", options(attention, static_cast<int>(lengths.size())), {}),
        sequences_(lengths.size()) {
    for (std::size_t s = 0; s < sequences_.size(); ++s) {
      sequences_[s].request = static_cast<std::int32_t>(s);
      pointers_.push_back(&sequences_[s]);
      prefill(s, lengths[s]);
    }
    find_layers();
  }

  void prefill(std::size_t s, int tokens) {
    CachedSequence& sequence = sequences_[s];
    if (!engine_.reserve(sequence, sequence.length + tokens)) ADD_FAILURE() << "too few pages";
    engine_.prefill(sequence, ids(tokens));
  }
  void step() {
    for (CachedSequence& sequence : sequences_) {
      if (!engine_.reserve(sequence, sequence.length + 1)) ADD_FAILURE() << "too few pages";
    }
    engine_.decode(pointers_, ids(static_cast<int>(sequences_.size())));
    engine_.synchronize();
  }
  void truncate(std::size_t s, int length) { engine_.truncate(sequences_[s], length); }

  std::vector<float> logits() {
    std::vector<float> out(sequences_.size() * static_cast<std::size_t>(engine_.config().vocab));
    std::vector<std::int32_t> rows(sequences_.size());
    for (std::size_t row = 0; row < rows.size(); ++row) rows[row] = static_cast<std::int32_t>(row);
    engine_.read_logits(rows, out);
    return out;
  }
  [[nodiscard]] int lists() const {
    std::int64_t lists = 0;
    for (const AttentionTotals& layer : engine_.attention_totals()) lists += layer.lists;
    return static_cast<int>(lists);
  }

  // What the page of each sequence's next token has in its tables is no number from now on; of int4 keys, what its next
  // line has.
  void spoil_next_entries() {
    for (CachedSequence& sequence : sequences_) {
      if (!engine_.reserve(sequence, sequence.length + 1)) ADD_FAILURE() << "too few pages";
      const std::int64_t page = sequence.pages[static_cast<std::size_t>(sequence.length / kPageTokens)];
      const std::int64_t line = sequence.length % kPageTokens;
      for (const LayerKv& kv : layers_) {
        for (const TensorRef& table : {kv.bounds, kv.int8_bounds, kv.int8_scales, kv.moments}) {
          if (table.data != nullptr) spoil(table, page * table.shape[1], table.shape[1], table.bytes());
        }
        for (const TensorRef& table : {kv.int4, kv.int4_params}) {
          if (table.data == nullptr) continue;
          for (std::int64_t g = 0; g < table.shape[1]; ++g) {
            spoil(table, (page * table.shape[1] + g) * kPageTokens + line, 1, table.bytes() / kPageTokens);
          }
        }
      }
    }
    stream_.synchronize();
  }

  void expect_tables_of_all_tokens(const std::string& what) {
    std::vector<int> lengths;
    for (const CachedSequence& sequence : sequences_) lengths.push_back(sequence.length);
    RaggedBatch all(random_, Phase::kPrefill, lengths, lengths, kPageTokens);
    const auto capacity = static_cast<std::size_t>(all.batch.page_table.shape(1));
    for (std::size_t s = 0; s < sequences_.size(); ++s) {
      std::copy_n(sequences_[s].pages.begin(), (lengths[s] + kPageTokens - 1) / kPageTokens,
                  all.page_table.begin() + static_cast<std::ptrdiff_t>(s * capacity));
    }
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const LayerKv& kv = layers_[l];
      PagedTensor keys(kv.k.shape[0], static_cast<int>(kv.k.shape[1]), kPageTokens, static_cast<int>(kv.k.shape[3]));
      const std::vector<Element> stored = fetch<Element>(kv.k);
      for (std::size_t i = 0; i < stored.size(); ++i) keys.data[i] = widened(stored[i]);
      SideTensors rebuilt(keys);
      cpu::update_side_tables(all.batch, rebuilt.layer(keys));
      // NaN and poison where the sequences have no page or line.
      const std::string where = what + ", layer " + std::to_string(l);
      const auto is_number = [](float x) { return !std::isnan(x); };
      expect_same<Element>(kv.bounds, rebuilt.bounds, is_number, where + ", bounds");
      expect_same<float>(kv.moments, rebuilt.moments, is_number, where + ", moments");
      expect_same<bf16>(
          kv.int8_scales, rebuilt.int8_scales, [](bf16 x) { return x.bits != kPoisonBf16.bits; }, where + ", scales");
      expect_same<f16>(
          kv.int4_params, rebuilt.int4_params, [](f16 x) { return x.bits != kPoisonF16.bits; }, where + ", int4");
      const auto is_written = [](std::uint8_t x) { return x != kPoisonByte; };
      expect_same<std::uint8_t>(kv.int8_bounds, rebuilt.int8_bounds, is_written, where + ", codes of bounds");
      expect_same<std::uint8_t>(kv.int4, rebuilt.int4, is_written, where + ", codes of int4");
    }
  }

 private:
  static EngineOptions options(const std::string& attention, int seqs) {
    EngineOptions options;
    options.limits.device = kTestDevice;
    options.limits.max_context = 512;
    options.limits.max_seqs = seqs;
    options.attention = attention;
    options.seed = 3;
    return options;
  }

  std::vector<std::int32_t> ids(int count) {
    std::vector<std::int32_t> drawn;
    drawn.reserve(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
      drawn.push_back(static_cast<std::int32_t>(ids_() % static_cast<unsigned>(engine_.config().vocab)));
    }
    return drawn;
  }

  // A step with a probe tells where they lie.
  void find_layers() {
    engine_.set_attention_probe([this](const Exec&, const AttendedLayer& layer) { layers_.push_back(layer.kv); });
    step();
    engine_.set_attention_probe({});
    engine_.reset_attention_totals();
  }

  // `count` rows from `first` of the tensor whose rows come to `bytes`: for all pages and heads, or all their lines.
  void spoil(const TensorRef& table, std::int64_t first, std::int64_t count, std::int64_t bytes) {
    const std::int64_t row = bytes / (table.shape[0] * table.shape[1]);
    const std::vector<std::uint8_t> no_numbers(static_cast<std::size_t>(count * row), 0xFF);  // NaN in every format
    copy_bytes(stream_.exec(), static_cast<std::byte*>(table.data) + first * row, no_numbers.data(), count * row);
    stream_.synchronize();
  }

  template <typename T>
  std::vector<T> fetch(const TensorRef& tensor) {
    std::vector<T> host(static_cast<std::size_t>(tensor.size()));
    copy_bytes(stream_.exec(), host.data(), tensor.data, tensor.bytes());
    stream_.synchronize();
    return host;
  }

  template <typename T, typename Expected, typename Counts>
  void expect_same(const TensorRef& table, const std::vector<Expected>& expected, const Counts& counts,
                   const std::string& what) {
    if (table.data == nullptr) return;
    const std::vector<T> found = fetch<T>(table);
    ASSERT_EQ(found.size(), expected.size()) << what;
    std::size_t different = 0;
    std::size_t compared = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
      if (!counts(expected[i])) continue;
      ++compared;
      if constexpr (std::is_same_v<T, std::uint8_t>) {
        different += found[i] == expected[i] ? 0 : 1;
      } else {
        const auto bits = [](auto x) { return std::bit_cast<std::uint32_t>(widened(x)); };
        different += bits(found[i]) == bits(expected[i]) ? 0 : 1;
      }
    }
    EXPECT_GT(compared, 0U) << what;
    EXPECT_EQ(different, 0U) << what << ": of " << compared;
  }

  Engine engine_;
  std::vector<CachedSequence> sequences_;
  std::vector<CachedSequence*> pointers_;
  std::vector<LayerKv> layers_;
  Stream stream_{kTestDevice};
  std::mt19937 random_{1};
  std::mt19937 ids_{2};
};

struct Case {
  const char* attention;
  bool makes_lists;  // at the lengths of these tests
};
constexpr std::array kCases = {
    Case{"quest:token_budget=64", true},
    Case{"quest:token_budget=64,page_score=mean_std", true},
    Case{"quest:token_budget=64,bounds=int8", true},
    Case{"quest:token_budget=64,dense_below=130", true},  // one sequence grows over it
    Case{"quest:token_budget=64,dense_below=400", false},
    Case{"twilight:base_budget=64", true},
    Case{"twilight:base_budget=64,scores=exact", true},
    Case{"twilight:base=dense", true},
    Case{"twilight:dense_below=400", false},
    Case{"vattention:pilot=16,sink_tokens=8,window_tokens=16", true},
    Case{"vattention:pilot=16,sink_tokens=8,window_tokens=8,top_k=0.5", true},
    Case{"vattention:pilot=16,sink_tokens=8,window_tokens=8,top_k_by=int4", true},
    Case{"vattention:dense_below=400", false},
};

using TablesTest = DeviceTest;

TEST_F(TablesTest, HoldEveryTokenAfterAStep) {
  for (const Case& c : kCases) {
    const std::string name = c.attention;
    World world(c.attention, {119, 200});
    for (int i = 0; i < 20; ++i) world.step();
    world.expect_tables_of_all_tokens(name + ": steps over a page's end");
    world.truncate(1, 197);
    world.step();
    world.expect_tables_of_all_tokens(name + ": a step after a truncation into mid-page");
    world.truncate(0, 128);
    world.step();
    world.expect_tables_of_all_tokens(name + ": a step after a truncation to a page's end");
    world.truncate(0, 0);
    world.truncate(1, 0);
    world.prefill(1, 133);
    world.prefill(0, 141);
    world.step();
    world.expect_tables_of_all_tokens(name + ": pages used again");
    EXPECT_EQ(world.lists() > 0, c.makes_lists) << name;
  }
}

TEST_F(TablesTest, WhatThePageOfTheNewestTokenHeldBeforeDoesNotMatter) {
  for (const Case& c : kCases) {
    World clean(c.attention, {119, 200});
    World spoilt(c.attention, {119, 200});
    for (int i = 0; i < 20; ++i) {
      spoilt.spoil_next_entries();
      clean.step();
      spoilt.step();
      const std::vector<float> expected = clean.logits();
      const std::vector<float> found = spoilt.logits();
      for (std::size_t at = 0; at < expected.size(); ++at) {
        ASSERT_EQ(found[at], expected[at]) << c.attention << ", step " << i << ", logit " << at;
      }
    }
    EXPECT_EQ(clean.lists(), spoilt.lists()) << c.attention;
    spoilt.expect_tables_of_all_tokens(std::string(c.attention) + ": spoilt before each step");
  }
}

}  // namespace
}  // namespace vesper
