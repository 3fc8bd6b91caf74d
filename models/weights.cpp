#include "models/weights.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "engine/core/parallel.h"
#include "engine/core/stream.h"
#include "models/checkpoint.h"
#include "models/weight_table.h"

namespace vesper {
namespace {

// Two of these: large enough that a copy over PCIe (some 50 GB/s) takes longer than its launch, small beside the model.
constexpr std::int64_t kStagingBytes = 32LL << 20;
constexpr std::int64_t kConvertGrain = 1LL << 16;  // elements; 128 KiB and more of one thread's reading
constexpr std::size_t kNamesInMessage = 3;

// The tensors of a checkpoint in the order of the table.
struct Match {
  std::vector<ExpectedWeight> expected;
  std::vector<const StoredTensor*> stored;  // one an expected weight
  DType dtype = DType::kF32;                // of the matrices
  int inv_freqs = 0;                        // ignored
  bool ignored_head = false;
};

std::string some_of(const std::vector<std::string>& names) {
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), kNamesInMessage); ++i) {
    text += (i == 0 ? "" : ", ") + in_quotes(names[i]);
  }
  if (names.size() > kNamesInMessage) text += " and " + std::to_string(names.size() - kNamesInMessage) + " more";
  return text;
}

std::string shape_text(const StoredTensor& tensor) {
  std::string text;
  for (const std::int64_t extent : tensor.shape) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + text + "]";
}

bool is_floating(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBf16 || dtype == DType::kF16;
}

// All names there, none too many, but for two kinds: old files store the rotary frequencies, which follow from the
// config, and some store a tied head again.
void match_names(const Checkpoint& checkpoint, const ModelConfig& config, Match& match) {
  std::vector<std::string> missing;
  std::map<std::string, const StoredTensor*> rest = checkpoint.tensors;
  for (const ExpectedWeight& weight : match.expected) {
    const auto found = rest.find(weight.name);
    if (found == rest.end()) {
      missing.push_back(weight.name);
      continue;
    }
    match.stored.push_back(found->second);
    rest.erase(found);
  }
  std::vector<std::string> extra;
  for (const auto& [name, tensor] : rest) {
    if (name.ends_with(".rotary_emb.inv_freq")) {
      ++match.inv_freqs;
    } else if (name == "lm_head.weight" && config.tied_embeddings) {
      match.ignored_head = true;
    } else {
      extra.push_back(name);
    }
  }
  const std::string doing = "loading the weights in " + checkpoint.folder;
  const std::string change = "check that config.json belongs to these files";
  if (!missing.empty()) refuse({doing, "no tensor " + some_of(missing), "every tensor of the model", change});
  if (!extra.empty()) refuse({doing, "the tensor " + some_of(extra), "only tensors of the model", change});
}

void check_shapes_and_types(const Checkpoint& checkpoint, Match& match) {
  match.dtype = match.stored.front()->dtype;  // the embedding's
  for (std::size_t i = 0; i < match.expected.size(); ++i) {
    const ExpectedWeight& weight = match.expected[i];
    const StoredTensor& stored = *match.stored[i];
    const std::string doing = "loading the weights in " + checkpoint.folder + ", tensor " + in_quotes(weight.name);
    if (stored.shape != weight.shape) {
      refuse({doing, "shape " + shape_text(stored), weight.shape_in_words() + " by config.json",
              "check that config.json belongs to these files"});
    }
    if (!is_floating(stored.dtype)) {
      refuse({doing, "type " + std::string(dtype_name(stored.dtype)), "f32, bf16 or f16", "convert the checkpoint"});
    }
    if (weight.rule->is_matrix() && stored.dtype != match.dtype) {
      refuse({doing, "type " + std::string(dtype_name(stored.dtype)),
              std::string(dtype_name(match.dtype)) + " as in " + in_quotes(match.expected.front().name) +
                  ": all matrices share one type",
              "convert the checkpoint to one type"});
    }
  }
}

Match match_checkpoint(const Checkpoint& checkpoint, const ModelConfig& config) {
  Match match;
  match.expected = expected_weights(config);
  match_names(checkpoint, config, match);
  check_shapes_and_types(checkpoint, match);
  return match;
}

void log_ignored(const Checkpoint& checkpoint, const Match& match) {
  std::string what;
  if (match.inv_freqs > 0)
    what = std::to_string(match.inv_freqs) + " rotary_emb.inv_freq (they follow from config.json)";
  if (match.ignored_head) what += std::string(what.empty() ? "" : " and ") + "lm_head.weight (tied to the embedding)";
  if (!what.empty()) spdlog::info("{}: ignoring {}", checkpoint.folder, what);
}

template <typename From, typename To>
void convert_range(const std::byte* from, std::byte* to, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {  // memcpy: `from` need not be aligned
    From value{};
    std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof(From)), sizeof(From));
    const To converted = from_float<To>(to_float(value));
    std::memcpy(to + i * static_cast<std::int64_t>(sizeof(To)), &converted, sizeof(To));
  }
}

using ConvertRange = void (*)(const std::byte*, std::byte*, std::int64_t, std::int64_t);

ConvertRange converter(DType from, DType to) {
  assert(to == DType::kBf16 || to == DType::kF16);
  const bool to_bf16 = to == DType::kBf16;
  switch (from) {
    case DType::kF32:
      return to_bf16 ? convert_range<float, bf16> : convert_range<float, f16>;
    case DType::kF16:
      return to_bf16 ? convert_range<f16, bf16> : convert_range<f16, f16>;
    default:
      return to_bf16 ? convert_range<bf16, bf16> : convert_range<bf16, f16>;
  }
}

// Reads, and converts where the types differ, on all CPU threads; this is also what brings the file into memory.
void convert(const std::byte* from, DType from_type, std::byte* to, DType to_type, std::int64_t elements) {
  const ConvertRange range = from_type == to_type ? nullptr : converter(from_type, to_type);
  parallel_for(elements, kConvertGrain, [=](std::int64_t begin, std::int64_t end) {
    if (range != nullptr) return range(from, to, begin, end);
    const std::int64_t size = dtype_bytes(from_type);
    std::memcpy(to + begin * size, from + begin * size, static_cast<std::size_t>((end - begin) * size));
  });
}

// Host to device through two pinned buffers: while one is copied, the other is filled.
class Uploader {
 public:
  Uploader(const Exec& exec, const Progress& progress, std::int64_t total_bytes)
      : exec_(exec), progress_(progress), total_bytes_(total_bytes) {}

  void upload(const StoredTensor& from, const TensorRef& to) {
    const std::int64_t from_size = dtype_bytes(from.dtype);
    const std::int64_t to_size = dtype_bytes(to.dtype);
    const std::int64_t step = kStagingBytes / to_size;
    for (std::int64_t first = 0; first < to.size(); first += step) {
      const std::int64_t count = std::min(step, to.size() - first);
      Slot& slot = slots_[turn_++ % slots_.size()];
      slot.copied.synchronize();  // at once where it has not been used yet
      auto* staged = static_cast<std::byte*>(slot.staging.data());
      convert(from.data + first * from_size, from.dtype, staged, to.dtype, count);
      copy_bytes(exec_, static_cast<std::byte*>(to.data) + first * to_size, staged, count * to_size);
      slot.copied.record(exec_);
      done_bytes_ += count * from_size;
      if (progress_) progress_(done_bytes_, total_bytes_);
    }
  }

  void finish() const {
    for (const Slot& slot : slots_) slot.copied.synchronize();
  }

 private:
  struct Slot {
    Buffer staging{Memory::kPinned, kStagingBytes, "a staging buffer for weights"};
    Event copied;
  };

  Exec exec_;
  const Progress& progress_;
  std::int64_t total_bytes_;
  std::int64_t done_bytes_ = 0;
  std::size_t turn_ = 0;
  std::array<Slot, 2> slots_;
};

DType device_dtype(DType stored, DeviceKind device) {
  return device == DeviceKind::kCuda && stored == DType::kF32 ? DType::kBf16 : stored;
}

ModelWeights load_on_cuda(const Match& match, const ModelConfig& config, const Exec& exec, const Progress& progress) {
  const WeightsLayout layout = lay_out(match.expected, device_dtype(match.dtype, DeviceKind::kCuda));
  std::int64_t total_bytes = 0;
  for (const StoredTensor* stored : match.stored) total_bytes += stored->bytes;

  Buffer storage(Memory::kDevice, layout.bytes, "the weights");
  std::vector<TensorRef> tensors;
  Uploader uploader(exec, progress, total_bytes);
  for (std::size_t i = 0; i < match.expected.size(); ++i) {
    tensors.push_back(laid_out_tensor(layout, match.expected, i, storage.data()));
    uploader.upload(*match.stored[i], tensors.back());
  }
  uploader.finish();
  ModelWeights weights = place_weights(config, match.expected, tensors);
  weights.storage = std::move(storage);
  return weights;
}

bool is_aligned(const StoredTensor& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.data) % static_cast<std::uintptr_t>(dtype_bytes(tensor.dtype)) == 0;
}

// Where each tensor lies in the file. A header of odd length leaves tensors that are not aligned for their type; those
// are copied.
ModelWeights load_on_cpu(Checkpoint checkpoint, const Match& match, const ModelConfig& config) {
  std::int64_t copied_bytes = 0;
  for (const StoredTensor* stored : match.stored) {
    if (!is_aligned(*stored)) copied_bytes += stored->bytes + dtype_bytes(DType::kF32);
  }
  Buffer storage(Memory::kHost, copied_bytes, "unaligned weights");
  auto* free = static_cast<std::byte*>(storage.data());
  std::vector<TensorRef> tensors;
  for (const StoredTensor* stored : match.stored) {
    // TensorRef views what may be written elsewhere; weights are only read.
    void* data = const_cast<std::byte*>(stored->data);
    if (!is_aligned(*stored)) {
      std::memcpy(free, stored->data, static_cast<std::size_t>(stored->bytes));
      data = free;
      free += (stored->bytes + 3) / 4 * 4;
    }
    tensors.push_back(stored->shape.size() == 1 ? tensor_ref(data, stored->dtype, stored->shape[0])
                                                : tensor_ref(data, stored->dtype, stored->shape[0], stored->shape[1]));
  }
  ModelWeights weights = place_weights(config, match.expected, tensors);
  weights.files = std::move(checkpoint.files);
  weights.storage = std::move(storage);
  return weights;
}

}  // namespace

WeightsPlan plan_weights(const std::string& folder, const ModelConfig& config, DeviceKind device) {
  const Checkpoint checkpoint = open_checkpoint(folder);
  const Match match = match_checkpoint(checkpoint, config);
  WeightsPlan plan;
  plan.dtype = device_dtype(match.dtype, device);
  if (device == DeviceKind::kCuda) {
    plan.device_bytes = lay_out(match.expected, plan.dtype).bytes;
  } else {
    for (const StoredTensor* stored : match.stored) plan.device_bytes += stored->bytes;
  }
  return plan;
}

WeightsPlan plan_synthetic_weights(const ModelConfig& config, DeviceKind device) {
  const DType dtype = device_dtype(config.dtype, device);
  return {dtype, lay_out(expected_weights(config), dtype).bytes};
}

ModelWeights load_weights(const std::string& folder, const ModelConfig& config, const Exec& exec,
                          const Progress& progress) {
  Checkpoint checkpoint = open_checkpoint(folder);
  const Match match = match_checkpoint(checkpoint, config);
  log_ignored(checkpoint, match);
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return load_on_cuda(match, config, exec, progress);
  }
  return load_on_cpu(std::move(checkpoint), match, config);
}

}  // namespace vesper
