// The attention configuration: which backend each layer runs.
#pragma once

#include <string>
#include <vector>

namespace vesper {

// One layer's backend and its settings.
struct BackendConfig {
  std::string backend = "dense";
  bool operator==(const BackendConfig&) const = default;
};

// One entry a layer.
struct AttentionConfig {
  std::vector<BackendConfig> layers;
};

// Reads `--attention FILE|SHORTHAND` for a model of `layers` layers. A shorthand is a backend's name; anything that
// ends in .json or holds a '/' is a file:
//   { "attention": [ { "layers": "all", "backend": "dense" }, { "layers": "2-", "backend": "dense" } ] }
// `layers` is "all" or a comma list of numbers and ranges ("0", "3-5", "2-"); the last rule that matches wins; every
// layer must be covered. Strict: an unknown key, backend, or a layer past the last is an input error that lists what is
// known.
AttentionConfig parse_attention(const std::string& file_or_shorthand, int layers);

}  // namespace vesper
