#include "models/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "engine/core/error.h"
#include "engine/core/json.h"

namespace vesper {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

// Whether the folder has an entry of that name, be it a dangling symbolic link: opening that names it.
bool has_entry(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(fs::symlink_status(path, ignored));
}

bool has_pytorch_files(const fs::path& folder) {
  std::error_code ignored;
  return std::any_of(fs::directory_iterator(folder, ignored), fs::directory_iterator(), [](const auto& entry) {
    const fs::path extension = entry.path().extension();
    return extension == ".bin" || extension == ".pt" || extension == ".pth";
  });
}

[[noreturn]] void refuse_without_weights(const std::string& folder) {
  const std::string doing = "opening the weights in " + folder;
  const std::string expected = std::string(kSingle) + " or " + kIndex;
  if (!has_pytorch_files(folder)) refuse({doing, "neither of the two", expected, "check the path"});
  refuse({doing, "only PyTorch files, which can run code when they are loaded", expected,
          "convert them where they are trusted: python3 -c \"import transformers as t; "
          "t.AutoModelForCausalLM.from_pretrained('" +
              folder + "', torch_dtype='auto').save_pretrained('" + folder + "')\""});
}

// A shard's name stays inside the folder.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

// Tensor name to shard name, as the index says.
std::map<std::string, std::string> read_index(const std::string& path) {
  const nlohmann::json index = read_json_file(path);
  const bool has_map = index.is_object() && index.contains("weight_map") && index["weight_map"].is_object() &&
                       !index["weight_map"].empty();
  if (!has_map) {
    refuse({"reading " + path, "no \"weight_map\"", "an object of tensor names and shard names",
            "take the index that belongs to the shards"});
  }
  std::map<std::string, std::string> shard_of;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    if (!shard.is_string() || !is_plain_name(shard.get<std::string>())) {
      refuse({"reading " + path + ", tensor " + in_quotes(tensor),
              "the shard " + (shard.is_string() ? in_quotes(shard.get<std::string>()) : shard.dump().substr(0, 100)),
              "the name of a file in the same folder, without path parts", ""});
    }
    shard_of.emplace(tensor, shard.get<std::string>());
  }
  return shard_of;
}

Checkpoint open_shards(const std::string& folder) {
  const std::string index_path = (fs::path(folder) / kIndex).string();
  const std::map<std::string, std::string> shard_of = read_index(index_path);
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : shard_of) shards.insert(shard);

  Checkpoint checkpoint;
  checkpoint.folder = folder;
  for (const std::string& shard : shards) {
    const fs::path path = fs::path(folder) / shard;
    if (!has_entry(path)) {
      refuse({"reading " + index_path, "the shard " + in_quotes(shard) + ", which is not in the folder",
              "all shards there", "download the missing file"});
    }
    const SafetensorsFile& file = checkpoint.files.emplace_back(path.string());
    for (const auto& [name, tensor] : file.tensors()) {
      const auto listed = shard_of.find(name);
      if (listed == shard_of.end() || listed->second != shard) {
        refuse({"reading " + path.string(), "the tensor " + in_quotes(name),
                listed == shard_of.end() ? "only tensors that " + std::string(kIndex) + " lists"
                                         : "it in " + in_quotes(listed->second) + ", as " + kIndex + " says",
                "take the shards and the index from one download"});
      }
      checkpoint.tensors.emplace(name, &tensor);
    }
  }
  for (const auto& [name, shard] : shard_of) {
    if (!checkpoint.tensors.contains(name)) {
      refuse({"reading " + (fs::path(folder) / shard).string(), "no tensor " + in_quotes(name),
              std::string("it there, as ") + kIndex + " says", "take the shards and the index from one download"});
    }
  }
  return checkpoint;
}

}  // namespace

Checkpoint open_checkpoint(const std::string& folder) {
  const fs::path single = fs::path(folder) / kSingle;
  if (!has_entry(single)) {
    if (has_entry(fs::path(folder) / kIndex)) return open_shards(folder);
    refuse_without_weights(folder);
  }
  Checkpoint checkpoint;
  checkpoint.folder = folder;
  const SafetensorsFile& file = checkpoint.files.emplace_back(single.string());
  for (const auto& [name, tensor] : file.tensors()) checkpoint.tensors.emplace(name, &tensor);
  return checkpoint;
}

}  // namespace vesper
