#include "models/decoder.h"

#include <array>

#include "engine/core/stream.h"
#include "models/norm.h"
#include "models/projections.h"
#include "models/rows.h"

namespace vesper {
namespace {

// The activations of a step, each a matrix of one row a token.
enum Slot { kResidual, kNormed, kQkv, kQuery, kAttended, kGateUp, kActivated, kPartial, kSlots };

// Columns of each slot.
std::array<std::int64_t, kSlots> slot_columns(const ModelConfig& config) {
  std::array<std::int64_t, kSlots> columns{};
  columns[kResidual] = config.hidden;
  columns[kNormed] = config.hidden;
  columns[kQkv] = config.q_rows() + 2 * config.kv_rows();
  columns[kQuery] = config.q_rows();
  columns[kAttended] = config.q_rows();
  columns[kGateUp] = std::int64_t{2} * config.ffn;
  columns[kActivated] = config.ffn;
  columns[kPartial] = config.hidden;
  return columns;
}

// A slot's bytes, rounded up so that the next one starts on 256.
std::int64_t slot_bytes(std::int64_t columns, DType dtype, int max_tokens) {
  return (columns * max_tokens * dtype_bytes(dtype) + 255) / 256 * 256;
}

// The sum of all that the blocks have put out so far.
struct ResidualStream {
  TensorRef sum;          // [tokens, hidden]
  TensorRef addend = {};  // what the half before put out, summed over ranks; none before the first block

  // out = the stream with the addend in it, normed: what the next half of a block begins with.
  void enter(const Exec& exec, const TensorRef& norm, float eps, const TensorRef& out) const {
    if (addend.data == nullptr) return rms_norm(exec, sum, norm, eps, out);
    add_rms_norm(exec, sum, addend, norm, eps, sum, out);
  }
};

}  // namespace

std::int64_t Decoder::activation_bytes(const ModelConfig& config, DType dtype, int max_tokens) {
  std::int64_t total = 0;
  for (const std::int64_t columns : slot_columns(config)) total += slot_bytes(columns, dtype, max_tokens);
  return total;
}

Decoder::Decoder(const ModelConfig& config, const ModelWeights& weights, KvCache& cache, int max_tokens, int max_seqs,
                 const Exec& exec)
    : config_(config),
      weights_(weights),
      cache_(cache),
      max_tokens_(max_tokens),
      dtype_(cache.shape().dtype),
      rope_table_(config.rope, config.head_dim, max_seqs, exec),
      activations_(memory_of(exec.device), activation_bytes(config, dtype_, max_tokens), "the activations of a step"),
      linear_(exec.device, weights.panel_bytes) {}

TensorRef Decoder::activation(int slot, std::int64_t rows) const {
  const auto columns = slot_columns(config_);
  auto* data = static_cast<std::byte*>(activations_.data());
  for (int before = 0; before < slot; ++before) {
    data += slot_bytes(columns[static_cast<std::size_t>(before)], dtype_, max_tokens_);
  }
  return tensor_ref(data, dtype_, rows, columns[static_cast<std::size_t>(slot)]);
}

void Decoder::forward(const Exec& exec, ModelAttention& attention, const Batch& batch) {
  const TensorRef normed = activation(kNormed, batch.tokens);
  const TensorRef query = activation(kQuery, batch.tokens);
  const TensorRef attended = activation(kAttended, batch.tokens);
  const TensorRef activated = activation(kActivated, batch.tokens);
  const TensorRef partial = activation(kPartial, batch.tokens);
  const TensorRef qkv = activation(kQkv, batch.tokens);
  const TensorRef gate_up = activation(kGateUp, batch.tokens);
  const Rope rope = rope_table_.rope();
  ResidualStream stream{.sum = activation(kResidual, batch.tokens)};

  gather_rows(exec, weights_.embedding, batch.ids, stream.sum);
  for (int l = 0; l < config_.layers; ++l) {
    const LayerWeights& layer = weights_.layers[static_cast<std::size_t>(l)];
    const LayerKv kv = cache_.layer(l);

    stream.enter(exec, layer.attention_norm, config_.rms_eps, normed);
    project_qkv(exec, linear_, normed, layer.qkv, rope, batch, {.k = kv.k, .v = kv.v}, qkv, query);
    attention.update_tables(exec, l, kv, batch);
    attention.run(exec, l, query, kv, batch, attended);
    linear(exec, linear_, attended, layer.o, partial);
    // `partial` is a rank's share of a sum over ranks; a reduction belongs here, before the residual takes it in.
    stream.addend = partial;

    stream.enter(exec, layer.ffn_norm, config_.rms_eps, normed);
    project_ffn(exec, linear_, normed, layer.gate_up, gate_up, activated);
    linear(exec, linear_, activated, layer.down, partial);
    // And here.
    stream.addend = partial;
  }
  attention.finish_tables(exec, cache_.layers(), batch);
  stream.enter(exec, weights_.final_norm, config_.rms_eps, normed);
}

void Decoder::append_drawn(const Exec& exec, const Batch& batch, const DrawnKv& drawn) {
  const TensorRef qkv = activation(kQkv, batch.tokens);
  const TensorRef query = activation(kQuery, batch.tokens);
  const Rope rope{.inv_freq = drawn.no_turn};
  zero_bytes(exec, qkv.data, qkv.bytes());  // the queries
  for (int l = 0; l < config_.layers; ++l) {
    draw_kv(exec, drawn, l, batch, config_.head_dim, qkv);
    append_kv(exec, qkv, rope, batch, cache_.layer(l), query);
  }
}

void Decoder::logits(const Exec& exec, TensorView<const std::int32_t, 1> rows, const TensorRef& out) {
  const TensorRef chosen = activation(kPartial, rows.shape(0));  // free since the last add_rms_norm
  gather_rows(exec, activation(kNormed, max_tokens_), rows, chosen);
  linear(exec, linear_, chosen, weights_.head, out);
}

void Decoder::logits(const Exec& exec, const TensorRef& out) {
  linear(exec, linear_, activation(kNormed, out.shape[0]), weights_.head, out);
}

}  // namespace vesper
