// A folder of safetensors files as one set of tensors.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "models/safetensors.h"

namespace vesper {

// Mapped files and their tensors by name; `tensors` looks into `files`. Move-only.
struct Checkpoint {
  std::string folder;
  std::vector<SafetensorsFile> files;
  std::map<std::string, const StoredTensor*> tensors;
};

// Opens FOLDER/model.safetensors, or else the shards that FOLDER/model.safetensors.index.json names. Headers are
// checked, tensors not yet read. Throws input errors: no such files (with the command that converts .bin files), an
// index that is wrong in itself or does not agree with its shards.
Checkpoint open_checkpoint(const std::string& folder);

}  // namespace vesper
