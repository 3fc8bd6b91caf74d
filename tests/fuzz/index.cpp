// model.safetensors.index.json beside two sound shards: one.safetensors with "a" and "b", two.safetensors with "c".
#include "models/checkpoint.h"
#include "tests/fuzz/fuzz.h"

namespace vesper {
namespace {

void write_shard(const std::string& path, std::initializer_list<const char*> names) {
  const float value = 1.0F;
  std::vector<NamedTensor> tensors;
  for (const char* name : names) tensors.push_back({name, DType::kF32, {1}, &value});
  write_safetensors(path, tensors);
}

}  // namespace

void fuzz(std::string_view input) {
  static const bool ready = [] {
    write_shard(scratch_folder() + "/one.safetensors", {"a", "b"});
    write_shard(scratch_folder() + "/two.safetensors", {"c"});
    return true;
  }();
  promise(ready, "the shards are there");
  scratch_file("model.safetensors.index.json", input);
  const Checkpoint checkpoint = open_checkpoint(scratch_folder());
  for (const auto& [name, tensor] : checkpoint.tensors) {
    promise(tensor->bytes == 4 && tensor->data != nullptr, "a tensor of an index is one of a shard");
  }
}

}  // namespace vesper
