// Attention on CUDA beside the CPU's on the same 16-bit inputs, and the bound between them, derived from the number
// formats.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "attention/attend.h"
#include "engine/core/parallel.h"
#include "tests/attention/attend_reference.h"
#include "tests/paged_device.h"

namespace vesper {

// Tensor cores keep the products exact but cut their fp32 sums instead of rounding them: twice the error of an
// addition. Source: Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
// Science 7:e330.
inline constexpr double kTensorAdd = 2 * kRoundF32;
inline constexpr double kExp2Approx = 0x1p-22;    // PTX ISA, ex2.approx: relative error
inline constexpr double kLeastWeight = 0x1p-125;  // below, either device's exponential may answer 0
inline constexpr double kKeysPerRescale = 16.0;   // at least; a rescaling is a weight and a product

// The error that a CUDA and a CPU result together may have, for one query head.
struct Bound {
  double relative = 0.0;  // of a sum of weighted values, against the sum of their magnitudes; both devices together
  double lse = 0.0;
  std::vector<double> spread;     // [head_dim] sum_i w_i |v_i|, the w_i summing to 1
  std::vector<double> magnitude;  // [head_dim] sum_i |v_i|
};

inline Bound bound_of(const AttentionShape& shape, const float* q, PagedTensor& k, PagedTensor& v, const Batch& batch,
                      int s, int g, std::span<const WeightedKey> keys) {
  const ExactAttention exact = exact_attention(shape, q, k, v, batch, s, g, keys);
  const auto count = static_cast<double>(keys.size());
  // A weight e^x: the score's sum of head_dim products; x itself, which passes as (score, maximum, log-sum-exp of a
  // split) through a dozen roundings of numbers no larger than |score| + log(keys), and three more where a log-weight
  // is turned into a score and added to one; the exponential; and each rescaling.
  const double score_error = (shape.head_dim + 1) * kTensorAdd * exact.products;
  const double exponent_error = (exact.weighted ? 20 : 16) * kRoundF32 * (exact.reach + std::log(count) + 1);
  const double rescalings = 2 + count / kKeysPerRescale;
  const double weight = score_error + exponent_error + (rescalings + 2) * (kExp2Approx + 2 * kRoundF32);
  const double sums = (count + 8.0) * kTensorAdd;
  // Numerator and denominator each; the CPU has the same terms, none larger.
  return {.relative = 2 * (2 * std::expm1(weight) + 2 * sums),
          .lse = 2 * (weight + sums + 4 * kRoundF32 * (exact.reach + std::log(count) + 1)),
          .spread = exact.spread,
          .magnitude = exact.magnitude};
}

template <typename T>
struct World {
  Stream stream{DeviceKind::kCuda};
  AttentionShape shape;
  RaggedBatch ragged;
  PagedTensor k, v;
  std::vector<float> q, expected, expected_lse, out, lse;
  std::vector<Bound> bounds;  // [tokens * heads]

  World(std::mt19937& random, Phase phase, const AttentionShape& sizes, const std::vector<int>& lengths,
        const std::vector<int>& query_tokens, float q_range = 4.0F)
      : shape(sizes),
        ragged(random, phase, lengths, query_tokens, sizes.page_tokens),
        k(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim),
        v(ragged.pages, sizes.kv_heads, sizes.page_tokens, sizes.head_dim) {
    k.fill(ragged.batch, random);
    v.fill(ragged.batch, random);
    round_to<T>(k.data);
    round_to<T>(v.data);
    q = random_floats(random, elements(), -q_range, q_range);
    round_to<T>(q);
  }

  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(ragged.batch.tokens) * shape.heads; }
  [[nodiscard]] std::size_t elements() const { return rows() * static_cast<std::size_t>(shape.head_dim); }
  TensorView<float, 2> view(std::vector<float>& data) const {
    return TensorView<float, 2>(data.data(), ragged.batch.tokens, shape.heads * shape.head_dim);
  }

  // Runs `attend(q, kv, batch, out)` on the device, over a poisoned out with one row more than asked for.
  template <typename F>
  void on_device(const F& attend) {
    const DType dtype = DTypeOf<T>::value;
    const std::size_t guard = static_cast<std::size_t>(shape.heads) * shape.head_dim;
    const Buffer device_q = upload_as<T>(stream, q);
    const Buffer device_k = upload_as<T>(stream, k.data);
    const Buffer device_v = upload_as<T>(stream, v.data);
    const Buffer device_out = upload_as<T>(stream, std::vector<float>(elements() + guard, NAN));
    const DeviceBatch device(stream, ragged);
    const auto tiles = [&](const Buffer& buffer) {
      return buffer.ref(dtype, ragged.pages, shape.kv_heads, shape.page_tokens, shape.head_dim);
    };
    attend(device_q.ref(dtype, ragged.batch.tokens, shape.heads * shape.head_dim),
           LayerKv{tiles(device_k), tiles(device_v)}, device.batch,
           device_out.ref(dtype, ragged.batch.tokens, shape.heads * shape.head_dim));
    out = download_floats<T>(stream, device_out, elements() + guard);
    for (std::size_t i = elements(); i < out.size(); ++i) ASSERT_TRUE(std::isnan(out[i])) << "wrote behind out";
    out.resize(elements());
  }

  void prefill() {
    on_device([&](const TensorRef& dq, const LayerKv& kv, const Batch& batch, const TensorRef& dout) {
      attend_prefill(stream.exec(), shape, dq, kv, batch, dout);
    });
  }

  void decode(const SplitPlan& plan, bool with_lse = true, std::int32_t longest = INT32_MAX) {
    const int seqs = ragged.batch.seqs;
    const auto partial_rows = static_cast<std::size_t>(seqs) * shape.heads * plan.splits;
    const Buffer partial_out =
        upload(stream, std::vector<float>(partial_rows * static_cast<std::size_t>(shape.head_dim), NAN));
    const Buffer partial_lse = upload(stream, std::vector<float>(partial_rows, NAN));
    const Buffer device_lse = upload(stream, std::vector<float>(rows(), NAN));
    const SplitPartials partials{partial_out.view<float>(seqs, shape.heads, plan.splits, shape.head_dim),
                                 partial_lse.view<float>(seqs, shape.heads, plan.splits)};
    on_device([&](const TensorRef& dq, const LayerKv& kv, const Batch& batch, const TensorRef& dout) {
      attend_decode(stream.exec(), shape, dq, kv, batch, plan, partials, dout,
                    with_lse ? device_lse.view<float>(seqs, shape.heads) : TensorView<float, 2>(), longest);
    });
    lse = download<float>(stream, device_lse, rows());
  }

  // What the CPU finds, and how far a device may be from it.
  void find_expected() {
    expected.assign(elements(), NAN);
    expected_lse.assign(rows(), NAN);
    if (ragged.batch.phase == Phase::kPrefill) {
      cpu::attend_prefill(shape, view(q), {k.ref(), v.ref()}, ragged.batch, view(expected));
    } else {
      const int seqs = ragged.batch.seqs;
      const SplitPlan plan = plan_splits(shape, seqs, ragged.batch.max_kv_len, 1, 1);
      std::vector<float> partial_out(elements());
      std::vector<float> partial_lse(rows());
      cpu::attend_decode(shape, view(q), {k.ref(), v.ref()}, ragged.batch, plan,
                         {TensorView<float, 4>(partial_out.data(), seqs, shape.heads, 1, shape.head_dim),
                          TensorView<float, 3>(partial_lse.data(), seqs, shape.heads, 1)},
                         view(expected), TensorView<float, 2>(expected_lse.data(), seqs, shape.heads), INT32_MAX);
    }
    find_bounds([&](std::int64_t t, int /*g*/) { return first_keys(ragged.batch.positions(t) + 1); });
  }

  // `keys_of(t, g)`: what query token t attends to with KV head g; nothing where it is left alone.
  void find_bounds(const std::function<std::vector<WeightedKey>(std::int64_t, int)>& keys_of) {
    bounds.assign(rows(), {});
    parallel_for(static_cast<std::int64_t>(rows()), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t t = i / shape.heads;
        const auto g = static_cast<int>(i % shape.heads) / shape.group();
        const std::vector<WeightedKey> keys = keys_of(t, g);
        if (keys.empty()) continue;
        bounds[static_cast<std::size_t>(i)] =
            bound_of(shape, q.data() + i * shape.head_dim, k, v, ragged.batch, ragged.batch.seq_of_token(t), g, keys);
      }
    });
  }

  // Weights are rounded to T for their product with V, once relative and, where subnormal in f16, once absolute (the
  // largest weight is 1, so the denominator is no smaller); the result is rounded to T.
  // Rows without a bound must not have been written.
  void check(const std::string& what, bool with_lse) {
    Comparison outs;
    Comparison lses;
    for (std::size_t i = 0; i < rows(); ++i) {
      const Bound& bound = bounds[i];
      const std::size_t first = i * static_cast<std::size_t>(shape.head_dim);
      for (std::size_t d = 0; d < static_cast<std::size_t>(shape.head_dim); ++d) {
        if (bound.spread.empty()) {
          ASSERT_TRUE(std::isnan(out[first + d])) << what << ": row " << i << " was to be left alone";
          continue;
        }
        const double truth = expected[first + d];
        const double before_rounding =
            bound.spread[d] * (bound.relative + kRound<T>)+bound.magnitude[d] * (kRoundSubnormal<T> + kLeastWeight);
        outs.add(out[first + d], truth,
                 before_rounding + kRound<T> * (std::abs(truth) + before_rounding) + kRoundSubnormal<T>);
      }
      if (!with_lse) continue;
      if (bound.spread.empty()) {
        ASSERT_TRUE(std::isnan(lse[i])) << what << ": lse " << i << " was to be left alone";
      } else {
        lses.add(lse[i], expected_lse[i], bound.lse);
      }
    }
    outs.expect(what + ", out");
    lses.expect(what + ", lse");
  }
};

}  // namespace vesper
