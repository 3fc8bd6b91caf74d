#include "engine/repro.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "engine/engine.h"

namespace vesper {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::array<std::string_view, 4> kUnits = {"us", "ms", "x", "of baseline"};
constexpr std::array<std::string_view, 2> kMeasures = {"operator", "step"};
constexpr int kMostContext = 1 << 24;
constexpr int kMostBatch = 4096;

// One object of the file. What is asked for is what is known; finish() refuses the rest.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) refuse({where_, object.dump().substr(0, 40), "an object", ""});
  }

  [[nodiscard]] const Json* find(const std::string& key) {
    known_.push_back(key);
    const auto found = object_.find(key);
    return found == object_.end() ? nullptr : &*found;
  }
  [[nodiscard]] const Json& need(const std::string& key, const std::string& expected) {
    const Json* value = find(key);
    if (value == nullptr) refuse({where_, "no \"" + key + "\"", expected, ""});
    return *value;
  }
  std::string text(const std::string& key) { return text_of(need(key, "a string"), key); }
  std::string text_or(const std::string& key, const std::string& fallback) {
    const Json* value = find(key);
    return value == nullptr ? fallback : text_of(*value, key);
  }
  std::vector<std::string> texts(const std::string& key) {
    std::vector<std::string> all;
    const Json* value = find(key);
    if (value == nullptr) return all;
    for (const Json& one : list_of(*value, key)) all.push_back(text_of(one, key));
    return all;
  }
  std::vector<int> sizes(const std::string& key, int most) {
    std::vector<int> all;
    for (const Json& one : list_of(need(key, "a list of whole numbers"), key)) all.push_back(size_of(one, key, most));
    if (all.empty()) refuse({where_, in_quotes(key) + " without numbers", "one at least", ""});
    return all;
  }
  int size_or(const std::string& key, int fallback, int most) {
    const Json* value = find(key);
    return value == nullptr ? fallback : size_of(*value, key, most);
  }
  double number_or(const std::string& key, double fallback, double least, double most) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    const double number = value->is_number() ? value->get<double>() : least - 1.0;
    if (number < least || number > most) wrong(key, *value, fmt::format("a number from {} to {}", least, most));
    return number;
  }
  template <typename Names>
  std::size_t one_of(const std::string& key, const Names& names, std::string_view fallback) {
    const std::string value = text_or(key, std::string(fallback));
    const auto found = std::find(names.begin(), names.end(), value);
    if (found == names.end()) wrong(key, value, fmt::format("one of: {}", fmt::join(names, ", ")));
    return static_cast<std::size_t>(found - names.begin());
  }
  const Json& list_of(const Json& value, const std::string& key) const {
    if (!value.is_array()) wrong(key, value, "a list");
    return value;
  }
  [[noreturn]] void wrong(const std::string& key, const Json& value, const std::string& expected) const {
    refuse({where_, fmt::format("\"{}\": {}", key, value.dump().substr(0, 60)), expected, ""});
  }
  void finish() const {
    for (const auto& [key, value] : object_.items()) {
      if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
      refuse({where_, "the key " + in_quotes(key), fmt::format("one of: {}", fmt::join(known_, ", ")), ""});
    }
  }
  [[nodiscard]] const std::string& where() const { return where_; }

 private:
  std::string text_of(const Json& value, const std::string& key) const {
    if (!value.is_string()) wrong(key, value, "a string");
    return value.get<std::string>();
  }
  int size_of(const Json& value, const std::string& key, int most) const {
    const bool good = value.is_number_integer() && value.get<std::int64_t>() >= 1 && value.get<std::int64_t>() <= most;
    if (!good) wrong(key, value, fmt::format("a whole number from 1 to {}", most));
    return value.get<int>();
  }

  const Json& object_;
  std::string where_;
  std::vector<std::string> known_;
};

ReproLine parse_line(const Json& object, const std::string& where, std::size_t contexts) {
  Fields fields(object, where);
  ReproLine line;
  line.attention = fields.text("attention");
  (void)parse_attention(line.attention, kShorthandDenseLayers + 1);
  line.label = fields.text_or("label", line.attention);
  line.stages = fields.texts("stages");
  const Json* part = fields.find("part");
  if (part != nullptr && !part->is_boolean()) fields.wrong("part", *part, "true or false");
  line.part = part != nullptr && part->get<bool>();
  const Json* paper = fields.find("paper");
  if (paper == nullptr) {
    line.paper.resize(contexts);
  } else {
    for (const Json& value : fields.list_of(*paper, "paper")) {
      if (!value.is_null() && !value.is_number()) fields.wrong("paper", value, "numbers, or null");
      line.paper.push_back(value.is_null() ? std::optional<double>() : value.get<double>());
    }
  }
  if (line.paper.size() != contexts) {
    refuse({where, fmt::format("{} numbers", line.paper.size()), fmt::format("one for each of {} contexts", contexts),
            "write null where the paper prints none"});
  }
  fields.finish();
  return line;
}

ReproPanel parse_panel(const Json& object, const std::string& where) {
  Fields fields(object, where);
  ReproPanel panel;
  panel.name = fields.text("name");
  panel.source = fields.text_or("source", "");
  panel.gpu = fields.text_or("gpu", "");
  panel.measure = static_cast<ReproMeasure>(fields.one_of("measure", kMeasures, kMeasures[0]));
  panel.model = fields.text("model");
  (void)model_config_of(panel.model);
  panel.weights = weight_format_of(fields.text_or("weights", "stored"));
  panel.batch = fields.size_or("batch", 1, kMostBatch);
  const double sigma = fields.number_or("sigma", 2.0, 0.01, 20.0);
  panel.scores = {.sigma = {.least = sigma, .largest = sigma}, .locality = fields.number_or("locality", 0.9, 0.0, 1.0)};
  panel.unit = static_cast<ReproUnit>(fields.one_of("unit", kUnits, kUnits[0]));
  panel.baseline = fields.text_or("baseline", "dense");
  (void)parse_attention(panel.baseline, kShorthandDenseLayers + 1);
  panel.contexts = fields.sizes("contexts", kMostContext);
  int number = 0;
  for (const Json& line : fields.list_of(fields.need("lines", "a list of lines"), "lines")) {
    panel.lines.push_back(parse_line(line, fmt::format("{}, line {}", where, ++number), panel.contexts.size()));
    if (panel.measure == ReproMeasure::kStep && !panel.lines.back().stages.empty()) {
      refuse({where, "stages of a step", "stages of an operator", ""});
    }
  }
  fields.finish();
  return panel;
}

std::string known_experiments() {
  return fmt::format("{}", fmt::join(experiment_names(), ", "));
}

}  // namespace

std::string_view unit_name(ReproUnit unit) {
  return kUnits[static_cast<std::size_t>(unit)];
}

Experiment parse_experiment(const Json& document, const std::string& name, const std::string& source) {
  const std::string where = "reading the experiment " + source;
  Fields fields(document, where);
  Experiment experiment;
  experiment.name = name;
  experiment.title = fields.text("title");
  experiment.paper = fields.text("paper");
  experiment.about = fields.texts("about");
  experiment.limits = fields.texts("limits");
  Fields quick(fields.need("quick", "an object"), where + ", quick");
  experiment.quick_contexts = quick.sizes("contexts", kMostContext);
  experiment.quick_batches = quick.sizes("batches", kMostBatch);
  quick.finish();
  int number = 0;
  for (const Json& panel : fields.list_of(fields.need("panels", "a list of panels"), "panels")) {
    experiment.panels.push_back(parse_panel(panel, fmt::format("{}, panel {}", where, ++number)));
  }
  fields.finish();
  return experiment;
}

std::vector<std::string> experiment_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(configs_folder("repro"))) {
    if (entry.path().extension() == ".json") names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

Experiment load_experiment(const std::string& name) {
  const std::vector<std::string> names = experiment_names();
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    refuse({"looking for the experiment " + in_quotes(name), "none of that name", "one of: " + known_experiments(),
            "`vesper repro list` tells what they are"});
  }
  const std::string path = configs_folder("repro") + "/" + name + ".json";
  return parse_experiment(read_json_file(path), name, path);
}

Experiment quick_part(const Experiment& whole) {
  const auto has = [](const std::vector<int>& all, int one) {
    return std::find(all.begin(), all.end(), one) != all.end();
  };
  Experiment part = whole;
  part.panels.clear();
  for (const ReproPanel& panel : whole.panels) {
    if (!has(whole.quick_batches, panel.batch)) continue;
    ReproPanel kept = panel;
    kept.contexts.clear();
    for (ReproLine& line : kept.lines) line.paper.clear();
    for (std::size_t i = 0; i < panel.contexts.size(); ++i) {
      if (!has(whole.quick_contexts, panel.contexts[i])) continue;
      kept.contexts.push_back(panel.contexts[i]);
      for (std::size_t l = 0; l < kept.lines.size(); ++l) kept.lines[l].paper.push_back(panel.lines[l].paper[i]);
    }
    if (!kept.contexts.empty()) part.panels.push_back(std::move(kept));
  }
  return part;
}

}  // namespace vesper
