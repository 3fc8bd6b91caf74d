// Rotary frequencies against transformers' (tests/golden/rope.json, made by make_golden.py) and by hand.
#include "models/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/core/json.h"
#include "models/model_config.h"
#include "models/rope_table.h"
#include "tests/models/files.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

RopeConfig rope_of(Json document) {
  document["architectures"] = {"LlamaForCausalLM"};
  return parse_model_config(document, "c/config.json").rope;
}

// Frequencies come out of one or two roundings of a power, whose own error in either library is one unit in the last
// place of a result, and some products: four units.
TEST(Rope, FrequenciesOfPublishedModelsEqualTransformers) {
  int cases = 0;
  for (const Json& golden : read_json_file(source_dir() + "/tests/golden/rope.json")) {
    const std::vector<float> expected = golden.at("inv_freq").get<std::vector<float>>();
    const RopeConfig rope = rope_of(golden.at("config"));
    const std::string name = golden.at("config").dump() + " at " + golden.at("length").dump();
    EXPECT_NEAR(rope.attention_factor, golden.at("attention_factor").get<double>(), 1e-12) << name;
    const std::vector<float> found =
        rope_inv_freq(rope, static_cast<int>(expected.size()) * 2, golden.at("length").get<int>());
    ASSERT_EQ(found.size(), expected.size()) << name;
    for (std::size_t d = 0; d < found.size(); ++d) {
      EXPECT_NEAR(found[d], expected[d], 4 * 0x1p-23F * expected[d]) << name << ", pair " << d;
    }
    ++cases;
  }
  EXPECT_GE(cases, 14);
}

TEST(Rope, FrequenciesByHand) {
  const std::vector<float> plain = rope_inv_freq({}, 4, 1);
  EXPECT_EQ(plain, (std::vector<float>{1.0F, 0.01F}));
  const std::vector<float> linear = rope_inv_freq({.kind = RopeKind::kLinear, .factor = 8.0}, 4, 1);
  EXPECT_EQ(linear, (std::vector<float>{0.125F, 0.00125F}));
  // 2 * 24 / 16 - 1 = 2, to the power of 4 / 2: theta 40000, whose root is 200.
  const RopeConfig dynamic{.kind = RopeKind::kDynamic, .factor = 2.0, .original_positions = 16};
  EXPECT_EQ(rope_inv_freq(dynamic, 4, 16), plain);
  EXPECT_NEAR(rope_inv_freq(dynamic, 4, 24)[1], 1.0 / 200.0, 1e-8);
  // Wavelengths 6.3 and 628 around an original length of 64: kept below 64 / 4, divided above 64 / 1.
  const RopeConfig llama3{.kind = RopeKind::kLlama3, .factor = 8.0, .original_positions = 64};
  EXPECT_EQ(rope_inv_freq(llama3, 4, 1), (std::vector<float>{1.0F, 0.01F / 8.0F}));
}

TEST(Rope, ReadsBothPlacesAndBothNames) {
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    for (const char* kind : {"type", "rope_type"}) {
      const RopeConfig rope =
          rope_of({{key, {{kind, "linear"}, {"factor", 8}, {"rope_theta", 5e5}}}, {"rope_theta", 7}});
      EXPECT_EQ(rope.kind, RopeKind::kLinear);
      EXPECT_EQ(rope.factor, 8.0);
      EXPECT_EQ(rope.theta, 5e5);
    }
  }
  EXPECT_EQ(rope_of({{"rope_scaling", Json::object()}, {"rope_theta", 7.0}}).theta, 7.0);
  EXPECT_EQ(rope_of({{"rope_scaling", {{"rope_type", "default"}}}, {"rope_theta", 7.0}}).kind, RopeKind::kDefault);
  EXPECT_EQ(describe(rope_of(Json::object())), "theta 10000");
  EXPECT_EQ(describe(rope_of({{"rope_scaling", {{"type", "dynamic"}, {"factor", 2.5}}}})),
            "theta 10000, dynamic x 2.5 beyond 2048");
}

TEST(Rope, YarnsAttentionFactor) {
  const auto factor = [](Json more) {
    more["rope_type"] = "yarn";
    more["factor"] = 16.0;
    return rope_of({{"rope_parameters", more}}).attention_factor;
  };
  const double log16 = std::log(16.0);
  EXPECT_DOUBLE_EQ(factor(Json::object()), 0.1 * log16 + 1.0);
  EXPECT_DOUBLE_EQ(factor({{"mscale", 2.0}}), 0.1 * log16 + 1.0);  // alone it says nothing
  EXPECT_DOUBLE_EQ(factor({{"mscale", 1.0}, {"mscale_all_dim", 0.5}}), (0.1 * log16 + 1.0) / (0.05 * log16 + 1.0));
  EXPECT_DOUBLE_EQ(factor({{"mscale", 1.0}, {"mscale_all_dim", 0.5}, {"attention_factor", 1.25}}), 1.25);
  EXPECT_DOUBLE_EQ(factor({{"attention_factor", nullptr}}), 0.1 * log16 + 1.0);
}

std::string refusal_of(const Json& document) {
  const std::string message = refusal([&] { (void)rope_of(document); });
  expect_names(message, {"c/config.json"});
  return message;
}

TEST(Rope, RefusesByNameWhatIsNotSupported) {
  const char* known = "one of: default, linear, dynamic, llama3, yarn";
  for (const char* kind : {"longrope", "su", "mrope", "ntk"}) {
    expect_names(refusal_of({{"rope_scaling", {{"type", kind}, {"factor", 2.0}}}}), {"rope_scaling", kind, known});
    expect_names(refusal_of({{"rope_parameters", {{"rope_type", kind}}}}),
                 {"rope_parameters", "rope_type", kind, known});
  }
  expect_names(refusal_of({{"rope_scaling", {{"factor", 2.0}}}}), {"rope_scaling", "a factor without a kind", known});
  expect_names(refusal_of({{"rope_scaling", {{"type", 3}}}}), {"\"type\"", "3", known});
  expect_names(refusal_of({{"rope_scaling", 2}}), {"rope_scaling", "an object or null"});
  expect_names(refusal_of({{"rope_scaling", {1}}}), {"rope_scaling", "an object or null"});
  expect_names(refusal_of({{"rope_parameters", {{"partial_rotary_factor", 0.5}}}}), {"partial_rotary_factor", "0.5"});
  expect_names(refusal_of({{"partial_rotary_factor", 0.5}}), {"partial_rotary_factor", "0.5"});
  expect_names(refusal_of({{"head_dim", 2}, {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}}}),
               {"dynamic", "head_dim 2"});
}

TEST(Rope, RefusesWrongTypesAndRanges) {
  const auto with = [](const char* kind, const Json& more) {
    Json parameters = {{"rope_type", kind}, {"factor", 8.0}};
    if (std::string(kind) == "llama3") parameters.update({{"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}});
    parameters.update(more);
    return refusal_of({{"rope_scaling", parameters}});
  };
  for (const char* kind : {"linear", "dynamic", "llama3", "yarn"}) {
    for (const Json& factor : {Json(0), Json(-2), Json("8"), Json(true), Json(1e7), Json(0.5)}) {
      expect_names(with(kind, {{"factor", factor}}), {"factor", factor.dump(), "a number"});
    }
    expect_names(refusal_of({{"rope_scaling", {{"type", kind}}}}), {"\"factor\"", "no such key"});
  }
  for (const char* key : {"low_freq_factor", "high_freq_factor"}) {
    expect_names(with("llama3", {{key, "x"}}), {key, "\"x\"", "a number"});
    expect_names(with("llama3", {{key, 0}}), {key, "0", "a number above 1e-06"});
  }
  expect_names(with("llama3", {{"low_freq_factor", 4}}), {"high_freq_factor", "4", "more than low_freq_factor, 4"});
  expect_names(refusal_of({{"rope_scaling", {{"type", "llama3"}, {"factor", 8}}}}), {"low_freq_factor", "no such key"});
  for (const char* key : {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"}) {
    expect_names(with("yarn", {{key, "x"}}), {key, "\"x\"", "a number"});
    expect_names(with("yarn", {{key, -1}}), {key, "-1", "a number above 0"});
  }
  expect_names(with("yarn", {{"beta_fast", 0.5}}), {"beta_fast", "0.5", "at least beta_slow, 1"});
  expect_names(with("yarn", {{"truncate", 1}}), {"truncate", "1", "true or false"});
  expect_names(with("yarn", {{"rope_theta", 1.0}}), {"rope_theta", "1", "more than 1"});
  for (const char* kind : {"llama3", "yarn"}) {
    expect_names(with(kind, {{"original_max_position_embeddings", 0}}), {"original_max_position_embeddings", "0"});
    expect_names(with(kind, {{"original_max_position_embeddings", 8.5}}), {"original_max_position_embeddings", "8.5"});
  }
  expect_names(with("linear", {{"rope_theta", "x"}}), {"rope_scaling", "rope_theta", "\"x\""});
}

TEST(RopeTable, StaticKindsShareOneRow) {
  RopeTable table({.kind = RopeKind::kYarn, .factor = 4.0, .original_positions = 32, .attention_factor = 1.25}, 8, 3,
                  {});
  table.update({}, std::vector<int>{500, 2, 60});
  const Rope rope = table.rope();
  EXPECT_EQ(rope.inv_freq.shape(0), 4);
  EXPECT_EQ(rope.seq_stride, 0);
  EXPECT_EQ(rope.attention_factor, 1.25F);
}

TEST(RopeTable, DynamicRowsFollowTheirSequences) {
  const RopeConfig config{.kind = RopeKind::kDynamic, .factor = 2.0, .original_positions = 32};
  RopeTable table(config, 8, 3, {});
  const Rope rope = table.rope();
  ASSERT_EQ(rope.inv_freq.shape(0), 12);
  EXPECT_EQ(rope.seq_stride, 4);
  const auto expect_rows = [&](const std::vector<int>& lengths) {
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      const float* row = &rope.inv_freq(static_cast<int>(s) * rope.seq_stride);
      EXPECT_EQ(std::vector<float>(row, row + 4), rope_inv_freq(config, 8, lengths[s])) << "row " << s;
    }
  };
  expect_rows({32, 32, 32});
  table.update({}, std::vector<int>{100, 5});
  expect_rows({100, 5, 32});
  EXPECT_EQ(table.rope().inv_freq.data(), rope.inv_freq.data());
  table.update({}, std::vector<int>{33, 101, 40});  // after a rewind, too
  expect_rows({33, 101, 40});
}

}  // namespace
}  // namespace vesper
