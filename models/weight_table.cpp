#include "models/weight_table.h"

#include <algorithm>
#include <cassert>
#include <type_traits>
#include <utility>

namespace vesper {
namespace {

constexpr std::int64_t kAlignment = 256;  // what cudaMalloc gives, and more than any vector load asks for

std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

void store(TensorRef& to, const PlacedWeight& placed) {
  to = placed.tensor;
}

void store(LinearWeight& to, const PlacedWeight& placed) {
  if (placed.int4.data != nullptr) {
    to.int4 = placed.int4;
    return;
  }
  const TensorRef& tensor = placed.tensor;
  if (to.count > 0) {
    TensorRef& last = to.blocks[static_cast<std::size_t>(to.count - 1)];
    if (static_cast<std::byte*>(last.data) + last.bytes() == tensor.data && last.dtype == tensor.dtype) {
      last.shape[0] += tensor.shape[0];
      return;
    }
  }
  to.blocks.at(static_cast<std::size_t>(to.count++)) = tensor;
}

template <auto Member>
void into(ModelWeights& weights, int layer, const PlacedWeight& placed) {
  if constexpr (std::is_invocable_v<decltype(Member), ModelWeights&>) {
    store(weights.*Member, placed);
  } else {
    store(weights.layers[static_cast<std::size_t>(layer)].*Member, placed);
  }
}

using enum Extent;
using enum ShardRule;
using Layer = LayerWeights;
using Model = ModelWeights;

// Source: transformers, models/llama/modeling_llama.py, the parameters of LlamaForCausalLM. Shards: Shoeybi et al.,
// "Megatron-LM", arXiv 1909.08053, section 3: heads and ffn are split; embedding and head stay whole.
constexpr std::array<WeightRule, 12> kLlama = {{
    {"model.embed_tokens.weight", {kVocab, kHidden}, kNone, into<&Model::embedding>},
    {"model.layers.{}.input_layernorm.weight", {kHidden, kAbsent}, kNone, into<&Layer::attention_norm>},
    {"model.layers.{}.self_attn.q_proj.weight", {kQRows, kHidden}, kRows, into<&Layer::qkv>},
    {"model.layers.{}.self_attn.k_proj.weight", {kKvRows, kHidden}, kRows, into<&Layer::qkv>},
    {"model.layers.{}.self_attn.v_proj.weight", {kKvRows, kHidden}, kRows, into<&Layer::qkv>},
    {"model.layers.{}.self_attn.o_proj.weight", {kHidden, kQRows}, kColumns, into<&Layer::o>},
    {"model.layers.{}.post_attention_layernorm.weight", {kHidden, kAbsent}, kNone, into<&Layer::ffn_norm>},
    {"model.layers.{}.mlp.gate_proj.weight", {kFfn, kHidden}, kRows, into<&Layer::gate_up>},
    {"model.layers.{}.mlp.up_proj.weight", {kFfn, kHidden}, kRows, into<&Layer::gate_up>},
    {"model.layers.{}.mlp.down_proj.weight", {kHidden, kFfn}, kColumns, into<&Layer::down>},
    {"model.norm.weight", {kHidden, kAbsent}, kNone, into<&Model::final_norm>},
    {"lm_head.weight", {kVocab, kHidden}, kNone, into<&Model::head>},
}};
constexpr const WeightRule* kHead = &kLlama.back();

constexpr std::array<std::string_view, 6> kWords = {"vocab", "hidden", "q_rows", "kv_rows", "ffn", ""};  // by Extent

std::string_view word(Extent extent) {
  return kWords[static_cast<std::size_t>(extent)];
}

std::int64_t size_of(Extent extent, const ModelConfig& config) {
  switch (extent) {
    case kVocab:
      return config.vocab;
    case kHidden:
      return config.hidden;
    case kQRows:
      return config.q_rows();
    case kKvRows:
      return config.kv_rows();
    case kFfn:
      return config.ffn;
    case kAbsent:
      break;
  }
  return 1;
}

ExpectedWeight expect(const WeightRule& rule, int layer, const ModelConfig& config) {
  ExpectedWeight expected{&rule, layer, std::string(rule.name), {}};
  if (rule.is_per_layer()) expected.name.replace(rule.name.find("{}"), 2, std::to_string(layer));
  for (const Extent extent : rule.shape) {
    if (extent != kAbsent) expected.shape.push_back(size_of(extent, config));
  }
  return expected;
}

}  // namespace

std::span<const WeightRule> llama_weight_table() {
  return kLlama;
}

std::int64_t ExpectedWeight::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

std::string ExpectedWeight::shape_in_words() const {
  std::string text;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    text += (d == 0 ? "[" : ", ") + std::string(word(rule->shape[d])) + " " + std::to_string(shape[d]);
  }
  return text + "]";
}

std::vector<ExpectedWeight> expected_weights(const ModelConfig& config) {
  std::vector<ExpectedWeight> all;
  for (std::size_t row = 0; row < kLlama.size();) {
    if (!kLlama[row].is_per_layer()) {
      if (&kLlama[row] != kHead || !config.tied_embeddings) all.push_back(expect(kLlama[row], 0, config));
      ++row;
      continue;
    }
    std::size_t end = row;  // of the rows that each layer has
    while (kLlama[end].is_per_layer()) ++end;
    for (int l = 0; l < config.layers; ++l) {
      for (std::size_t r = row; r < end; ++r) all.push_back(expect(kLlama[r], l, config));
    }
    row = end;
  }
  return all;
}

WeightsLayout lay_out(std::span<const ExpectedWeight> expected, DType dtype, Int4Layout int4) {
  WeightsLayout layout;
  layout.dtype = dtype;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (int4.replaces(i)) {
      layout.offsets.push_back(0);
      continue;
    }
    const bool continues = i > 0 && expected[i].rule->destination == expected[i - 1].rule->destination;
    if (!continues) layout.bytes = aligned(layout.bytes);
    layout.offsets.push_back(layout.bytes);
    layout.bytes += expected[i].elements() * dtype_bytes(dtype);
  }
  if (int4.bytes > 0) {
    layout.int4_offset = aligned(layout.bytes);
    layout.bytes = layout.int4_offset + int4.bytes;
  }
  layout.int4 = std::move(int4);
  return layout;
}

PlacedWeight laid_out_weight(const WeightsLayout& layout, std::span<const ExpectedWeight> expected, std::size_t i,
                             void* buffer) {
  auto* start = static_cast<std::byte*>(buffer);
  PlacedWeight placed;
  if (const Int4Part* part = layout.int4.of(i)) placed.int4 = part->matrix(start + layout.int4_offset);
  if (layout.int4.replaces(i)) return placed;
  void* data = start + layout.offsets[i];
  const std::vector<std::int64_t>& shape = expected[i].shape;
  placed.tensor =
      shape.size() == 1 ? tensor_ref(data, layout.dtype, shape[0]) : tensor_ref(data, layout.dtype, shape[0], shape[1]);
  return placed;
}

ModelWeights place_weights(const ModelConfig& config, std::span<const ExpectedWeight> expected,
                           std::span<const PlacedWeight> placed) {
  assert(expected.size() == placed.size());
  ModelWeights weights;
  weights.layers.resize(static_cast<std::size_t>(config.layers));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    expected[i].rule->destination(weights, expected[i].layer, placed[i]);
    weights.bytes += placed[i].tensor.bytes();
    const bool continues = i > 0 && placed[i].int4.data == placed[i - 1].int4.data;
    if (continues || placed[i].int4.data == nullptr) continue;
    weights.bytes += placed[i].int4.bytes();
    weights.panel_bytes =
        std::max(weights.panel_bytes, LinearContext::panel_bytes(placed[i].int4.rows, placed[i].int4.columns));
  }
  if (config.tied_embeddings) store(weights.head, placed.front());
  weights.dtype = weights.embedding.dtype;
  return weights;
}

}  // namespace vesper
