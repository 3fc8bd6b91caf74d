// What attention kernels are measured on: a filled paged cache, queries, and the part of both that the CPU checks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "attention/attend_sampled.h"
#include "attention/sparse.h"
#include "engine/kernel_bench.h"
#include "engine/step_inputs.h"
#include "kvcache/kv_cache.h"
#include "models/synthetic_kv.h"

namespace vesper {

// `batch` sequences of `context` tokens on shuffled pages, over as many layers as there are turns, with page bounds,
// exact and in 8 bits, and int4 keys, drawn as a synthetic fill draws them for queries of length sqrt(head_dim).
class KernelWorld {
 public:
  // Device memory that kernels' data may take of what is free now: the rest is for scratch and for what looks at it.
  static std::int64_t room(DeviceKind device);
  // Device memory of a world, for each turn.
  static std::int64_t layer_bytes(const AttentionShape& shape, DType dtype, int context, int batch);
  // Turns that fit `room` and leave the cache cold (engine/kernel_timer.h), counted for lists of few tokens, which
  // touch the least of a layer; 0 where too few fit.
  static int turns_in(std::int64_t room, DeviceKind device, const AttentionShape& shape, DType dtype, int context,
                      int batch);
  static SideTables tables() {
    return {.page_bounds = true, .int8_bounds = true, .page_moments = false, .int4_keys = true};
  }

  KernelWorld(const Exec& exec, const AttentionShape& shape, DType dtype, int context, int batch, int turns,
              const KernelSetting& setting);

  // What attention over this world is set up for.
  [[nodiscard]] AttentionLimits limits(const KernelSetting& setting) const;

  [[nodiscard]] const AttentionShape& shape() const { return shape_; }
  [[nodiscard]] DType dtype() const { return dtype_; }
  [[nodiscard]] int context() const { return context_; }
  [[nodiscard]] int seqs() const { return static_cast<int>(sequences_.size()); }
  [[nodiscard]] int turns() const { return turns_; }
  [[nodiscard]] int pages() const { return page_count(context_, shape_.page_tokens); }  // of a sequence
  [[nodiscard]] const CachedSequence& sequence(std::size_t s) const { return sequences_[s]; }
  [[nodiscard]] Memory memory() const { return memory_; }

  [[nodiscard]] const Batch& decode() const { return decode_; }  // its newest token is the context's last
  [[nodiscard]] const LayerKv& kv(int turn) const { return cache_.layer(turn); }
  [[nodiscard]] std::span<const LayerKv> layers() const { return cache_.layers(); }  // of all turns
  [[nodiscard]] TensorRef q(int turn) const;                                         // [seqs, heads * head_dim]
  [[nodiscard]] TensorRef qkv() const;                     // [seqs, (heads + 2 kv_heads) * head_dim]
  [[nodiscard]] TensorRef out(int turn) const;             // as q
  [[nodiscard]] TensorView<float, 2> lse(int turn) const;  // [seqs, heads]
  [[nodiscard]] Rope rope() const;                         // angles of theta 10000

 private:
  void fill(const Exec& exec, const KernelSetting& setting);

  AttentionShape shape_;
  DType dtype_;
  int context_;
  int turns_;
  Memory memory_;
  KvCache cache_;
  StepInputs inputs_;
  std::vector<CachedSequence> sequences_;
  std::vector<std::int32_t> ids_;
  Buffer numbers_;  // ranges [layers, kv_heads], zeros [head_dim / 2], frequencies [head_dim / 2], lse [turns, seqs,
                    // heads]
  Buffer rows_;     // qkv rows of a chunk
  Buffer queries_;  // [turns, seqs, heads * head_dim]
  Buffer out_;      // likewise
  Batch decode_;
};

// The first sequence and KV head of turn 0 on the host, in f32: what the CPU's functions make of the same stored bits.
class KernelTruth {
 public:
  KernelTruth(const Exec& exec, const KernelWorld& world);

  [[nodiscard]] const AttentionShape& shape() const { return shape_; }  // one KV head and its group
  [[nodiscard]] const Batch& batch() const { return batch_; }
  [[nodiscard]] const LayerKv& kv() const { return kv_; }
  [[nodiscard]] TensorRef q() const;
  // Largest |k| and sum of |q| of a head: bounds of a score's rounding are made of them.
  [[nodiscard]] float largest_key() const { return largest_key_; }
  [[nodiscard]] float query_sum() const { return query_sum_; }
  // Standard deviation of the scores q . k / sqrt(head_dim) over the keys, mean over the group's heads.
  [[nodiscard]] double sigma() const;
  // Page bounds of the last page, then their codes and scales in 8 bits: as they were stored, and from remake_tables()
  // on as the CPU makes them of its keys.
  [[nodiscard]] std::vector<float> last_bounds() const;
  void remake_tables();
  // Attention over all keys (`list` empty) or a list: out [group * head_dim], and with |v| in place of v.
  struct Attended {
    std::vector<float> out;
    std::vector<float> absolute;
  };
  [[nodiscard]] Attended attend(const Selection* list) const;

 private:
  AttentionShape shape_;
  std::vector<float> k_, v_, absolute_v_, bounds_, q_;
  std::vector<std::uint8_t> int8_bounds_, int4_;
  std::vector<bf16> int8_scales_;
  std::vector<f16> int4_params_;
  std::vector<std::int32_t> table_;
  std::vector<std::int32_t> numbers_;
  LayerKv kv_;
  Batch batch_;
  float largest_key_ = 0.0F;
  float query_sum_ = 0.0F;
};

// A list of the first sequence and KV head on the host.
struct HostList {
  std::vector<std::int32_t> index, numbers;
  std::vector<float> weight;
  Selection list;

  HostList(SelectionUnit unit, std::int64_t capacity);
  // As the device made it. Waits.
  HostList(const Exec& exec, const Selection& device);
  HostList(const HostList&) = delete;
  HostList& operator=(const HostList&) = delete;
  HostList(HostList&&) = delete;
  HostList& operator=(HostList&&) = delete;
  ~HostList() = default;

  [[nodiscard]] std::vector<std::int32_t> entries() const { return {index.begin(), index.begin() + numbers[0]}; }
};

// check_near for attention's output: kernels may round weights to the cache's type before they multiply values (once),
// and round the result: two roundings of sum w |v|. Sums in fp32 and the exponential add less than 2^-12 of it at these
// lengths.
std::string check_attended(const std::string& what, DType dtype, const std::vector<float>& found,
                           const KernelTruth::Attended& expected);

// Whether a list that the device chose is the CPU's from the same scores.
std::string same_list(const std::string& what, const HostList& found, const HostList& expected);

// Whether a sampled list is what the CPU makes of `by_cpu`, the static part: moments of some hundred terms in another
// order differ by less than a thousandth, and the draws are the same as far as both go.
std::string check_sample(const KernelTruth& truth, const SampleRule& rule, HostList& by_cpu, const HostList& found);

}  // namespace vesper
