#include "engine/core/json.h"

#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>
#include <vector>

#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr std::size_t kMaxDepth = 64;
constexpr std::size_t kMaxQuotedBytes = 100;

// Builds the document from the parser's events. The library's own builder keeps the last of two equal keys, and a
// callback that looked for them would hold every key twice: a tokenizer has some hundred thousand.
class StrictBuilder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit StrictBuilder(const std::string& source) : source_(source) {}
  nlohmann::json take() && { return std::move(root_); }

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(number_integer_t value) override { return put(value); }
  bool number_unsigned(number_unsigned_t value) override { return put(value); }
  bool number_float(number_float_t value, const string_t& /*digits*/) override { return put(value); }
  bool string(string_t& value) override { return put(std::move(value)); }
  bool binary(binary_t& value) override { return put(std::move(value)); }
  bool start_object(std::size_t /*elements*/) override { return open(nlohmann::json::object()); }
  bool start_array(std::size_t /*elements*/) override { return open(nlohmann::json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    auto& object = open_.back()->get_ref<nlohmann::json::object_t&>();
    const auto [at, is_new] = object.try_emplace(std::move(name));
    if (!is_new) {
      refuse({"reading " + source_, "the key " + in_quotes(at->first) + " twice in one object", "each key once",
              "remove one of the two"});
    }
    value_ = &at->second;
    return true;
  }

  bool parse_error(std::size_t /*position*/, const std::string& /*token*/,
                   const nlohmann::json::exception& error) override {
    std::string reason = error.what();  // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    if (const std::size_t end = reason.find("] "); end != std::string::npos) reason = reason.substr(end + 2);
    refuse({"reading " + source_, reason, "one JSON document in UTF-8", "replace the file by a sound copy"});
  }

 private:
  // Puts a value where the next one belongs, and remembers where that was.
  bool put(nlohmann::json value) {
    if (open_.empty()) {
      value_ = &root_;
    } else if (open_.back()->is_array()) {
      value_ = &open_.back()->get_ref<nlohmann::json::array_t&>().emplace_back();
    }
    *value_ = std::move(value);
    return true;
  }

  bool open(nlohmann::json container) {
    if (open_.size() == kMaxDepth) {
      refuse({"reading " + source_, "JSON nested deeper than " + std::to_string(kMaxDepth) + " levels",
              "a flat document", "replace the file by a sound copy"});
    }
    put(std::move(container));
    open_.push_back(value_);
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& source_;
  nlohmann::json root_;
  nlohmann::json* value_ = nullptr;  // where the last value went, or the next one of an object goes
  std::vector<nlohmann::json*>
      open_;  // containers; none grows while one inside it is open, so these stay where they are
};

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& source) {
  StrictBuilder builder(source);
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return std::move(builder).take();
}

nlohmann::json read_json_file(const std::string& path, std::int64_t max_bytes) {
  // Before it is opened: a folder tells a length of 2^63 - 1, and a named pipe waits for somebody who writes.
  std::error_code ignored;
  const std::filesystem::file_status status = std::filesystem::status(path, ignored);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    refuse({"reading " + path, std::filesystem::is_directory(status) ? "a folder" : "something that is no regular file",
            "a readable JSON file", "check the path"});
  }
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) refuse({"reading " + path, "a file that cannot be opened", "a readable JSON file", "check the path"});
  const std::int64_t bytes = file.tellg();
  if (bytes > max_bytes) {
    refuse({"reading " + path, std::to_string(bytes) + " bytes", "at most " + std::to_string(max_bytes), ""});
  }
  std::string text(static_cast<std::size_t>(std::max<std::int64_t>(bytes, 0)), '\0');
  file.seekg(0);
  if (bytes < 0 || !file.read(text.data(), bytes)) {
    refuse({"reading " + path, "a file that cannot be read", "a readable JSON file", "check the path"});
  }
  return parse_json(text, path);
}

std::string in_quotes(std::string_view name) {
  const nlohmann::json text =
      std::string(name.substr(0, kMaxQuotedBytes)) + (name.size() > kMaxQuotedBytes ? "..." : "");
  return text.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

}  // namespace vesper
