// One attention step in double precision, and how far either device may be from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "engine/core/dtype.h"
#include "tests/compare.h"

namespace vesper {

inline float rounded_to(DType dtype, float x) {
  return dtype == DType::kBf16 ? to_float(to_bf16(x)) : dtype == DType::kF16 ? to_float(to_f16(x)) : x;
}

struct AttendCase {
  int heads, kv_heads, head_dim, tokens;
  DType dtype;

  [[nodiscard]] std::string text() const {
    return std::to_string(heads) + " heads, " + std::to_string(kv_heads) + " KV heads, head_dim " +
           std::to_string(head_dim) + ", " + std::to_string(tokens) + " tokens, " + std::string(dtype_name(dtype));
  }
};

// q, k and v of a case as a file holds them: values of its dtype, row-major. Queries reach further than keys, so that
// some keys count and some do not.
struct AttendTensors {
  AttendCase shape;
  std::vector<float> q, k, v;  // [heads, head_dim], [tokens, kv_heads, head_dim] twice

  explicit AttendTensors(const AttendCase& sizes) : shape(sizes) {
    std::mt19937 random(static_cast<unsigned>(sizes.heads * 131 + sizes.head_dim * 17 + sizes.tokens));
    const auto fill = [&](std::vector<float>& values, int count, float range) {
      std::uniform_real_distribution<float> uniform(-range, range);
      for (int i = 0; i < count; ++i) values.push_back(rounded_to(sizes.dtype, uniform(random)));
    };
    fill(q, sizes.heads * sizes.head_dim, 4.0F);
    fill(k, sizes.tokens * sizes.kv_heads * sizes.head_dim, 1.0F);
    fill(v, sizes.tokens * sizes.kv_heads * sizes.head_dim, 1.0F);
  }

  // The bytes of `values` in the case's dtype.
  [[nodiscard]] std::vector<std::byte> bytes(const std::vector<float>& values) const {
    const auto width = static_cast<std::size_t>(dtype_bytes(shape.dtype));
    std::vector<std::byte> all(values.size() * width);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::uint16_t half = shape.dtype == DType::kBf16 ? to_bf16(values[i]).bits : to_f16(values[i]).bits;
      const void* from = shape.dtype == DType::kF32 ? static_cast<const void*>(&values[i]) : &half;
      std::memcpy(all.data() + i * width, from, width);
    }
    return all;
  }
};

struct AttendTruth {
  std::vector<double> out, out_bound;  // [heads, head_dim]
  std::vector<double> lse, lse_bound;  // [heads]
};

// Attention that runs in `type`: f32, or a 16-bit type to which inputs, weights and output are rounded.
// The bound is that of CUDA's decode kernel, whose terms the CPU has too, none larger:
//   a score: a sum of head_dim products that tensor cores cut instead of rounding, twice the error of an addition
//     (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330)
//   a weight e^x: the score's error; a dozen roundings of x beside numbers no larger than |score| + log(tokens); the
//     exponential (2^-22 relative: PTX ISA, ex2.approx) and a rescaling once every 16 keys; the rounding to `type`
//   numerator and denominator: sums over tokens of such weights
inline AttendTruth attend_truth(const AttendTensors& tensors, DType type) {
  const auto& [heads, kv_heads, head_dim, tokens, dtype] = tensors.shape;
  const double add = 2 * kRoundF32;
  const double exponential = 0x1p-22;
  const double least_weight = 0x1p-125;  // below, an exponential may answer 0
  const double round = type == DType::kF32 ? kRoundF32 : type == DType::kBf16 ? kRoundBf16 : kRoundF16;
  const double subnormal = type == DType::kF16 ? 0x1p-25 : 0x1p-134;
  const double weight_round = type == DType::kF32 ? 0.0 : round;
  const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  const double log_tokens = std::log(tokens);

  AttendTruth truth;
  for (int h = 0; h < heads; ++h) {
    const int g = h / (heads / kv_heads);
    const auto at = [&, columns = kv_heads](const std::vector<float>& values, int t, int d, int channels) {
      return static_cast<double>(rounded_to(type, values[static_cast<std::size_t>((t * columns + g) * channels + d)]));
    };
    std::vector<double> score;
    double magnitude = 0.0;  // largest sum of |q| |k|
    for (int t = 0; t < tokens; ++t) {
      double sum = 0.0;
      double reach = 0.0;
      for (int d = 0; d < head_dim; ++d) {
        const double product =
            static_cast<double>(rounded_to(type, tensors.q[static_cast<std::size_t>(h * head_dim + d)])) *
            at(tensors.k, t, d, head_dim);
        sum += product;
        reach += std::abs(product);
      }
      score.push_back(sum * scale);
      magnitude = std::max(magnitude, reach * scale);
    }
    const double largest = *std::max_element(score.begin(), score.end());
    double total = 0.0;
    double reach = 0.0;
    for (const double s : score) {
      total += std::exp(s - largest);
      reach = std::max(reach, std::abs(s));
    }
    const double exponent_error = 16 * kRoundF32 * (reach + log_tokens + 1);
    const double weight_error =
        (head_dim + 1) * add * magnitude + exponent_error + (4 + tokens / 16.0) * (exponential + 2 * kRoundF32);
    const double sums = (tokens + 8.0) * add;
    const double relative = 2 * std::expm1(weight_error) + 2 * sums + weight_round;
    for (int d = 0; d < head_dim; ++d) {
      double out = 0.0;
      double spread = 0.0;  // sum of w |v|
      double all = 0.0;     // sum of |v|
      for (int t = 0; t < tokens; ++t) {
        const double value = at(tensors.v, t, d, head_dim);
        const double weight = std::exp(score[static_cast<std::size_t>(t)] - largest) / total;
        out += weight * value;
        spread += weight * std::abs(value);
        all += std::abs(value);
      }
      const double before = spread * relative + all * (subnormal + least_weight);
      truth.out.push_back(out);
      truth.out_bound.push_back(before + round * (std::abs(out) + before) + subnormal);
    }
    truth.lse.push_back(largest + std::log(total));
    truth.lse_bound.push_back(weight_error + sums + 4 * kRoundF32 * (reach + log_tokens + 1));
  }
  return truth;
}

}  // namespace vesper
