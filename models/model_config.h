// The facts of a model that its config.json states.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "engine/core/dtype.h"
#include "models/rope.h"

namespace vesper {

// Shape and constants of a Llama-style decoder, in the project's words (docs/glossary.md).
struct ModelConfig {
  std::string architecture;
  int layers = 0;
  int hidden = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int ffn = 0;
  int vocab = 0;
  float rms_eps = 0.0F;
  RopeConfig rope;
  int max_positions = 0;  // max_position_embeddings as it stands: no factor of a scaling enters
  bool tied_embeddings = false;
  DType dtype = DType::kBf16;  // torch_dtype; the weights' own dtypes are read from the files
  int bos_id = -1;             // -1: none
  std::vector<int> eos_ids;

  [[nodiscard]] int q_rows() const { return heads * head_dim; }
  [[nodiscard]] int kv_rows() const { return kv_heads * head_dim; }
  // Weights of the decoder, embedding and head (once where tied), in elements.
  [[nodiscard]] std::int64_t parameters() const;
};

// Reads a config.json. Absent keys take the family's defaults in transformers (models/families.h); unknown keys are
// ignored, as there; what changes the mathematics and is not supported (a sliding window, biases, another activation or
// architecture) is refused by name. `source` names the document in messages. Throws input errors.
ModelConfig parse_model_config(const nlohmann::json& document, const std::string& source);

// FOLDER/config.json; the eos ids of FOLDER/generation_config.json take the place of its own, where that file names
// any.
ModelConfig load_model_config(const std::string& folder);

// The folder configs/NAME that comes with vesper: in VESPER_CONFIGS, beside the binary (../configs, ../../configs), or
// in the source tree the binary was built from. Throws an input error where it is in none of them.
std::string configs_folder(const std::string& name);

// The shapes under configs/models: `name` as in synthetic:NAME. An unknown name lists the known ones.
ModelConfig synthetic_model_config(const std::string& name);

}  // namespace vesper
