#include "models/weights.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "models/checkpoint.h"
#include "models/uploader.h"
#include "models/weight_table.h"

namespace vesper {
namespace {

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

DType device_dtype(DType stored, DeviceKind device) {
  return device == DeviceKind::kCuda && stored == DType::kF32 ? DType::kBf16 : stored;
}

// Of all that is read: a tied head is quantised from a second reading of the embedding.
std::int64_t bytes_to_read(const Match& match, const Int4Layout& int4) {
  std::int64_t total = 0;
  for (const StoredTensor* stored : match.stored) total += stored->bytes;
  for (const Int4Part& part : int4.parts) {
    if (part.beside) total += match.stored[part.weight]->bytes;
  }
  return total;
}

[[maybe_unused]] ModelWeights load_on_cuda(const Match& match, const ModelConfig& config, const Exec& exec,
                                           WeightFormat format, const Progress& progress) {
  const WeightsLayout layout = lay_out(match.expected, device_dtype(match.dtype, DeviceKind::kCuda),
                                       lay_out_int4(match.expected, config.tied_embeddings, format));
  Buffer storage(Memory::kDevice, layout.bytes, "the weights");
  std::vector<PlacedWeight> placed;
  Uploader uploader(exec, progress, bytes_to_read(match, layout.int4), !layout.int4.parts.empty());
  for (std::size_t i = 0; i < match.expected.size(); ++i) {
    placed.push_back(laid_out_weight(layout, match.expected, i, storage.data()));
    if (!layout.int4.replaces(i)) uploader.upload(*match.stored[i], placed.back().tensor);
    if (const Int4Part* part = layout.int4.of(i)) {
      if (part->first_row == 0) clear_int4_padding(exec, placed.back().int4);
      uploader.quantise(*match.stored[i], part->first_row, placed.back().int4);
    }
  }
  uploader.finish();
  ModelWeights weights = place_weights(config, match.expected, placed);
  weights.storage = std::move(storage);
  return weights;
}

bool is_aligned(const StoredTensor& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.data) % static_cast<std::uintptr_t>(dtype_bytes(tensor.dtype)) == 0;
}

TensorRef tensor_at(void* data, const StoredTensor& stored) {
  return stored.shape.size() == 1 ? tensor_ref(data, stored.dtype, stored.shape[0])
                                  : tensor_ref(data, stored.dtype, stored.shape[0], stored.shape[1]);
}

// A tensor in panels of rows, so that progress shows.
void quantise_on_cpu(const TensorRef& from, std::int64_t first_row, const Int4Matrix& to,
                     const std::function<void(std::int64_t)>& on_bytes) {
  const std::int64_t row_bytes = from.bytes() / from.shape[0];
  const std::int64_t panel_rows = std::max<std::int64_t>(1, kStagingBytes / row_bytes);
  for (std::int64_t r = 0; r < from.shape[0]; r += panel_rows) {
    TensorRef panel = from;
    panel.data = static_cast<std::byte*>(from.data) + r * row_bytes;
    panel.shape[0] = std::min(panel_rows, from.shape[0] - r);
    cpu::quantise_int4(panel, first_row + r, to);
    on_bytes(panel.bytes());
  }
}

// Where each tensor lies in the file, or quantised from there. A header of odd length leaves tensors that are not
// aligned for their type; those are copied.
ModelWeights load_on_cpu(Checkpoint checkpoint, const Match& match, const ModelConfig& config, WeightFormat format,
                         const Progress& progress) {
  const Int4Layout int4 = lay_out_int4(match.expected, config.tied_embeddings, format);
  std::int64_t copied_bytes = 0;
  std::int64_t total_bytes = 0;  // to quantise
  for (std::size_t i = 0; i < match.stored.size(); ++i) {
    const StoredTensor& stored = *match.stored[i];
    if (!is_aligned(stored)) copied_bytes += stored.bytes + dtype_bytes(DType::kF32);
    if (int4.of(i) != nullptr) total_bytes += stored.bytes;
  }
  Buffer storage(Memory::kHost, int4.bytes + copied_bytes, "weights that are quantised or unaligned");
  auto* free = static_cast<std::byte*>(storage.data()) + int4.bytes;
  std::int64_t done_bytes = 0;
  const auto quantised = [&](std::int64_t bytes) {
    done_bytes += bytes;
    if (progress) progress(done_bytes, total_bytes);
  };
  std::vector<PlacedWeight> placed;
  for (std::size_t i = 0; i < match.stored.size(); ++i) {
    const StoredTensor& stored = *match.stored[i];
    // TensorRef views what may be written elsewhere; weights are only read.
    void* data = const_cast<std::byte*>(stored.data);
    if (!is_aligned(stored)) {
      std::memcpy(free, stored.data, static_cast<std::size_t>(stored.bytes));
      data = free;
      free += (stored.bytes + 3) / 4 * 4;
    }
    PlacedWeight& weight = placed.emplace_back();
    const TensorRef tensor = tensor_at(data, stored);
    if (!int4.replaces(i)) weight.tensor = tensor;
    if (const Int4Part* part = int4.of(i)) {
      weight.int4 = part->matrix(storage.data());
      if (part->first_row == 0) cpu::clear_int4_padding(weight.int4);
      quantise_on_cpu(tensor, part->first_row, weight.int4, quantised);
    }
  }
  ModelWeights weights = place_weights(config, match.expected, placed);
  weights.files = std::move(checkpoint.files);
  weights.storage = std::move(storage);
  return weights;
}

// Of the panels that CUDA's products of many rows want.
std::int64_t linear_panel_bytes(const Int4Layout& int4, DeviceKind device) {
  std::int64_t most = 0;
  for (const Int4Part& part : int4.parts) most = std::max(most, LinearContext::panel_bytes(part.rows, part.columns));
  return device == DeviceKind::kCuda ? most : 0;
}

}  // namespace

WeightsPlan plan_weights(const std::string& folder, const ModelConfig& config, DeviceKind device, WeightFormat format) {
  const Checkpoint checkpoint = open_checkpoint(folder);
  const Match match = match_checkpoint(checkpoint, config);
  Int4Layout int4 = lay_out_int4(match.expected, config.tied_embeddings, format);
  WeightsPlan plan;
  plan.dtype = device_dtype(match.dtype, device);
  plan.panel_bytes = linear_panel_bytes(int4, device);
  if (device == DeviceKind::kCuda) {
    plan.device_bytes = lay_out(match.expected, plan.dtype, std::move(int4)).bytes;
    return plan;
  }
  plan.device_bytes = int4.bytes;
  for (std::size_t i = 0; i < match.stored.size(); ++i) {
    if (!int4.replaces(i)) plan.device_bytes += match.stored[i]->bytes;
  }
  return plan;
}

WeightsPlan plan_synthetic_weights(const ModelConfig& config, DeviceKind device, WeightFormat format) {
  const std::vector<ExpectedWeight> expected = expected_weights(config);
  Int4Layout int4 = lay_out_int4(expected, config.tied_embeddings, format);
  WeightsPlan plan;
  plan.dtype = device_dtype(config.dtype, device);
  plan.panel_bytes = linear_panel_bytes(int4, device);
  plan.device_bytes = lay_out(expected, plan.dtype, std::move(int4)).bytes;
  return plan;
}

ModelWeights load_weights(const std::string& folder, const ModelConfig& config, const Exec& exec,
                          const Progress& progress, WeightFormat format) {
  Checkpoint checkpoint = open_checkpoint(folder);
  const Match match = match_checkpoint(checkpoint, config);
  log_ignored(checkpoint, match);
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return load_on_cuda(match, config, exec, format, progress);
  }
  return load_on_cpu(std::move(checkpoint), match, config, format, progress);
}

}  // namespace vesper
