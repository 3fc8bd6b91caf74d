#include "models/rope.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

namespace vesper {
namespace {

constexpr double kMaxTheta = 1e12;
constexpr double kMaxFactor = 1e6;
constexpr double kMinFreqFactor = 1e-6;  // a length divided by it stays a float
constexpr int kMaxPositions = 1 << 27;

constexpr std::array<std::pair<const char*, RopeKind>, 5> kKinds = {{{"default", RopeKind::kDefault},
                                                                     {"linear", RopeKind::kLinear},
                                                                     {"dynamic", RopeKind::kDynamic},
                                                                     {"llama3", RopeKind::kLlama3},
                                                                     {"yarn", RopeKind::kYarn}}};

const char* name_of(RopeKind kind) {
  return kKinds.at(static_cast<std::size_t>(kind)).first;
}

// Which of the two keys counts; empty where neither says anything.
std::string parameters_key(const ConfigKeys& keys) {
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (const nlohmann::json* value = keys.find(key); value != nullptr && !value->empty()) return key;
  }
  return "";
}

RopeKind read_kind(const ConfigKeys& parameters) {
  const char* key = parameters.find("rope_type") != nullptr ? "rope_type" : "type";
  const nlohmann::json* type = parameters.find(key);
  std::vector<std::string> known;
  for (const auto& [name, kind] : kKinds) {
    if (type != nullptr && *type == name) return kind;
    known.emplace_back(name);
  }
  if (type != nullptr) parameters.refuse_key(key, config_value_text(*type), "one of: " + listed(known));
  if (parameters.has("factor")) {
    parameters.refuse_key("rope_type", "a factor without a kind", "one of: " + listed(known));
  }
  return RopeKind::kDefault;
}

double read_factor(const ConfigKeys& parameters) {
  const double factor = parameters.required_real("factor", 0.0, kMaxFactor);
  if (factor < 1.0) parameters.refuse_key("factor", fmt::format("{}", factor), "a number from 1 on");
  return factor;
}

// Beside the parameters it counts more than among them, as transformers has it.
int read_original_positions(const ConfigKeys& keys, const ConfigKeys& parameters, int max_positions) {
  const char* key = "original_max_position_embeddings";
  for (const ConfigKeys* place : {&keys, &parameters}) {
    if (const nlohmann::json* value = place->find(key)) return place->integer(key, *value, 1, kMaxPositions);
  }
  return max_positions;
}

void read_llama3(const ConfigKeys& parameters, RopeConfig& rope) {
  rope.factor = read_factor(parameters);
  rope.low_freq_factor = parameters.required_real("low_freq_factor", kMinFreqFactor, kMaxFactor);
  rope.high_freq_factor = parameters.required_real("high_freq_factor", kMinFreqFactor, kMaxFactor);
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    parameters.refuse_key("high_freq_factor", fmt::format("{}", rope.high_freq_factor),
                          fmt::format("more than low_freq_factor, {}", rope.low_freq_factor));
  }
}

// Eq. 22 of the paper, 0.1 ln(s) + 1, with DeepSeek's weight of the logarithm.
double yarn_mscale(double factor, double weight) {
  return factor <= 1.0 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0;
}

double read_yarn_attention_factor(const ConfigKeys& parameters, double factor) {
  if (parameters.find("attention_factor") != nullptr) {
    return parameters.required_real("attention_factor", 0.0, kMaxFactor);
  }
  const double mscale = parameters.real_or_null("mscale", 0.0, 0.0, kMaxFactor);
  const double all_dim = parameters.real_or_null("mscale_all_dim", 0.0, 0.0, kMaxFactor);
  if (mscale == 0.0 || all_dim == 0.0) return yarn_mscale(factor, 1.0);  // both or none
  return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim);
}

void read_yarn(const ConfigKeys& parameters, int max_positions, RopeConfig& rope) {
  if (rope.theta <= 1.0) parameters.refuse_key("rope_theta", fmt::format("{}", rope.theta), "more than 1 with yarn");
  const bool from_lengths = parameters.has("factor") && parameters.find("factor") == nullptr;  // null: DeepSeek's way
  rope.factor = from_lengths ? static_cast<double>(max_positions) / rope.original_positions : read_factor(parameters);
  rope.attention_factor = read_yarn_attention_factor(parameters, rope.factor);
  rope.beta_fast = parameters.real_or_null("beta_fast", rope.beta_fast, 0.0, kMaxFactor);
  rope.beta_slow = parameters.real_or_null("beta_slow", rope.beta_slow, 0.0, kMaxFactor);
  rope.truncate = parameters.flag("truncate", true);
  if (rope.beta_fast < rope.beta_slow) {
    parameters.refuse_key("beta_fast", fmt::format("{}", rope.beta_fast),
                          fmt::format("at least beta_slow, {}", rope.beta_slow));
  }
}

void refuse_partial_rotation(const ConfigKeys& keys) {
  if (const nlohmann::json* part = keys.find("partial_rotary_factor"); part != nullptr && *part != 1) {
    keys.refuse_key("partial_rotary_factor", config_value_text(*part), "1: partial rotation is not supported");
  }
}

// theta^(2d / head_dim) of each pair, in fp32.
std::vector<float> periods(float theta, int head_dim) {
  std::vector<float> all(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t d = 0; d < all.size(); ++d) {
    all[d] = std::pow(theta, static_cast<float>(2 * d) / static_cast<float>(head_dim));
  }
  return all;
}

std::vector<float> unscaled(float theta, int head_dim) {
  std::vector<float> all = periods(theta, head_dim);
  for (float& value : all) value = 1.0F / value;
  return all;
}

// theta * (factor * length / original - (factor - 1))^(head_dim / (head_dim - 2)): the slowest pair is interpolated,
// the fastest kept. In fp32 beyond the original length, where transformers computes with a tensor.
float dynamic_theta(const RopeConfig& rope, int head_dim, int length) {
  const double power = static_cast<double>(head_dim) / (head_dim - 2);
  if (length <= rope.original_positions) return static_cast<float>(rope.theta);
  const auto original = static_cast<float>(rope.original_positions);
  const float stretch =
      static_cast<float>(rope.factor) * static_cast<float>(length) / original - static_cast<float>(rope.factor - 1.0);
  return static_cast<float>(rope.theta) * std::pow(stretch, static_cast<float>(power));
}

std::vector<float> llama3(const RopeConfig& rope, int head_dim) {
  const auto factor = static_cast<float>(rope.factor);
  const auto original = static_cast<float>(rope.original_positions);
  const auto longest = static_cast<float>(rope.original_positions / rope.low_freq_factor);
  const auto shortest = static_cast<float>(rope.original_positions / rope.high_freq_factor);
  std::vector<float> all = unscaled(static_cast<float>(rope.theta), head_dim);
  for (float& value : all) {
    const float wavelength = static_cast<float>(2.0 * M_PI) / value;
    if (wavelength > longest) {
      value /= factor;
    } else if (wavelength >= shortest) {
      const float kept = (original / wavelength - static_cast<float>(rope.low_freq_factor)) /
                         static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
      value = (1.0F - kept) * value / factor + kept * value;
    }
  }
  return all;
}

// The pair, as a real number, that turns `rotations` times over the original length.
double yarn_pair_of(const RopeConfig& rope, int head_dim, double rotations) {
  return head_dim * std::log(rope.original_positions / (rotations * 2.0 * M_PI)) / (2.0 * std::log(rope.theta));
}

std::vector<float> yarn(const RopeConfig& rope, int head_dim) {
  double first = yarn_pair_of(rope, head_dim, rope.beta_fast);
  double last = yarn_pair_of(rope, head_dim, rope.beta_slow);
  if (rope.truncate) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, head_dim - 1.0);
  if (first == last) last += 0.001;  // transformers' way out of a division by zero
  const auto begin = static_cast<float>(first);
  const auto width = static_cast<float>(last - first);
  std::vector<float> all = periods(static_cast<float>(rope.theta), head_dim);
  for (std::size_t d = 0; d < all.size(); ++d) {
    const float kept = 1.0F - std::clamp((static_cast<float>(d) - begin) / width, 0.0F, 1.0F);
    const float divided = 1.0F / (static_cast<float>(rope.factor) * all[d]);
    all[d] = divided * (1.0F - kept) + 1.0F / all[d] * kept;
  }
  return all;
}

}  // namespace

RopeConfig read_rope(const ConfigKeys& keys, double default_theta, int head_dim, int max_positions) {
  refuse_partial_rotation(keys);
  RopeConfig rope;
  rope.theta = keys.real("rope_theta", default_theta, 0.0, kMaxTheta);
  const std::string key = parameters_key(keys);
  if (key.empty()) return rope;
  const ConfigKeys parameters = keys.inside(key);
  refuse_partial_rotation(parameters);
  rope.kind = read_kind(parameters);
  rope.theta = parameters.real("rope_theta", rope.theta, 0.0, kMaxTheta);
  rope.original_positions = read_original_positions(keys, parameters, max_positions);
  switch (rope.kind) {
    case RopeKind::kDefault:
      break;
    case RopeKind::kLinear:
      rope.factor = read_factor(parameters);
      break;
    case RopeKind::kDynamic:
      rope.factor = read_factor(parameters);
      rope.original_positions = max_positions;
      if (head_dim == 2) parameters.refuse_key("rope_type", "\"dynamic\" with head_dim 2", "a head_dim from 4 on");
      break;
    case RopeKind::kLlama3:
      read_llama3(parameters, rope);
      break;
    case RopeKind::kYarn:
      read_yarn(parameters, max_positions, rope);
      break;
  }
  return rope;
}

std::vector<float> rope_inv_freq(const RopeConfig& rope, int head_dim, int length) {
  switch (rope.kind) {
    case RopeKind::kDefault:
      break;
    case RopeKind::kLinear: {
      std::vector<float> all = unscaled(static_cast<float>(rope.theta), head_dim);
      for (float& value : all) value /= static_cast<float>(rope.factor);
      return all;
    }
    case RopeKind::kDynamic:
      return unscaled(dynamic_theta(rope, head_dim, length), head_dim);
    case RopeKind::kLlama3:
      return llama3(rope, head_dim);
    case RopeKind::kYarn:
      return yarn(rope, head_dim);
  }
  return unscaled(static_cast<float>(rope.theta), head_dim);
}

std::string describe(const RopeConfig& rope) {
  std::string text = fmt::format("theta {}", rope.theta);
  if (rope.kind == RopeKind::kDefault) return text;
  text += fmt::format(", {} x {}", name_of(rope.kind), rope.factor);
  if (rope.kind != RopeKind::kLinear) text += fmt::format(" beyond {}", rope.original_positions);
  return text;
}

}  // namespace vesper
