// Typed, range-checked access to the keys of one config.json.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace vesper {

// A value as messages show it: strings in quotes, all else as JSON, cut after 100 bytes.
std::string config_value_text(const nlohmann::json& value);

// "a, b, c".
std::string listed(const std::vector<std::string>& names);

// Looks into `document`, which must outlive it; `source` names it in messages. Every refusal names the source, the key,
// what was found and what was expected. A key whose default in transformers is None may also be null.
class ConfigKeys {
 public:
  // Refuses a document that is no object.
  ConfigKeys(const nlohmann::json& document, std::string source);

  // nullptr where the key is absent or null.
  [[nodiscard]] const nlohmann::json* find(const std::string& key) const;
  [[nodiscard]] bool has(const std::string& key) const;  // also where it is null

  // The keys of the object under `key`, which must be there.
  [[nodiscard]] ConfigKeys inside(const std::string& key) const;

  // An integer in [least, most]; `fallback` where the key is absent.
  [[nodiscard]] int count(const std::string& key, int fallback, int least, int most) const;
  [[nodiscard]] int integer(const std::string& key, const nlohmann::json& value, int least, int most) const;
  // A number in (above, most]; `fallback` where the key is absent.
  [[nodiscard]] double real(const std::string& key, double fallback, double above, double most) const;
  // The same, where the key must be there.
  [[nodiscard]] double required_real(const std::string& key, double above, double most) const;
  // The same, where null counts as absent.
  [[nodiscard]] double real_or_null(const std::string& key, double fallback, double above, double most) const;
  [[nodiscard]] bool flag(const std::string& key, bool fallback = false) const;

  void must_be_off(const std::string& key, const std::string& why) const;
  void must_be_absent(const std::string& key, const std::string& why) const;

  [[noreturn]] void refuse_key(const std::string& key, const std::string& found, const std::string& expected) const;

  [[nodiscard]] const std::string& source() const { return source_; }

 private:
  [[nodiscard]] double number(const std::string& key, const nlohmann::json& value, double above, double most) const;

  const nlohmann::json& document_;
  std::string source_;
};

}  // namespace vesper
