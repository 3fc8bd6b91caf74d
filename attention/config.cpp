#include "attention/config.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <set>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

using Json = nlohmann::json;

// Names of enumerators, in their order.
constexpr std::array<std::string_view, 3> kGroupScores = {"max", "sum", "mean"};
constexpr std::array<std::string_view, 2> kKernels = {"fused", "separate"};
constexpr std::array<std::string_view, 2> kPageScores = {"min_max", "mean_std"};
constexpr std::array<std::string_view, 2> kBounds = {"exact", "int8"};
constexpr std::array<std::string_view, 2> kKeySources = {"int4", "exact"};
constexpr std::array<std::string_view, 4> kTopKBys = {"quest", "int4", "oracle", "none"};
constexpr std::array<std::string_view, 2> kVerifies = {"output", "denominator"};
constexpr std::array<std::string_view, 2> kOnOutliers = {"escalate", "report"};
constexpr std::array<std::string_view, 2> kBases = {"quest", "dense"};

template <typename Names>
std::string list(const Names& names) {
  return fmt::format("{}", fmt::join(names, ", "));
}

// The keys of one rule. What is asked for is what is known; `finish` refuses the rest.
class Rule {
 public:
  Rule(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  [[nodiscard]] const std::string& where() const { return where_; }

  const Json* find(const std::string& key) {
    known_.push_back(key);
    const auto found = object_.find(key);
    return found == object_.end() ? nullptr : &*found;
  }

  std::string text(const std::string& key) {
    const Json* value = find(key);
    if (value == nullptr) refuse({where_, "no \"" + key + "\"", "a string", ""});
    if (!value->is_string()) wrong(key, *value, "a string");
    return value->get<std::string>();
  }

  // A number in [low, high], or (low, high) where `open`.
  double number(const std::string& key, double fallback, double low, double high, bool open = false) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    const double found = value->is_number() ? value->get<double>() : NAN;
    if (!(open ? found > low && found < high : found >= low && found <= high)) {
      wrong(key, *value,
            open ? fmt::format("a number between {} and {}", low, high)
                 : fmt::format("a number from {} to {}", low, high));
    }
    return found;
  }

  std::int64_t integer(const std::string& key, std::int64_t fallback, std::int64_t low, std::int64_t high) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number_integer() || value->get<double>() < static_cast<double>(low) ||
        value->get<double>() > static_cast<double>(high)) {
      wrong(key, *value, fmt::format("a whole number from {} to {}", low, high));
    }
    return value->get<std::int64_t>();
  }

  // A fraction of the context below 1, whole tokens from 1 on; 0 only where `may_be_zero`.
  Amount amount(const std::string& key, Amount fallback, bool may_be_zero) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    const double found = value->is_number() ? value->get<double>() : NAN;
    const bool whole = found < 1.0 || found == std::floor(found);
    if (!(found >= 0.0 && found <= 1e9) || !whole || (found == 0.0 && !may_be_zero)) {
      wrong(key, *value, std::string(may_be_zero ? "0, " : "") + "a fraction below 1, or whole tokens from 1 on");
    }
    return Amount{found};
  }

  template <typename Enum, std::size_t kCount>
  Enum choice(const std::string& key, Enum fallback, const std::array<std::string_view, kCount>& names) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    const auto name =
        value->is_string() ? std::find(names.begin(), names.end(), value->get<std::string>()) : names.end();
    if (name == names.end()) wrong(key, *value, "one of: " + list(names));
    return static_cast<Enum>(name - names.begin());
  }

  void finish() const {
    for (const auto& [key, value] : object_.items()) {
      if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
      refuse({where_, "the key " + in_quotes(key), "one of: " + list(known_), ""});
    }
  }

 private:
  [[noreturn]] void wrong(const std::string& key, const Json& value, const std::string& expected) const {
    refuse({where_, fmt::format("\"{}\": {}", key, value.dump()), expected, ""});
  }

  const Json& object_;
  std::string where_;
  std::vector<std::string> known_;
};

// `page_score` by the bounds that the rule names. `unread`: the settings that leave bounds unread, if they do.
PageScore read_bounds(Rule& rule, PageScore page_score, const std::string& unread) {
  const bool int8 = rule.choice("bounds", std::size_t{0}, kBounds) == 1;
  if (!int8) return page_score;
  if (!unread.empty()) {
    refuse({rule.where(), "\"bounds\": \"int8\" with " + unread + ", which reads no page bounds",
            "\"bounds\": \"exact\"", "leave one of the two out"});
  }
  return PageScore::kMinMaxInt8;
}

// Of the selectors that may score pages by more than bounds. `unread` as above.
PageScore read_page_score(Rule& rule, const std::string& unread) {
  const auto page_score = rule.choice("page_score", PageScore::kMinMax, kPageScores);
  const bool moments = unread.empty() && page_score == PageScore::kMeanStd;
  return read_bounds(rule, page_score, moments ? "\"page_score\": \"mean_std\"" : unread);
}

QuestConfig read_quest(Rule& rule) {
  QuestConfig config;
  config.token_budget = rule.amount("token_budget", config.token_budget, false);
  config.page_score = read_page_score(rule, "");
  config.group = rule.choice("group", config.group, kGroupScores);
  config.sink_tokens = rule.amount("sink_tokens", config.sink_tokens, true);
  config.window_tokens = rule.amount("window_tokens", config.window_tokens, true);
  config.kernels = rule.choice("kernels", config.kernels, kKernels);
  return config;
}

TwilightConfig read_twilight(Rule& rule) {
  TwilightConfig config;
  config.top_p = static_cast<float>(rule.number("top_p", config.top_p, 0.0, 1.0));
  if (config.top_p == 0.0F) refuse({rule.where(), "\"top_p\": 0", "a number over 0, up to 1", ""});
  config.dense_base = rule.choice("base", std::size_t{0}, kBases) == 1;
  config.base_budget = rule.amount("base_budget", config.base_budget, false);
  config.min_tokens = static_cast<std::int32_t>(rule.integer("min_tokens", config.min_tokens, 0, 1 << 20));
  config.scores = rule.choice("scores", config.scores, kKeySources);
  config.page_score = read_page_score(rule, config.dense_base ? "\"base\": \"dense\"" : "");
  config.group = rule.choice("group", config.group, kGroupScores);
  config.sink_tokens = rule.amount("sink_tokens", config.sink_tokens, true);
  config.window_tokens = rule.amount("window_tokens", config.window_tokens, true);
  return config;
}

VAttentionConfig read_vattention(Rule& rule) {
  VAttentionConfig config;
  config.epsilon = static_cast<float>(rule.number("epsilon", config.epsilon, 0.0, 1.0, true));
  config.delta = static_cast<float>(rule.number("delta", config.delta, 0.0, 1.0, true));
  config.sink_tokens = rule.amount("sink_tokens", config.sink_tokens, true);
  config.window_tokens = rule.amount("window_tokens", config.window_tokens, true);
  config.top_k = rule.amount("top_k", config.top_k, true);
  config.top_k_by = rule.choice("top_k_by", config.top_k_by, kTopKBys);
  const std::string by(kTopKBys[static_cast<std::size_t>(config.top_k_by)]);
  config.page_score =
      read_bounds(rule, config.page_score, config.top_k_by == TopKBy::kQuest ? "" : "\"top_k_by\": " + in_quotes(by));
  config.group = rule.choice("group", config.group, kGroupScores);
  config.pilot = rule.amount("pilot", config.pilot, false);
  config.verify = rule.choice("verify", config.verify, kVerifies);
  config.safety = static_cast<float>(rule.number("safety", config.safety, 1.0, 100.0));
  config.on_outlier = rule.choice("on_outlier", config.on_outlier, kOnOutliers);
  config.seed = rule.integer("seed", config.seed, 0, 0xFFFFFFFFLL);
  if (config.delta > 0.2F) {
    spdlog::warn("{}: delta {} is over 0.2, where the normal bound on a vector's error no longer holds", rule.where(),
                 config.delta);
  }
  return config;
}

constexpr std::array<std::string_view, 4> kBackends = {"dense", "quest", "twilight", "vattention"};

// Everything of a rule but its layers.
BackendConfig read_backend(Rule& rule, const std::string& unknown_hint) {
  const std::string name = rule.text("backend");
  if (std::find(kBackends.begin(), kBackends.end(), name) == kBackends.end()) {
    refuse({rule.where(), "the backend " + in_quotes(name), "one of: " + list(kBackends) + unknown_hint, ""});
  }
  BackendConfig config;
  if (name == "quest") config.settings = read_quest(rule);
  if (name == "twilight") config.settings = read_twilight(rule);
  if (name == "vattention") config.settings = read_vattention(rule);
  if (name != "dense") {
    config.dense_below = static_cast<std::int32_t>(rule.integer("dense_below", 0, 0, 1 << 30));
  }
  rule.finish();
  return config;
}

std::optional<int> parse_number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

// Marks the layers that "3", "3-5" or "2-" names. False where the text is none of these or leaves the model.
bool mark_range(std::string_view text, std::vector<bool>& marked) {
  const int layers = static_cast<int>(marked.size());
  const std::size_t dash = text.find('-');
  const std::optional<int> first = parse_number(text.substr(0, dash));
  std::optional<int> last = first;
  if (dash != std::string_view::npos) {
    last = dash + 1 == text.size() ? std::optional<int>(layers - 1) : parse_number(text.substr(dash + 1));
  }
  if (!first || !last || *first > *last || *last >= layers) return false;
  for (int l = *first; l <= *last; ++l) marked[static_cast<std::size_t>(l)] = true;
  return true;
}

std::vector<bool> parse_layers(std::string_view text, int layers, const std::string& where) {
  std::vector<bool> marked(static_cast<std::size_t>(layers), text == "all");
  if (text == "all") return marked;
  for (std::string_view rest = text;;) {
    const std::size_t comma = rest.find(',');
    if (!mark_range(rest.substr(0, comma), marked)) {
      refuse({where, "\"layers\": " + in_quotes(text),
              "\"all\" or numbers and ranges such as \"0\", \"3-5\", \"2-\" within 0-" + std::to_string(layers - 1),
              ""});
    }
    if (comma == std::string_view::npos) return marked;
    rest.remove_prefix(comma + 1);
  }
}

AttentionConfig parse_file(const std::string& path, int layers) {
  const Json document = read_json_file(path);
  const std::string file = "reading the attention file " + path;
  if (document.is_object()) {
    for (const auto& [key, value] : document.items()) {
      if (key != "attention") refuse({file, "the key " + in_quotes(key), "one of: attention", ""});
    }
  }
  if (!document.is_object() || !document.contains("attention") || !document["attention"].is_array()) {
    refuse({file, "another shape", "an object whose one key \"attention\" holds a list of rules", ""});
  }
  std::vector<std::optional<BackendConfig>> chosen(static_cast<std::size_t>(layers));
  int number = 0;
  for (const Json& object : document["attention"]) {
    const std::string where = file + ", rule " + std::to_string(++number);
    if (!object.is_object()) refuse({where, object.dump(), "an object", ""});
    Rule rule(object, where);
    const std::string range = rule.text("layers");
    const BackendConfig config = read_backend(rule, "");
    const std::vector<bool> marked = parse_layers(range, layers, where);
    for (std::size_t l = 0; l < chosen.size(); ++l) {
      if (marked[l]) chosen[l] = config;
    }
  }
  AttentionConfig config;
  for (std::size_t l = 0; l < chosen.size(); ++l) {
    if (!chosen[l]) {
      refuse({file, "no rule for layer " + std::to_string(l), "every layer covered",
              R"(begin with { "layers": "all", "backend": "dense" })"});
    }
    config.layers.push_back(*chosen[l]);
  }
  return config;
}

// "quest:token_budget=1024,group=sum" as the rule that a file would hold, without its layers.
Json parse_shorthand(const std::string& text) {
  const std::string where = "reading --attention " + text;
  Json object = {{"backend", text.substr(0, text.find(':'))}};
  if (text.find(':') == std::string::npos) return object;
  std::string_view rest = std::string_view(text).substr(text.find(':') + 1);
  for (bool more = true; more;) {
    const std::size_t comma = rest.find(',');
    const std::string_view pair = rest.substr(0, comma);
    const std::size_t equals = pair.find('=');
    if (equals == std::string_view::npos || equals == 0 || equals + 1 == pair.size()) {
      refuse({where, in_quotes(pair), "BACKEND:KEY=VALUE,KEY=VALUE", ""});
    }
    const std::string key(pair.substr(0, equals));
    const std::string value(pair.substr(equals + 1));
    if (object.contains(key)) refuse({where, "the key " + in_quotes(key) + " twice", "each key once", ""});
    const Json parsed = Json::parse(value, nullptr, false);
    object[key] = parsed.is_number() ? parsed : Json(value);
    more = comma != std::string_view::npos;
    if (more) rest.remove_prefix(comma + 1);
  }
  return object;
}

template <typename Names, typename Enum>
std::string_view name_of(const Names& names, Enum value) {
  return names[static_cast<std::size_t>(value)];
}

// What pages are scored by, as its two keys.
std::string describe_score(PageScore score) {
  const bool int8 = score == PageScore::kMinMaxInt8;
  return fmt::format("page_score={} bounds={}", int8 ? kPageScores[0] : name_of(kPageScores, score),
                     kBounds[int8 ? 1 : 0]);
}

struct Description {
  std::string operator()(const DenseConfig& /*config*/) const { return "dense"; }
  std::string operator()(const QuestConfig& c) const {
    return fmt::format("quest token_budget={} {} group={} sink_tokens={} window_tokens={}{}", c.token_budget.value,
                       describe_score(c.page_score), name_of(kGroupScores, c.group), c.sink_tokens.value,
                       c.window_tokens.value, c.kernels == Kernels::kSeparate ? " kernels=separate" : "");
  }
  std::string operator()(const TwilightConfig& c) const {
    const std::string base = c.dense_base ? "base=dense"
                                          : fmt::format("base=quest base_budget={} {} group={}", c.base_budget.value,
                                                        describe_score(c.page_score), name_of(kGroupScores, c.group));
    return fmt::format("twilight top_p={} {} scores={} min_tokens={} sink_tokens={} window_tokens={}", c.top_p, base,
                       name_of(kKeySources, c.scores), c.min_tokens, c.sink_tokens.value, c.window_tokens.value);
  }
  std::string operator()(const VAttentionConfig& c) const {
    return fmt::format(
        "vattention epsilon={} delta={} sink_tokens={} window_tokens={} top_k={} top_k_by={}{} group={} pilot={} "
        "verify={} safety={} on_outlier={}{}",
        c.epsilon, c.delta, c.sink_tokens.value, c.window_tokens.value, c.top_k.value, name_of(kTopKBys, c.top_k_by),
        c.page_score == PageScore::kMinMaxInt8 ? " bounds=int8" : "", name_of(kGroupScores, c.group), c.pilot.value,
        name_of(kVerifies, c.verify), c.safety, name_of(kOnOutliers, c.on_outlier),
        c.seed < 0 ? "" : fmt::format(" seed={}", c.seed));
  }
};

}  // namespace

std::string_view backend_name(const BackendConfig& config) {
  return kBackends[config.settings.index()];
}

std::string describe(const BackendConfig& config) {
  const std::string text = std::visit(Description{}, config.settings);
  return config.dense_below > 0 ? fmt::format("{} dense_below={}", text, config.dense_below) : text;
}

bool is_attention_file(const std::string& file_or_shorthand) {
  return file_or_shorthand.ends_with(".json") || file_or_shorthand.find('/') != std::string::npos;
}

std::string shorthand_rule(const std::string& shorthand, int first_layer) {
  const Json object = parse_shorthand(shorthand);
  std::string text = fmt::format(R"({{ "layers": "{}-", "backend": {})", first_layer, object.at("backend").dump());
  for (const auto& [key, value] : object.items()) {
    if (key != "backend") text += fmt::format(R"(, "{}": {})", key, value.dump());
  }
  return text + " }";
}

AttentionConfig parse_attention(const std::string& file_or_shorthand, int layers, int first_layer) {
  if (is_attention_file(file_or_shorthand)) {
    return parse_file(file_or_shorthand, layers);
  }
  const std::string where = "reading --attention " + file_or_shorthand;
  const Json object = parse_shorthand(file_or_shorthand);
  Rule rule(object, where);
  const BackendConfig backend = read_backend(rule, ", or a file whose name ends in .json");
  if (backend == BackendConfig{}) first_layer = 0;
  if (first_layer >= layers) {
    refuse({where, fmt::format("a model of {} layers", layers),
            fmt::format("more than {}: a shorthand leaves the first {} dense", first_layer, first_layer),
            "name the layers in a JSON file"});
  }
  AttentionConfig config;
  config.layers.assign(static_cast<std::size_t>(layers), BackendConfig{});
  std::fill(config.layers.begin() + first_layer, config.layers.end(), backend);
  return config;
}

}  // namespace vesper
