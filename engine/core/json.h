// Strict JSON for files that may be hostile: depth-capped, duplicate keys refused.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace vesper {

// Parses one JSON document. `source` names it in messages (a path, or "the header of PATH"). Throws an input error on
// invalid UTF-8, a syntax error, a depth over 64, a key that occurs twice in one object, or trailing bytes.
nlohmann::json parse_json(std::string_view text, const std::string& source);

// Reads a whole file and parses it. Throws an input error where it cannot be read or exceeds `max_bytes`.
nlohmann::json read_json_file(const std::string& path, std::int64_t max_bytes = 256LL << 20);

// A name out of a file, as messages show it: in quotes, control and non-ASCII characters escaped, cut after 100 bytes.
std::string in_quotes(std::string_view name);

}  // namespace vesper
