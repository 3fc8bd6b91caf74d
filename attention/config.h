// The attention configuration: which backend each layer runs, and with which settings.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "attention/prune_top_p.h"
#include "attention/sample_tail.h"
#include "attention/score_tokens.h"
#include "attention/select_pages.h"
#include "attention/selection.h"

namespace vesper {

struct DenseConfig {
  bool operator==(const DenseConfig&) const = default;
};

// Whether steps of a layer's attention share launches on a GPU, where they can. The lists are the same.
enum class Kernels : std::uint8_t { kFused, kSeparate };

struct QuestConfig {
  Amount token_budget{2048};  // floored to whole pages; the newest page, sink and window included
  PageScore page_score = PageScore::kMinMax;
  GroupScore group = GroupScore::kMax;
  Amount sink_tokens;
  Amount window_tokens;
  Kernels kernels = Kernels::kFused;
  bool operator==(const QuestConfig&) const = default;
};

struct TwilightConfig {
  float top_p = 0.95F;
  bool dense_base = false;   // every token is a candidate
  Amount base_budget{0.25};  // of the quest base
  std::int32_t min_tokens = 16;
  KeySource scores = KeySource::kInt4;
  PageScore page_score = PageScore::kMinMax;
  GroupScore group = GroupScore::kMax;
  Amount sink_tokens;
  Amount window_tokens;
  bool operator==(const TwilightConfig&) const = default;
};

enum class TopKBy : std::uint8_t { kQuest, kInt4, kOracle, kNone };

struct VAttentionConfig {
  float epsilon = 0.05F;
  float delta = 0.05F;
  Amount sink_tokens{128};
  Amount window_tokens{128};
  Amount top_k{0.025};  // apart from sink and window
  TopKBy top_k_by = TopKBy::kQuest;
  PageScore page_score = PageScore::kMinMax;  // by bounds, exact or in 8 bits
  GroupScore group = GroupScore::kMax;
  Amount pilot{512};
  Verify verify = Verify::kOutput;
  float safety = 1.2F;
  OnOutlier on_outlier = OnOutlier::kEscalate;
  std::int64_t seed = -1;  // -1: the run's
  bool operator==(const VAttentionConfig&) const = default;
};

// One layer's backend. Contexts of at most `dense_below` tokens attend dense.
struct BackendConfig {
  std::variant<DenseConfig, QuestConfig, TwilightConfig, VAttentionConfig> settings;
  std::int32_t dense_below = 0;
  bool operator==(const BackendConfig&) const = default;
};

// "dense", "quest", "twilight", "vattention".
std::string_view backend_name(const BackendConfig& config);
// The backend with all its settings, as one writes them: "quest token_budget=2048 page_score=min_max bounds=exact ...".
std::string describe(const BackendConfig& config);

// One entry a layer.
struct AttentionConfig {
  std::vector<BackendConfig> layers;
};

// Layers that a shorthand leaves dense, as the papers do.
inline constexpr int kShorthandDenseLayers = 2;

// Reads `--attention FILE|SHORTHAND` for a model of `layers` layers. A shorthand is BACKEND or BACKEND:KEY=VALUE,...,
// for the layers from `first_layer` on, those before it staying dense; anything that ends in .json or holds a '/' is a
// file:
//   { "attention": [ { "layers": "all", "backend": "dense" },
//                    { "layers": "2-", "backend": "quest", "token_budget": 2048 } ] }
// `layers` is "all" or a comma list of numbers and ranges ("0", "3-5", "2-"); the last rule that matches wins; every
// layer must be covered. Strict: an unknown key, backend, value out of range, or layer past the last is an input error
// that says what is known. A delta over 0.2 is warned of: the bound does not hold there.
AttentionConfig parse_attention(const std::string& file_or_shorthand, int layers,
                                int first_layer = kShorthandDenseLayers);

// Whether it is a file, not a shorthand.
bool is_attention_file(const std::string& file_or_shorthand);

// A shorthand as the rule that a file would hold: { "layers": "2-", "backend": "quest", "token_budget": 2048 }.
std::string shorthand_rule(const std::string& shorthand, int first_layer = kShorthandDenseLayers);

}  // namespace vesper
