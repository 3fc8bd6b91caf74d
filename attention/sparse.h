// What the sparse backends share: lists for the sequences over a threshold, dense attention for the others, scratch.
#pragma once

#include "attention/attend_selected.h"
#include "attention/attention.h"

namespace vesper {

// Hands out parts of one buffer, each on 256 bytes. Over a null base it only counts.
class ScratchCarver {
 public:
  explicit ScratchCarver(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <typename T, std::integral... Extents>
  TensorView<T, static_cast<int>(sizeof...(Extents))> take(Extents... extents) {
    const std::int64_t bytes = (std::int64_t{1} * ... * extents) * static_cast<std::int64_t>(sizeof(T));
    auto* data = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (bytes + 255) / 256 * 256;
    return TensorView<T, static_cast<int>(sizeof...(Extents))>(data, extents...);
  }
  [[nodiscard]] std::int64_t used() const { return used_; }

 private:
  std::byte* base_;
  std::int64_t used_ = 0;
};

// A list of `capacity` entries for each sequence and KV head.
Selection take_selection(ScratchCarver& carver, SelectionUnit unit, int seqs, int kv_heads, int capacity);

// Entries of all lists, and their tokens (of pages: whole ones), which the device counted. Wait.
std::int64_t entries_of(const Exec& exec, const Selection& list);
std::int64_t listed_tokens(const Exec& exec, const AttentionShape& shape, const Selection& list);

// Most pages that select_pages keeps, in every context of at most `tokens`.
int page_list_bound(const PageBudget& budget, int tokens, int page_tokens);

// Whether the lists of `seqs` sequences share their splits out by their counts: on CUDA, where the lists of a step may
// `differ` in length and are so many that few blocks read each.
bool shares_lists(const AttentionLimits& limits, bool differ, int seqs);

// Splits of lists of up to `entries` entries, for `seqs` sequences: enough to fill a device of `units` (decode_units).
int list_splits(const AttentionLimits& limits, bool differ, int units, int seqs, int entries, int min_entries);

// Partial results of such lists in `memory`, which holds list_partial_bytes(). `tickets` [seqs, kv_heads]: counters
// that are zero.
SplitPartials list_partials(const AttentionLimits& limits, bool differ, int units, int seqs, int entries,
                            int min_entries, float* memory, TensorView<std::int32_t, 2> tickets);

// Partial results of attention over lists of up to `entries` entries, cut into splits of at least `min_entries`.
std::int64_t list_partial_bytes(const AttentionLimits& limits, bool differ, int entries, int min_entries);

// Counters of lists, as many as sampled ones need, which count towards AttentionScratch::selections.
std::int64_t ticket_bytes(const AttentionLimits& limits);

// One layer's lists of one step.
struct MadeLists {
  Selection list;
  TensorView<const std::int32_t, 2> guard_hits;  // [seqs, kv_heads] where lists hold samples
};

class SparseAttention : public AttentionBackend {
 public:
  void plan(const Batch& batch) final;
  void run(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch, const TensorRef& out,
           TensorView<float, 2> lse) final;
  [[nodiscard]] Selection last_selection() const final { return list_; }
  [[nodiscard]] unsigned planned_work() const final { return (any_dense_ ? 1U : 0U) + (any_sparse_ ? 2U : 0U); }
  [[nodiscard]] DenseLimit dense_limit() const final { return dense_limit_; }
  [[nodiscard]] std::int64_t metadata_bytes() const final { return metadata_bytes_; }
  [[nodiscard]] bool needs_newest_entries() const final { return any_sparse_ && chooses_by_newest_entries(); }

 protected:
  // `scratch`: of the largest step, as the backend's own layout counts it. `min_entries`: of a split of a list.
  // `differ`: lists of one step may differ in length.
  SparseAttention(const AttentionLimits& limits, DenseLimit dense, const AttentionScratch& scratch, int min_entries,
                  bool differ);

  // Makes the lists of one layer.
  virtual MadeLists select(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                           ScratchCarver& scratch) = 0;
  // Whether lists depend on the side tables' entries of the newest token of a sequence over dense_limit(), or on those
  // of its page.
  [[nodiscard]] virtual bool chooses_by_newest_entries() const = 0;
  // Bytes read for one KV head of one layer to choose among `tokens` tokens.
  [[nodiscard]] virtual std::int64_t scoring_bytes(int tokens) const = 0;

  // Attention over the lists that select() made, cut into splits that fill the device; then they are counted, where
  // `counters` has data. A backend may lengthen them here.
  virtual void attend(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                      const Selection& list, const TensorRef& out, TensorView<float, 2> lse,
                      const KeptCounters& counters);

  // choose_pages over the step's sparse sequences, as a stage; `scores` as its scratch.
  void choose_pages_of_step(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                            PageScore page_score, GroupScore group_score, const PageBudget& budget,
                            TensorView<float, 3> scores, const Selection& pages) const;
  // score_pages over the step's sparse sequences, as a stage of its own.
  void score_pages_apart(const Exec& exec, const AttendLayer& layer, const TensorRef& q, const Batch& batch,
                         PageScore page_score, GroupScore group_score, TensorView<float, 3> scores) const;

  [[nodiscard]] const AttentionLimits& limits() const { return limits_; }
  [[nodiscard]] int min_entries() const { return min_entries_; }
  // What stages count by: pages of the step's sparse sequences, of one KV head.
  [[nodiscard]] std::int64_t pages_of(const Batch& batch) const;
  // Counters that every kernel leaves at zero.
  [[nodiscard]] TensorView<std::int32_t, 2> tickets(const Batch& batch) const {
    return tickets_.view<std::int32_t>(batch.seqs, limits_.shape.kv_heads);
  }
  // All of them: sample_tickets() of the largest step.
  [[nodiscard]] TensorView<std::int32_t, 1> all_tickets() const {
    return tickets_.view<std::int32_t>(tickets_.bytes() / static_cast<std::int64_t>(sizeof(std::int32_t)));
  }

 private:
  AttentionLimits limits_;
  DenseLimit dense_limit_;
  int min_entries_;  // of a split
  bool differ_;      // lists of one step in their lengths
  int units_;        // blocks that the device runs side by side
  DenseAttention dense_;
  Buffer partials_;
  Buffer scratch_;
  Buffer tickets_;  // i32
  Selection list_;
  bool any_dense_ = false;
  bool any_sparse_ = false;
  std::int64_t metadata_bytes_ = 0;
};

// Bytes of side tables or keys that scoring reads for one KV head over `tokens` tokens.
std::int64_t page_scoring_bytes(PageScore score, const AttentionLimits& limits, int tokens);
std::int64_t token_scoring_bytes(KeySource source, const AttentionLimits& limits, int tokens);

// The three backends; each is in the file of its name, with its paper. Scratch: without that of the dense attention
// inside.
AttentionScratch quest_scratch(const QuestConfig& config, const AttentionLimits& limits);
AttentionScratch twilight_scratch(const TwilightConfig& config, const AttentionLimits& limits);
AttentionScratch vattention_scratch(const VAttentionConfig& config, const AttentionLimits& limits);
std::unique_ptr<AttentionBackend> make_quest(const QuestConfig& config, int dense_below, const AttentionLimits& limits);
std::unique_ptr<AttentionBackend> make_twilight(const TwilightConfig& config, int dense_below,
                                                const AttentionLimits& limits);
std::unique_ptr<AttentionBackend> make_vattention(const VAttentionConfig& config, int dense_below,
                                                  const AttentionLimits& limits);

}  // namespace vesper
