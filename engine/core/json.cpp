#include "engine/core/json.h"

#include <fstream>
#include <set>
#include <vector>

#include "engine/core/error.h"

namespace vesper {
namespace {

constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxQuotedBytes = 100;

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& source) {
  using Json = nlohmann::json;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto guard = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxDepth) {
      refuse({"reading " + source, "JSON nested deeper than " + std::to_string(kMaxDepth) + " levels",
              "a flat document", "replace the file by a sound copy"});
    }
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(parsed.get<std::string>()).second) {
      refuse({"reading " + source, "the key " + in_quotes(parsed.get<std::string>()) + " twice in one object",
              "each key once", "remove one of the two"});
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), guard);
  } catch (const Json::exception& error) {
    std::string reason = error.what();  // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    if (const std::size_t end = reason.find("] "); end != std::string::npos) reason = reason.substr(end + 2);
    refuse({"reading " + source, reason, "one JSON document in UTF-8", "replace the file by a sound copy"});
  }
}

nlohmann::json read_json_file(const std::string& path, std::int64_t max_bytes) {
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
