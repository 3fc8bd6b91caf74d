// What a model folder's generation_config.json says about ending and drawing an answer.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace vesper {

struct GenerationConfig {
  std::vector<int> eos_ids;  // empty: the file names none
  // Whether answers are drawn; the three below count only then. transformers' defaults where a key is absent.
  bool do_sample = false;
  float temperature = 1.0F;
  int top_k = 50;  // 0: all
  float top_p = 1.0F;
  // Keys that would change answers and are not supported, as "repetition_penalty 1.05".
  std::vector<std::string> ignored;
};

// Reads a generation_config.json. Unknown keys are passed over, as Hugging Face does; a known key of another type or
// out of range is refused by name. Ids lie below `vocab`. `source` names the document in messages. Throws input errors.
GenerationConfig parse_generation_config(const nlohmann::json& document, int vocab, const std::string& source);

// FOLDER/generation_config.json; the defaults above where there is none.
GenerationConfig load_generation_config(const std::string& folder, int vocab);

}  // namespace vesper
