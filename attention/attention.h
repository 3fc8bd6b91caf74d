// How a model's layers attend: the interface of a backend, and the set of backends that a model runs.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention/attend.h"
#include "attention/config.h"
#include "engine/core/buffer.h"

namespace vesper {

// The largest step that attention must serve, and on what; scratch is sized by it when a backend is built.
struct AttentionLimits {
  AttentionShape shape;
  DeviceKind device = DeviceKind::kCpu;
  int max_seqs = 1;
  int max_context = 0;  // tokens a sequence
};

// Decides which cached keys a decode step reads, and reads them. One instance serves all layers that share its
// settings. Not thread-safe; one instance a rank.
class AttentionBackend {
 public:
  AttentionBackend() = default;
  virtual ~AttentionBackend() = default;
  AttentionBackend(const AttentionBackend&) = delete;
  AttentionBackend& operator=(const AttentionBackend&) = delete;
  AttentionBackend(AttentionBackend&&) = delete;
  AttentionBackend& operator=(AttentionBackend&&) = delete;

  // Host work of one decode step, before its first layer.
  virtual void plan(const Batch& batch) = 0;

  // Device work of one layer; K and V of this step are in the cache already. No host reads, no allocation.
  //   q, out [seqs, heads * head_dim];  lse [seqs, heads] is written where its data is not null
  virtual void run(const Exec& exec, int layer, const TensorRef& q, const LayerKv& kv, const Batch& batch,
                   const TensorRef& out, TensorView<float, 2> lse) = 0;
};

// Attention over every cached key.
class DenseAttention final : public AttentionBackend {
 public:
  // Device memory of the split partials.
  static std::int64_t scratch_bytes(const AttentionLimits& limits);

  explicit DenseAttention(const AttentionLimits& limits);
  void plan(const Batch& batch) override;
  void run(const Exec& exec, int layer, const TensorRef& q, const LayerKv& kv, const Batch& batch, const TensorRef& out,
           TensorView<float, 2> lse) override;

 private:
  AttentionLimits limits_;
  int units_;  // blocks that the device runs side by side
  SplitPlan plan_;
  Buffer partials_;
};

// The attention of a whole model: layer l decodes through the backend that `config` gives it, and prefills dense, as in
// all three papers.
class ModelAttention {
 public:
  // Device memory that the backends of `config` take for split partials.
  static std::int64_t scratch_bytes(const AttentionConfig& config, const AttentionLimits& limits);

  // Throws an input error where the device has no kernel for the shape.
  ModelAttention(const AttentionConfig& config, const AttentionLimits& limits);

  // Once a step, before its first layer.
  void plan(const Batch& batch);
  //   q, out [tokens, heads * head_dim];  lse [seqs, heads], decode only, is written where its data is not null
  void run(const Exec& exec, int layer, const TensorRef& q, const LayerKv& kv, const Batch& batch, const TensorRef& out,
           TensorView<float, 2> lse = {});

 private:
  AttentionLimits limits_;
  std::vector<std::unique_ptr<AttentionBackend>> backends_;  // one for each distinct setting
  std::vector<AttentionBackend*> of_layer_;
};

}  // namespace vesper
