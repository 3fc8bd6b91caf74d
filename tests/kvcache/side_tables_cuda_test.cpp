// Side tables on CUDA against the CPU's, on the same 16-bit keys: the same bits.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kvcache/append.h"
#include "kvcache/kv_cache.h"
#include "kvcache/side_tables.h"
#include "tests/gpu.h"
#include "tests/paged_device.h"
#include "tests/side_tables.h"

namespace vesper {
namespace {

struct Case {
  int kv_heads, head_dim, page_tokens;
};

std::string describe(const Case& c) {
  return "kv_heads " + std::to_string(c.kv_heads) + ", head_dim " + std::to_string(c.head_dim) + ", page_tokens " +
         std::to_string(c.page_tokens);
}

// Counts the elements that differ in a bit, and names the first; NaN equals NaN, as poison of two types does.
template <typename T>
void expect_same(const std::vector<T>& found, const std::vector<T>& expected, const std::string& what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  std::size_t different = 0;
  std::size_t first = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    bool same = std::memcmp(&found[i], &expected[i], sizeof(T)) == 0;
    if constexpr (!std::is_same_v<T, std::uint8_t>) {
      same = same || (std::isnan(to_float(found[i])) && std::isnan(to_float(expected[i])));
    }
    if (same) continue;
    if (different == 0) first = i;
    ++different;
  }
  if (different == 0) return;
  if constexpr (std::is_same_v<T, std::uint8_t>) {
    ADD_FAILURE() << what << ": " << different << " of " << found.size() << " differ; first at " << first
                  << ": expected byte " << int{expected[first]} << ", found " << int{found[first]};
  } else {
    ADD_FAILURE() << what << ": " << different << " of " << found.size() << " differ; first at " << first
                  << ": expected " << to_float(expected[first]) << ", found " << to_float(found[first]);
  }
}

// Rows that 16 bits and f16 parameters make awkward, in place of the random keys of some lines.
void plant_awkward_rows(PagedTensor& k, const Batch& batch, std::mt19937& random) {
  std::uniform_int_distribution<int> coin(0, 1);
  for (int s = 0; s < batch.seqs; ++s) {
    for (int t = 0; t < batch.kv_len(s); ++t) {
      for (int g = 0; g < k.kv_heads; ++g) {
        for (int d = 0; d < k.head_dim; ++d) {
          float& key = k.at(batch, s, t, g, d);
          switch ((t + 3 * g) % 12) {
            case 0:  // zeros of both signs
              key = coin(random) == 0 ? 0.0F : -0.0F;
              break;
            case 1:  // one value
              key = -1.375F;
              break;
            case 2:  // halves: rounding to even shows
              key = 0.5F * static_cast<float>(d % 31);
              break;
            case 3:  // a scale that is subnormal in f16
              key = 1e-6F * key;
              break;
            case 4:  // a scale of zero without equal keys
              key = 1e-9F * key;
              break;
            case 5:  // no negative zero below, none above
              key = d % 2 == 0 ? -0.0F : std::abs(key);
              break;
            case 6:
              key = d % 2 == 0 ? 0.0F : -std::abs(key);
              break;
            case 7:  // far from zero
              key = 1000.0F + 10.0F * key;
              break;
            default:
              break;
          }
        }
      }
    }
  }
}

template <typename T>
void check(const Case& c, const RaggedBatch& ragged, std::mt19937& random) {
  const Stream stream(DeviceKind::kCuda);
  const Batch& batch = ragged.batch;
  PagedTensor k(ragged.pages, c.kv_heads, c.page_tokens, c.head_dim);
  k.fill(batch, random);
  plant_awkward_rows(k, batch, random);
  round_to<T>(k.data);
  SideTensors tables(k);

  const Buffer device_k = upload_as<T>(stream, k.data);
  const Buffer bounds = upload_as<T>(stream, tables.bounds);
  const Buffer moments = upload(stream, tables.moments);
  const Buffer int8_bounds = upload(stream, tables.int8_bounds);
  const Buffer int8_scales = upload(stream, tables.int8_scales);
  const Buffer int4 = upload(stream, tables.int4);
  const Buffer int4_params = upload(stream, tables.int4_params);
  const DeviceBatch device(stream, ragged);
  const DType dtype = DTypeOf<T>::value;
  const std::int64_t pages = ragged.pages;
  const LayerKv kv{.k = device_k.ref(dtype, pages, c.kv_heads, c.page_tokens, c.head_dim),
                   .v = {},
                   .bounds = bounds.ref(dtype, pages, c.kv_heads, 2, c.head_dim),
                   .int8_bounds = int8_bounds.ref(DType::kU8, pages, c.kv_heads, 2, c.head_dim),
                   .int8_scales = int8_scales.ref(DType::kBf16, pages, c.kv_heads, 2, bound_spans(c.head_dim)),
                   .moments = moments.ref(DType::kF32, pages, c.kv_heads, 2, c.head_dim),
                   .int4 = int4.ref(DType::kU8, pages, c.kv_heads, c.page_tokens, c.head_dim / 2),
                   .int4_params = int4_params.ref(DType::kF16, pages, c.kv_heads, c.page_tokens, 2)};
  update_side_tables(stream.exec(), device.batch, kv);
  cpu::update_side_tables(batch, tables.layer(k));

  expect_same(download_floats<T>(stream, bounds, tables.bounds.size()), tables.bounds, describe(c) + ", bounds");
  expect_same(download<std::uint8_t>(stream, int8_bounds, tables.int8_bounds.size()), tables.int8_bounds,
              describe(c) + ", bounds in 8 bits");
  expect_same(download<bf16>(stream, int8_scales, tables.int8_scales.size()), tables.int8_scales,
              describe(c) + ", scales of bounds in 8 bits");
  expect_same(download<float>(stream, moments, tables.moments.size()), tables.moments, describe(c) + ", moments");
  expect_same(download<std::uint8_t>(stream, int4, tables.int4.size()), tables.int4, describe(c) + ", int4");
  expect_same(download<f16>(stream, int4_params, tables.int4_params.size()), tables.int4_params,
              describe(c) + ", int4 parameters");
}

template <typename T>
class SideTablesCuda : public testing::Test {};
using Types = testing::Types<bf16, f16>;
TYPED_TEST_SUITE(SideTablesCuda, Types);

// Chunks from the start, of one token (a page of one token), from mid-page, across pages, from a page's first line.
TYPED_TEST(SideTablesCuda, AreTheCpusBitsAfterAChunk) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(1);
  for (const Case& c : {Case{4, 64, 16}, Case{8, 128, 16}, Case{2, 128, 32}, Case{3, 64, 64}, Case{1, 128, 64},
                        Case{2, 96, 16}, Case{1, 16, 32}}) {
    const RaggedBatch ragged(random, Phase::kPrefill, {40, 1, 70, 129, 65}, {40, 1, 33, 60, 1}, c.page_tokens);
    check<TypeParam>(c, ragged, random);
  }
}

TYPED_TEST(SideTablesCuda, AreTheCpusBitsAfterADecodeStep) {
  VESPER_NEEDS_GPU();
  std::mt19937 random(2);
  for (const Case& c : {Case{4, 64, 16}, Case{8, 128, 16}, Case{2, 128, 64}}) {
    const RaggedBatch ragged(random, Phase::kDecode, {1, 15, 16, 17, 1000, 64, 5000}, {1, 1, 1, 1, 1, 1, 1},
                             c.page_tokens);
    check<TypeParam>(c, ragged, random);
  }
}

// More layers than one launch takes, all of one kind of tables or of kinds by turns: what a launch for each layer
// writes.
TYPED_TEST(SideTablesCuda, OfAllLayersAtOnceAreThoseOfEachAlone) {
  VESPER_NEEDS_GPU();
  using T = TypeParam;
  constexpr std::size_t kLayers = 67;
  const std::array kinds = {SideTables{.page_bounds = true},    SideTables{.int8_bounds = true},
                            SideTables{.page_moments = true},   SideTables{.int4_keys = true},
                            SideTables{true, true, true, true}, SideTables{}};
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(4);
  for (const int head_dim : {64, 128}) {
    for (std::size_t kind = 0; kind < kinds.size(); ++kind) {
      std::vector<SideTables> tables(kLayers, kinds[kind]);
      if (kinds[kind] == SideTables{}) {
        for (std::size_t l = 0; l < kLayers; ++l) tables[l] = kinds[l % kinds.size()];
      }
      const RaggedBatch ragged(random, Phase::kDecode, {1, 16, 17, 95}, {1, 1, 1, 1}, 16);
      const DeviceBatch device(stream, ragged);
      const KvShape shape{
          .layers = kLayers, .kv_heads = 3, .head_dim = head_dim, .page_tokens = 16, .dtype = DTypeOf<T>::value};
      const KvCache at_once(shape, ragged.pages, DeviceKind::kCuda, tables);
      const KvCache alone(shape, ragged.pages, DeviceKind::kCuda, tables);
      const std::int64_t bytes = KvCache::bytes(shape, ragged.pages, tables);
      const Buffer filled = upload_as<T>(stream, random_floats(random, static_cast<std::size_t>(bytes / 2)));
      for (const KvCache* cache : {&at_once, &alone}) {
        copy_bytes(stream.exec(), cache->layer(0).k.data, filled.data(), bytes);  // all of its memory
      }
      update_side_tables(stream.exec(), device.batch, at_once.layers());
      for (const LayerKv& kv : alone.layers()) update_side_tables(stream.exec(), device.batch, kv);
      const auto all_of = [&](const void* memory) {
        std::vector<std::uint8_t> host(static_cast<std::size_t>(bytes));
        copy_bytes(stream.exec(), host.data(), memory, bytes);
        stream.synchronize();
        return host;
      };
      const std::vector<std::uint8_t> found = all_of(at_once.layer(0).k.data);
      expect_same(found, all_of(alone.layer(0).k.data),
                  "head_dim " + std::to_string(head_dim) + ", kind " + std::to_string(kind));
      EXPECT_NE(found, all_of(filled.data()));
    }
  }
}

// The cache's own life, through the append pass: chunks with borders in mid-page, decode, truncations, pages used
// again. After each step the tables are those that the CPU makes of the stored keys.
TYPED_TEST(SideTablesCuda, SurviveTheLifeOfACache) {
  VESPER_NEEDS_GPU();
  using T = TypeParam;
  const Case c{2, 64, 16};
  const DType dtype = DTypeOf<T>::value;
  const Stream stream(DeviceKind::kCuda);
  const KvShape shape{.layers = 2, .kv_heads = 2, .head_dim = 64, .page_tokens = 16, .dtype = dtype};
  const std::vector<SideTables> wanted = {
      {}, {.page_bounds = true, .int8_bounds = true, .page_moments = true, .int4_keys = true}};
  KvCache cache(shape, 5, DeviceKind::kCuda, wanted);
  const LayerKv& kv = cache.layer(1);
  std::mt19937 random(3);
  CachedSequence sequence;
  const Buffer inv_freq = upload(stream, std::vector<float>(32, 0.5F));

  const auto feed = [&](int tokens, float scale) {
    const int begin = sequence.length;
    ASSERT_TRUE(cache.reserve(sequence, begin + tokens));
    sequence.length = begin + tokens;
    RaggedBatch step(random, Phase::kPrefill, {begin + tokens}, {tokens}, c.page_tokens);
    std::copy(sequence.pages.begin(), sequence.pages.end(), step.page_table.begin());
    const DeviceBatch device(stream, step);
    const Buffer qkv =
        upload_as<T>(stream, random_floats(random, static_cast<std::size_t>(tokens) * 6 * 64, -scale, scale));
    const Buffer q(Memory::kDevice, std::int64_t{tokens} * 2 * 64 * 2, "test data");
    append_kv(stream.exec(), qkv.ref(dtype, tokens, 6 * 64), {inv_freq.view<const float>(32)}, device.batch, kv,
              q.ref(dtype, tokens, 2 * 64));
    stream.synchronize();
  };
  const auto expect_rebuilt = [&](const std::string& what) {
    RaggedBatch all(random, Phase::kPrefill, {sequence.length}, {sequence.length}, c.page_tokens);
    std::copy(sequence.pages.begin(), sequence.pages.end(), all.page_table.begin());
    PagedTensor keys(5, c.kv_heads, c.page_tokens, c.head_dim);
    const auto fetch = [&](auto element, const TensorRef& tensor) {
      std::vector<decltype(element)> host(static_cast<std::size_t>(tensor.size()));
      copy_bytes(stream.exec(), host.data(), tensor.data, tensor.bytes());
      stream.synchronize();
      return host;
    };
    const std::vector<T> stored = fetch(T{}, kv.k);
    std::transform(stored.begin(), stored.end(), keys.data.begin(), [](T x) { return to_float(x); });
    SideTensors rebuilt(keys);
    cpu::update_side_tables(all.batch, rebuilt.layer(keys));

    // What the sequence does not own is left out of the comparison: whatever lies there is nobody's.
    const std::vector<T> found_bounds = fetch(T{}, kv.bounds);
    std::vector<std::uint8_t> found_int8 = fetch(std::uint8_t{}, kv.int8_bounds);
    std::vector<bf16> found_scales = fetch(bf16{}, kv.int8_scales);
    const std::vector<float> found_moments = fetch(float{}, kv.moments);
    std::vector<std::uint8_t> found_int4 = fetch(std::uint8_t{}, kv.int4);
    std::vector<f16> found_params = fetch(f16{}, kv.int4_params);
    std::vector<float> bounds;
    std::vector<float> moments;
    for (std::size_t i = 0; i < rebuilt.bounds.size(); ++i) {
      const bool owned = !std::isnan(rebuilt.bounds[i]);
      bounds.push_back(owned ? to_float(found_bounds[i]) : NAN);
      moments.push_back(owned ? found_moments[i] : NAN);
      if (owned) continue;
      found_int8[i] = kPoisonByte;
      found_scales[i / kBoundSpan] = kPoisonBf16;  // 64 channels are whole spans
    }
    for (std::size_t line = 0; line < rebuilt.int4_params.size() / 2; ++line) {
      if (rebuilt.int4_params[2 * line].bits != kPoisonF16.bits) continue;
      found_params[2 * line] = found_params[2 * line + 1] = kPoisonF16;
      std::fill_n(found_int4.begin() + static_cast<std::ptrdiff_t>(line) * 32, 32, kPoisonByte);
    }
    expect_same(bounds, rebuilt.bounds, what + ", bounds");
    expect_same(found_int8, rebuilt.int8_bounds, what + ", bounds in 8 bits");
    expect_same(found_scales, rebuilt.int8_scales, what + ", scales of bounds in 8 bits");
    expect_same(moments, rebuilt.moments, what + ", moments");
    expect_same(found_int4, rebuilt.int4, what + ", int4");
    expect_same(found_params, rebuilt.int4_params, what + ", int4 parameters");
  };

  feed(23, 1.0F);
  expect_rebuilt("a chunk that ends in mid-page");
  feed(20, 2.0F);
  expect_rebuilt("a chunk that starts in mid-page");
  for (int i = 0; i < 6; ++i) feed(1, 3.0F);
  expect_rebuilt("decode steps over a page's end");
  cache.truncate(sequence, 21);
  feed(1, 0.1F);
  expect_rebuilt("one token after a truncation into mid-page");
  cache.truncate(sequence, 16);
  feed(1, 0.1F);
  expect_rebuilt("one token after a truncation to a page's end");
  cache.truncate(sequence, 0);
  feed(70, 0.01F);
  expect_rebuilt("pages used again");
}

}  // namespace
}  // namespace vesper
