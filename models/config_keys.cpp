#include "models/config_keys.h"

#include <nlohmann/json.hpp>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {

using Json = nlohmann::json;

std::string config_value_text(const Json& value) {
  return value.is_string() ? in_quotes(value.get<std::string>()) : value.dump(-1, ' ', true).substr(0, 100);
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

ConfigKeys::ConfigKeys(const Json& document, std::string source) : document_(document), source_(std::move(source)) {
  if (!document.is_object()) {
    refuse({"reading " + source_, std::string("JSON of type ") + document.type_name(), "an object",
            "take the config.json that belongs to the weights"});
  }
}

const Json* ConfigKeys::find(const std::string& key) const {
  const auto found = document_.find(key);
  return found == document_.end() || found->is_null() ? nullptr : &*found;
}

bool ConfigKeys::has(const std::string& key) const {
  return document_.contains(key);
}

ConfigKeys ConfigKeys::inside(const std::string& key) const {
  const Json& value = document_.at(key);
  if (!value.is_object()) refuse_key(key, config_value_text(value), "an object or null");
  return {value, source_ + ", key " + in_quotes(key)};
}

int ConfigKeys::count(const std::string& key, int fallback, int least, int most) const {
  const auto found = document_.find(key);
  return found == document_.end() ? fallback : integer(key, *found, least, most);
}

int ConfigKeys::integer(const std::string& key, const Json& value, int least, int most) const {
  const bool good = value.is_number_integer() && value >= least && value <= most;
  if (!good) {
    refuse_key(key, config_value_text(value),
               "an integer from " + std::to_string(least) + " to " + std::to_string(most));
  }
  return value.get<int>();
}

double ConfigKeys::number(const std::string& key, const Json& value, double above, double most) const {
  const bool good = value.is_number() && value.get<double>() > above && value.get<double>() <= most;
  if (!good) {
    refuse_key(key, config_value_text(value),
               "a number above " + Json(above).dump() + ", at most " + Json(most).dump());
  }
  return value.get<double>();
}

double ConfigKeys::real(const std::string& key, double fallback, double above, double most) const {
  const auto found = document_.find(key);
  return found == document_.end() ? fallback : number(key, *found, above, most);
}

double ConfigKeys::required_real(const std::string& key, double above, double most) const {
  const auto found = document_.find(key);
  if (found == document_.end()) refuse_key(key, "no such key", "a number above " + Json(above).dump());
  return number(key, *found, above, most);
}

double ConfigKeys::real_or_null(const std::string& key, double fallback, double above, double most) const {
  const Json* found = find(key);
  return found == nullptr ? fallback : number(key, *found, above, most);
}

bool ConfigKeys::flag(const std::string& key, bool fallback) const {
  const auto found = document_.find(key);
  if (found == document_.end()) return fallback;
  if (!found->is_boolean()) refuse_key(key, config_value_text(*found), "true or false");
  return found->get<bool>();
}

void ConfigKeys::must_be_off(const std::string& key, const std::string& why) const {
  if (flag(key)) refuse_key(key, "true", "false: " + why);
}

void ConfigKeys::must_be_absent(const std::string& key, const std::string& why) const {
  if (const Json* value = find(key); value != nullptr) {
    refuse_key(key, config_value_text(*value), "no such key: " + why);
  }
}

void ConfigKeys::refuse_key(const std::string& key, const std::string& found, const std::string& expected) const {
  refuse({"reading " + source_ + ", key " + in_quotes(key), found, expected, ""});
}

}  // namespace vesper
