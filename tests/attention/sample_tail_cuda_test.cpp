// Sampled lists on CUDA against the CPU's. Draws are equal to the last entry, since they depend on integers; a size
// depends on fp32 terms and may differ by a thousandth and by one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "attention/attend_sampled.h"
#include "tests/attention/attend_reference.h"
#include "tests/attention/device_lists.h"

namespace vesper {
namespace {

// A layer in T's numbers, with queries whose scores deviate by about 1.5 and values around 1.
struct Layer {
  AttentionShape shape;
  RaggedBatch ragged;
  PagedTensor k, v;
  std::vector<float> q, out, lse;

  Layer(std::mt19937& random, const AttentionShape& of, const std::vector<int>& lengths)
      : shape(of),
        ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1), of.page_tokens),
        k(ragged.pages, of.kv_heads, of.page_tokens, of.head_dim),
        v(ragged.pages, of.kv_heads, of.page_tokens, of.head_dim),
        q(random_floats(random, lengths.size() * static_cast<std::size_t>(of.heads * of.head_dim), -4.5F, 4.5F)),
        out(q.size()),
        lse(lengths.size() * static_cast<std::size_t>(of.heads)) {
    k.fill(ragged.batch, random);
    v.fill(ragged.batch, random);
    for (float& value : v.data) value += 1.0F;
  }
  [[nodiscard]] std::size_t row(int s, int h) const {
    return static_cast<std::size_t>(s * shape.heads + h) * static_cast<std::size_t>(shape.head_dim);
  }
  // Token t of head h's KV head gets a key along the query: its score is `score`.
  void plant(int s, int h, int t, float score) {
    double squared = 0.0;
    for (int d = 0; d < shape.head_dim; ++d)
      squared += std::pow(static_cast<double>(q[row(s, h) + static_cast<std::size_t>(d)]), 2);
    const float factor = score / (shape.scale * static_cast<float>(squared));
    for (int d = 0; d < shape.head_dim; ++d) {
      k.at(ragged.batch, s, t, h / shape.group(), d) = factor * q[row(s, h) + static_cast<std::size_t>(d)];
    }
  }
  template <typename T>
  void round() {
    round_to<T>(k.data);
    round_to<T>(v.data);
    round_to<T>(q);
  }
  // The list's static part, then the tail that the rule asks for at so many times its epsilon.
  void sample(SampleRule rule, float epsilon_times, DenseLimit dense, ListBuffers& lists) {
    rule.epsilon *= epsilon_times;
    const Batch& batch = ragged.batch;
    const AttentionLimits limits{.shape = shape, .max_seqs = batch.seqs, .max_context = batch.max_kv_len};
    ScratchCarver counter(nullptr);
    (void)take_sampled_scratch(counter, limits, batch.seqs, batch.max_kv_len);
    const Buffer memory(Memory::kHost, counter.used(), "test");
    ScratchCarver carver(memory.data());
    const std::int64_t width = std::int64_t{shape.heads} * shape.head_dim;
    cpu::attend_sampled(shape, TensorView<const float, 2>(q.data(), batch.seqs, width), {.k = k.ref(), .v = v.ref()},
                        batch, rule, dense, lists.list, lists.report,
                        take_sampled_scratch(carver, limits, batch.seqs, batch.max_kv_len),
                        TensorView<float, 2>(out.data(), batch.seqs, width),
                        TensorView<float, 2>(lse.data(), batch.seqs, shape.heads), {});
  }
  // Attention over a list: sum w v / sum w, sum w |v| / sum w and log sum w, w = e^{score + log weight}.
  struct Attended {
    std::vector<double> out, absolute;
    double lse;
  };
  [[nodiscard]] Attended attend(const ListBuffers& lists, int s, int h) {
    const auto channels = static_cast<std::size_t>(shape.head_dim);
    const int g = h / shape.group();
    Attended attended{std::vector<double>(channels), std::vector<double>(channels), 0.0};
    double total = 0.0;
    for (int i = 0; i < lists.list.count(s, g); ++i) {
      const std::int32_t t = lists.list.index(s, g, i);
      double score = i < lists.list.tail_begin(s, g) ? 0.0 : static_cast<double>(lists.list.tail_log_weight(s, g));
      double product = 0.0;
      for (std::size_t d = 0; d < channels; ++d) {
        product += static_cast<double>(q[row(s, h) + d]) *
                   static_cast<double>(k.at(ragged.batch, s, t, g, static_cast<int>(d)));
      }
      score = std::exp(score + product * static_cast<double>(shape.scale));
      total += score;
      for (std::size_t d = 0; d < channels; ++d) {
        const auto value = static_cast<double>(v.at(ragged.batch, s, t, g, static_cast<int>(d)));
        attended.out[d] += score * value;
        attended.absolute[d] += score * std::abs(value);
      }
    }
    for (double& sum : attended.out) sum /= total;
    for (double& sum : attended.absolute) sum /= total;
    attended.lse = std::log(total);
    return attended;
  }
};

// How often the found sizes lay strictly between pilot and rest, and how often the guard hit.
struct Seen {
  int sized = 0;
  int hit = 0;
};

// Weights are rounded to T before they multiply values, and the result once more; sums in fp32 and the exponential add
// less than 2^-12 at these lengths.
template <typename T>
void expect_attended(Layer& layer, const ListBuffers& lists, int s, int h, const std::vector<float>& out,
                     const std::vector<float>& lse, const std::string& where) {
  const Layer::Attended expected = layer.attend(lists, s, h);
  const double rounding = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
  for (std::size_t d = 0; d < expected.out.size(); ++d) {
    const double bound = (2 * rounding + 0x1p-12) * expected.absolute[d];
    ASSERT_NEAR(static_cast<double>(out[layer.row(s, h) + d]), expected.out[d], bound) << where << ", channel " << d;
  }
  EXPECT_NEAR(static_cast<double>(lse[static_cast<std::size_t>(s * layer.shape.heads + h)]), expected.lse, 0x1p-12)
      << where;
}

// CUDA's lists must lie among the CPU's at epsilon and a thousandth to either side: a term near the tolerance may fall
// on either side of it, and a size to either side of a whole number. Its output must be that of its own list, and the
// same bits when it is run again, whoever then takes which part.
template <typename T>
void compare_samples(const Stream& stream, Layer& layer, const SampleRule& rule, const std::string& what, Seen& seen,
                     const std::optional<SampledCuts>& cuts = {}) {
  const DenseLimit dense{.tokens = 30};
  const Batch& batch = layer.ragged.batch;
  const AttentionShape& shape = layer.shape;
  ListBuffers fixed(batch.seqs, shape.kv_heads, batch.max_kv_len);
  cpu::select_static(shape, batch, {}, {.sink_tokens = {8}, .window_tokens = {8}, .top_k = {}}, dense, fixed.list);

  const DeviceBatch device(stream, layer.ragged);
  const Buffer k = upload_as<T>(stream, layer.k.data);
  const Buffer v = upload_as<T>(stream, layer.v.data);
  const Buffer q = upload_as<T>(stream, layer.q);
  const Buffer out = upload_as<T>(stream, layer.out);
  const Buffer lse = upload(stream, layer.lse);
  const DType dtype = DTypeOf<T>::value;
  const std::int64_t width = std::int64_t{shape.heads} * shape.head_dim;
  const LayerKv kv{.k = k.ref(dtype, layer.k.pages, shape.kv_heads, shape.page_tokens, shape.head_dim),
                   .v = v.ref(dtype, layer.v.pages, shape.kv_heads, shape.page_tokens, shape.head_dim)};
  const DeviceLists lists(stream, fixed);
  const AttentionLimits limits{.shape = shape,
                               .device = DeviceKind::kCuda,
                               .dtype = dtype,
                               .max_seqs = batch.seqs,
                               .max_context = batch.max_kv_len};
  ScratchCarver counter(nullptr);
  (void)take_sampled_scratch(counter, limits, batch.seqs, batch.max_kv_len);
  const Buffer memory(Memory::kDevice, counter.used(), "test");
  ScratchCarver carver(memory.data());
  SampledScratch scratch = take_sampled_scratch(carver, limits, batch.seqs, batch.max_kv_len);
  const std::vector<std::int32_t> zeros(
      static_cast<std::size_t>(sample_tickets(std::int64_t{batch.seqs} * shape.kv_heads)));
  const Buffer tickets = upload(stream, zeros);
  scratch.tickets = tickets.view<std::int32_t>(std::ssize(zeros));
  if (cuts) scratch.cuts = *cuts;
  const auto attend = [&] {
    attend_sampled(stream.exec(), shape, q.ref(dtype, batch.seqs, width), kv, device.batch, rule, dense, lists.list,
                   lists.report, scratch, out.ref(dtype, batch.seqs, width), lse.view<float>(batch.seqs, shape.heads));
    EXPECT_EQ(download<std::int32_t>(stream, tickets, zeros.size()), zeros) << what;
  };
  attend();
  ListBuffers found(fixed);
  lists.read(stream, found);
  const std::vector<float> outs = download_floats<T>(stream, out, layer.q.size());
  const std::vector<float> lses = download<float>(stream, lse, layer.lse.size());
  attend();
  EXPECT_EQ(download_floats<T>(stream, out, layer.q.size()), outs) << what;
  EXPECT_EQ(download<float>(stream, lse, layer.lse.size()), lses) << what;

  std::vector<ListBuffers> expected(3, fixed);
  for (int i = 0; i < 3; ++i)
    layer.sample(rule, 1.0F + 1e-3F * static_cast<float>(i - 1), dense, expected[static_cast<std::size_t>(i)]);
  ListBuffers whole(fixed);  // of draws in order
  SampleRule all = rule;
  all.pilot = {1e9};
  cpu::draw_pilot(shape, batch, all, dense, whole.list);

  for (int s = 0; s < batch.seqs; ++s) {
    for (int g = 0; g < shape.kv_heads; ++g) {
      const std::string where = what + ", sequence " + std::to_string(s) + ", KV head " + std::to_string(g);
      const int count = found.list.count(s, g);
      const int hits = found.report.guard_hits(s, g);
      if (batch.kv_len(s) <= dense.tokens) {
        EXPECT_EQ(count, ListBuffers::kUntouched) << where;
        EXPECT_EQ(hits, 0) << where;
        continue;
      }
      const int begin = fixed.list.tail_begin(s, g);
      const int drawn = count - begin;
      const int rest = batch.kv_len(s) - begin;
      bool near = false;
      int least_hits = INT32_MAX;
      int most_hits = 0;
      std::string sizes;
      for (const ListBuffers& one : expected) {
        const int size = one.list.count(s, g) - begin;
        near |= std::abs(drawn - size) <= 2 + 2e-3 * size;
        least_hits = std::min(least_hits, one.report.guard_hits(s, g));
        most_hits = std::max(most_hits, one.report.guard_hits(s, g));
        sizes += ' ';
        sizes += std::to_string(size);
      }
      EXPECT_TRUE(near) << where << ": drawn " << drawn << " of " << rest << ", expected about" << sizes;
      EXPECT_TRUE(hits >= least_hits && hits <= most_hits)
          << where << ": guard hits " << hits << ", expected " << least_hits << " to " << most_hits;
      EXPECT_EQ(found.list.tail_begin(s, g), begin) << where;
      ASSERT_TRUE(drawn >= 0 && drawn <= rest) << where << ": " << drawn;
      for (int i = 0; i < count; ++i) {
        ASSERT_EQ(found.list.index(s, g, i), whole.list.index(s, g, i)) << where << ", entry " << i;
      }
      EXPECT_FLOAT_EQ(found.list.tail_log_weight(s, g), static_cast<float>(std::log(static_cast<double>(rest) / drawn)))
          << where;
      const int pilot = std::max(2, tokens_of(rule.pilot, batch.kv_len(s)));
      seen.sized += drawn > pilot && drawn < rest ? 1 : 0;
      seen.hit += hits > 0 ? 1 : 0;
      for (int h = g * shape.group(); h < (g + 1) * shape.group(); ++h) {
        expect_attended<T>(layer, found, s, h, outs, lses, where + ", head " + std::to_string(h));
      }
    }
  }
}

template <typename T>
class SizeSampleCuda : public testing::Test {};
using ElementTypes = testing::Types<bf16, f16>;
TYPED_TEST_SUITE(SizeSampleCuda, ElementTypes);

// An epsilon that no term exceeds: the tail stays the pilot.
TYPED_TEST(SizeSampleCuda, DrawsThePilotAsTheCpuDoes) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(2);
  Layer layer(random, make_shape(3, 2, 64, 16), {3, 31, 33, 48, 49, 50, 700, 16393, 40000});
  layer.ragged.request = {9, 8, 7, 3, 1, 1, 2, 3, 70000};
  layer.round<TypeParam>();
  for (const Amount pilot : {Amount{512}, Amount{0.3}, Amount{1e9}}) {
    const SampleRule rule{.epsilon = 1e6F, .pilot = pilot, .seed = 5, .layer = 31};
    Seen seen;
    compare_samples<TypeParam>(stream, layer, rule, "pilot " + std::to_string(pilot.value), seen);
    EXPECT_EQ(seen.sized, 0);
  }
}

TYPED_TEST(SizeSampleCuda, SizesAsTheCpuDoes) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(3);
  struct Form {
    int group, kv_heads, head_dim, page_tokens;
  };
  Seen seen;
  for (const Form& form :
       {Form{1, 2, 64, 16}, Form{4, 2, 128, 16}, Form{8, 1, 64, 32}, Form{16, 1, 128, 64}, Form{5, 2, 128, 32}}) {
    Layer layer(random, make_shape(form.kv_heads, form.group, form.head_dim, form.page_tokens),
                {1, 30, 31, 200, 900, 6000});
    layer.round<TypeParam>();
    for (const Verify verify : {Verify::kOutput, Verify::kDenominator}) {
      for (const float epsilon : {0.05F, 0.15F, 0.5F}) {
        const SampleRule rule{.epsilon = epsilon, .pilot = {150}, .verify = verify, .seed = 11, .layer = 2};
        compare_samples<TypeParam>(stream, layer, rule,
                                   "group " + std::to_string(form.group) + ", head_dim " +
                                       std::to_string(form.head_dim) + ", epsilon " + std::to_string(epsilon) +
                                       (verify == Verify::kOutput ? ", output" : ", denominator"),
                                   seen);
      }
    }
  }
  EXPECT_GT(seen.sized, 20) << "too few samples between pilot and rest to show anything";
}

TYPED_TEST(SizeSampleCuda, GuardsAsTheCpuDoes) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(4);
  Seen seen;
  for (const int head_dim : {64, 128}) {
    Layer layer(random, make_shape(2, 2, head_dim, 16), {3000, 5000});
    for (int s = 0; s < 2; ++s) {
      for (int h = 0; h < 4; ++h) {
        for (int i = 0; i < 12; ++i) layer.plant(s, h, 100 + 4 * (53 * i + 7 * s) + h, 8.5F);
      }
    }
    layer.round<TypeParam>();
    for (const Verify verify : {Verify::kOutput, Verify::kDenominator}) {
      for (const OnOutlier on_outlier : {OnOutlier::kReport, OnOutlier::kEscalate}) {
        for (std::uint32_t seed = 0; seed < 8; ++seed) {
          const SampleRule rule{
              .epsilon = 0.2F, .pilot = {100}, .verify = verify, .on_outlier = on_outlier, .seed = seed};
          compare_samples<TypeParam>(
              stream, layer, rule,
              "head_dim " + std::to_string(head_dim) + (verify == Verify::kOutput ? ", output" : ", denominator") +
                  (on_outlier == OnOutlier::kReport ? ", report" : ", escalate") + ", seed " + std::to_string(seed),
              seen);
        }
      }
    }
  }
  EXPECT_GT(seen.hit, 20) << "too few hits to show anything";
}

// The wide form of the kernel through all rounds; few lists and short ones, so that it can be watched by slow tools.
TYPED_TEST(SizeSampleCuda, EscalatesForAWideGroupAsTheCpuDoes) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(6);
  Layer layer(random, make_shape(2, 11, 128, 16), {1500, 25, 700, 60});
  for (int s = 0; s < 3; s += 2) {
    for (int h = 0; h < 22; h += 3) {
      for (int i = 0; i < 8; ++i) layer.plant(s, h, 30 + 24 * (i + 1) + h, 8.5F);
    }
  }
  layer.round<TypeParam>();
  const SampleRule rule{.epsilon = 0.2F, .pilot = {60}, .seed = 7, .layer = 4};
  Seen seen;
  compare_samples<TypeParam>(stream, layer, rule, "cut as planned", seen);
  compare_samples<TypeParam>(stream, layer, rule, "short parts", seen, SampledCuts{.team = 2, .draws = 16, .parts = 8});
  EXPECT_GE(seen.hit, 4) << "too few hits to show anything";
}

// More lists than blocks, of lengths between none and thousands, a third with tokens that the guard finds: parts wait
// in the queue in all rounds.
TYPED_TEST(SizeSampleCuda, TakesTurnsAtManyListsAsTheCpuDoes) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::mt19937 random(5);
  std::vector<int> lengths;
  for (int s = 0; s < 70; ++s) lengths.push_back(s % 7 == 0 ? 3000 + 20 * s : s % 5 == 0 ? 25 + s / 10 : 40 + 13 * s);
  Layer layer(random, make_shape(5, 1, 64, 16), lengths);
  for (int s = 0; s < 70; ++s) {
    if (s % 3 != 0 || lengths[static_cast<std::size_t>(s)] < 600) continue;
    for (int h = 0; h < 5; h += 1 + s % 2) {
      for (int i = 0; i < 4 + s % 9; ++i) layer.plant(s, h, 100 + 31 * i + s, 8.5F);
    }
  }
  layer.round<TypeParam>();
  const SampleRule rule{.epsilon = 0.2F, .pilot = {60}, .seed = 3, .layer = 1};
  Seen seen;
  compare_samples<TypeParam>(stream, layer, rule, "cut as planned", seen);
  for (const SampledCuts& cuts :
       {SampledCuts{.team = 1, .draws = 16, .parts = 8}, SampledCuts{.team = 2, .draws = 32, .parts = 2},
        SampledCuts{.team = 2, .draws = 512, .parts = 8}}) {
    compare_samples<TypeParam>(stream, layer, rule,
                               "team " + std::to_string(cuts.team) + ", parts of " + std::to_string(cuts.draws), seen,
                               cuts);
  }
  EXPECT_GT(seen.sized, 100) << "too few samples between pilot and rest to show anything";
  EXPECT_GT(seen.hit, 40) << "too few hits to show anything";
}

}  // namespace
}  // namespace vesper
