#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "attention/attend_sampled.h"
#include "attention/page_choice.h"
#include "attention/prune_top_p.h"
#include "attention/score_tokens.h"
#include "attention/sparse.h"
#include "engine/core/stream.h"
#include "engine/exact_step.h"
#include "engine/kernel_cases.h"
#include "engine/kernel_timer.h"
#include "kvcache/append.h"
#include "kvcache/side_tables.h"

namespace vesper {
namespace {

// The papers' settings, as far as the context allows: Quest's budget and Twilight's base and p (targets of both
// papers' operator figures), vAttention's static part and pilot (the defaults of docs/backends.md).
constexpr int kPageBudget = 2048;
constexpr int kBaseBudget = 8192;
constexpr float kTopP = 0.85F;
constexpr int kPrefillTokens = 2048;
constexpr int kMinSplitTokens = 128;
constexpr double kSpread = 100.0;

class AttentionKernels {
 public:
  AttentionKernels(const Exec& exec, const AttentionLimits& limits, KernelWorld& world)
      : exec_(exec),
        limits_(limits),
        world_(world),
        shape_(world.shape()),
        batch_(world.decode()),
        units_(decode_units(limits)),
        scratch_(world.memory(), scratch_bytes(), "lists and scores of the kernel bench") {}

  std::vector<KernelRow> run(const KernelSetting& setting) {
    zero_bytes(exec_, scratch().tickets.data(), scratch().tickets.size() * 4);
    zero_bytes(exec_, scratch().sampling.tickets.data(), scratch().sampling.tickets.size() * 4);
    if (setting.wants("append")) append();  // before the truth is read: it stores a token
    truth_.emplace(exec_, world_);
    if (setting.wants("dense")) dense();
    const bool twilights = setting.wants("twilight");
    const bool sampled = setting.wants("vattention");
    if (setting.wants("quest") || twilights || sampled) quest();  // the others' lists come from its scores
    if (twilights) twilight();
    if (sampled) vattention();
    if (setting.wants("prefill")) prefill();
    return std::move(rows_);
  }

 private:
  struct Scratch {
    TensorView<float, 3> page_scores;
    TensorView<float, 3> token_scores;
    Selection pages;
    Selection base;
    Selection tokens;
    Selection sampled;
    TensorView<std::int32_t, 2> guard_hits;
    SampledScratch sampling;
    TensorView<std::int32_t, 2> tickets;
    TensorView<float, 1> partials;
  };

  Scratch lay_out(ScratchCarver& carver) const {
    const int seqs = world_.seqs();
    const int g = shape_.kv_heads;
    const int tokens = world_.pages() * shape_.page_tokens;
    Scratch scratch;
    scratch.page_scores = carver.take<float>(seqs, g, world_.pages());
    scratch.token_scores = carver.take<float>(seqs, shape_.heads, tokens);
    scratch.pages = take_selection(carver, SelectionUnit::kPages, seqs, g, world_.pages());
    scratch.base = take_selection(carver, SelectionUnit::kPages, seqs, g, base_pages());
    scratch.tokens = take_selection(carver, SelectionUnit::kTokens, seqs, g, tokens);
    scratch.sampled = take_selection(carver, SelectionUnit::kTokens, seqs, g, tokens);
    scratch.guard_hits = carver.take<std::int32_t>(seqs, g);
    scratch.sampling = take_sampled_scratch(carver, limits_, seqs, tokens);
    scratch.tickets = carver.take<std::int32_t>(seqs, g);
    scratch.sampling.tickets = carver.take<std::int32_t>(sample_tickets(std::int64_t{seqs} * g));
    const std::int64_t bytes =
        std::max(list_partial_bytes(limits_, false, world_.pages(), kMinSplitTokens / shape_.page_tokens),
                 list_partial_bytes(limits_, true, tokens, kMinSplitTokens));
    scratch.partials = carver.take<float>(bytes / 4);
    return scratch;
  }
  std::int64_t scratch_bytes() const {
    ScratchCarver counter(nullptr);
    (void)lay_out(counter);
    return counter.used();
  }
  [[nodiscard]] Scratch scratch() const {
    ScratchCarver carver(scratch_.data());
    return lay_out(carver);
  }
  [[nodiscard]] PageBudget page_budget() const {
    return {.tokens = Amount{static_cast<double>(std::min(kPageBudget, world_.context() / 2))}};
  }
  [[nodiscard]] PageBudget base_budget() const {
    return {.tokens = Amount{static_cast<double>(std::min(kBaseBudget, world_.context() / 2))}};
  }
  [[nodiscard]] int base_pages() const { return page_list_bound(base_budget(), world_.context(), shape_.page_tokens); }

  KernelRow& time(const char* stage, const std::string& kernel, const Cost& cost,
                  const std::function<void(int turn)>& queue) {
    rows_.push_back({.stage = stage,
                     .kernel = kernel,
                     .context = world_.context(),
                     .batch = world_.seqs(),
                     .seconds = time_turns(exec_, world_.turns(), queue),
                     .cost = cost,
                     .turns = world_.turns(),
                     .rival_s = {},
                     .check = {}});
    queue(0);
    synchronize(exec_);
    return rows_.back();
  }

  // K and V of the first KV head's group, of the output of turn 0.
  [[nodiscard]] std::vector<float> group_rows(const TensorRef& rows, std::int64_t row = 0) const {
    const std::vector<float> all = read_floats(exec_, rows);
    const auto begin = all.begin() + row * rows.shape[1];
    return {begin, begin + std::int64_t{shape_.group()} * shape_.head_dim};
  }

  // Two sums of head_dim products in different orders.
  [[nodiscard]] std::vector<float> score_bounds(std::size_t count, float factor) const {
    const float bound =
        factor * static_cast<float>(shape_.head_dim) * 0x1p-23F * truth_->query_sum() * truth_->largest_key();
    return std::vector<float>(count, bound);
  }

  void append() {
    const Cost cost = append_kv_cost({.layers = 1,
                                      .kv_heads = shape_.kv_heads,
                                      .head_dim = shape_.head_dim,
                                      .page_tokens = shape_.page_tokens,
                                      .dtype = world_.dtype()},
                                     shape_.heads, KernelWorld::tables(), world_.seqs());
    KernelRow& row = time("append", "rotate, store, page bounds in 16 and 8 bits, int4 keys", cost, [&](int turn) {
      append_kv(exec_, world_.qkv(), world_.rope(), batch_, world_.kv(turn), world_.out(turn));
    });
    // The page's tables against the CPU's of the keys that the kernel stored.
    KernelTruth stored(exec_, world_);
    const std::vector<float> found = stored.last_bounds();
    stored.remake_tables();
    (void)check_near(row.kernel, found, stored.last_bounds(), std::vector<float>(found.size(), 0.0F));
    row.check = "CPU, same page bounds";
  }

  void dense() {
    DenseAttention backend(limits_);
    backend.plan(batch_);
    const std::int64_t tokens = std::int64_t{world_.seqs()} * world_.context();
    KernelRow& row =
        time("attend", "dense", attend_decode_cost(shape_, world_.dtype(), world_.seqs(), tokens), [&](int turn) {
          backend.run(exec_, {.number = turn, .kv = world_.kv(turn), .counters = {}}, world_.q(turn), batch_,
                      world_.out(turn), {});
        });
    row.check = check_attended(row.kernel, world_.dtype(), group_rows(world_.out(0)), truth_->attend(nullptr));
  }

  void attend(const std::string& kernel, const Selection& list, int min_entries) {
    const Scratch s = scratch();
    const SplitPartials partials =
        list_partials(limits_, list.unit == SelectionUnit::kTokens, units_, world_.seqs(),
                      static_cast<int>(list.index.shape(2)), min_entries, s.partials.data(), s.tickets);
    KernelRow& row = time(
        "attend", kernel,
        attend_selected_cost(shape_, world_.dtype(), world_.seqs(), listed_tokens(exec_, shape_, list)), [&](int turn) {
          attend_selected(exec_, shape_, world_.q(turn), world_.kv(turn), batch_, list, min_entries, {}, partials,
                          world_.out(turn), world_.lse(turn));
        });
    const HostList host(exec_, list);
    row.check = check_attended(row.kernel, world_.dtype(), group_rows(world_.out(0)), truth_->attend(&host.list));
  }

  // Lists of tokens whose counts differ by a factor of kSpread, evenly in their logarithms (multiples of the golden
  // ratio): tokens spread over the context, the newest on every list.
  void attend_spread() {
    const Selection& list = scratch().tokens;
    const int context = world_.context();
    const auto capacity = static_cast<std::size_t>(list.index.shape(2));
    const auto lists = static_cast<std::size_t>(list.count.size());
    std::vector<std::int32_t> index(capacity * lists);
    std::vector<std::int32_t> counts(lists);
    for (std::size_t l = 0; l < lists; ++l) {
      const double share = std::fmod(static_cast<double>(l) * 0.6180339887498949, 1.0);
      const int count = std::max(1, static_cast<int>(context / 4.0 * std::pow(kSpread, -share)));
      counts[l] = count;
      for (int i = 0; i < count; ++i) {
        index[l * capacity + static_cast<std::size_t>(i)] =
            static_cast<std::int32_t>(std::int64_t{context} * (i + 1) / count - 1);
      }
    }
    copy_bytes(exec_, list.index.data(), index.data(), list.index.size() * 4);
    copy_bytes(exec_, list.count.data(), counts.data(), list.count.size() * 4);
    copy_bytes(exec_, list.tail_begin.data(), counts.data(), list.count.size() * 4);
    synchronize(exec_);
    attend(fmt::format("lists whose counts differ by {:.0f}x", kSpread), list, kMinSplitTokens);
  }

  // Times scores of all pages, and gives those of the first list, checked.
  std::vector<float> score(PageScore page_score, const std::string& kernel) {
    const Scratch s = scratch();
    const std::int64_t pages = std::int64_t{world_.seqs()} * world_.pages();
    KernelRow& row = time("score", kernel, score_pages_cost(shape_, world_.dtype(), page_score, world_.seqs(), pages),
                          [&](int turn) {
                            score_pages(exec_, shape_, world_.q(turn), world_.kv(turn), batch_, page_score,
                                        GroupScore::kMax, {}, s.page_scores);
                          });
    std::vector<float> expected(static_cast<std::size_t>(world_.pages()));
    const auto view = TensorView<float, 3>(expected.data(), 1, 1, world_.pages());
    score_pages({}, truth_->shape(), truth_->q(), truth_->kv(), truth_->batch(), page_score, GroupScore::kMax, {},
                view);
    std::vector<float> found = read_back(exec_, s.page_scores);
    found.resize(expected.size());
    row.check = check_near(row.kernel, found, expected, score_bounds(found.size(), 2.0F));
    return found;
  }

  void quest() {
    const Scratch s = scratch();
    const std::int64_t pages = std::int64_t{world_.seqs()} * world_.pages();
    (void)score(PageScore::kMinMaxInt8, "page bounds in 8 bits");
    const std::vector<float> found = score(PageScore::kMinMax, "page bounds");

    const auto choose = [&](const PageBudget& budget, const Selection& list, const std::string& kernel) {
      const std::int64_t kept = std::int64_t{world_.seqs()} * shape_.kv_heads *
                                tokens_of(budget.tokens, world_.context()) / shape_.page_tokens;
      KernelRow& row = time("select", kernel, select_pages_cost(shape_, pages, kept),
                            [&](int) { select_pages(exec_, shape_, batch_, s.page_scores, budget, {}, list); });
      HostList by_cpu(SelectionUnit::kPages, list.index.shape(2));
      select_pages({}, truth_->shape(), truth_->batch(), TensorView<const float, 3>(found.data(), 1, 1, world_.pages()),
                   budget, {}, by_cpu.list);
      row.check = same_list(row.kernel, HostList(exec_, list), by_cpu);
    };
    const std::string few = fmt::format("pages, budget {:.0f}", page_budget().tokens.value);
    choose(page_budget(), s.pages, few);
    both(few);
    attend(few, s.pages, kMinSplitTokens / shape_.page_tokens);
    const std::int64_t kept = listed_tokens(exec_, shape_, s.pages);
    QuestConfig settings;
    settings.token_budget = page_budget().tokens;
    for (const PageScore page_score : {PageScore::kMinMax, PageScore::kMinMaxInt8}) {
      settings.page_score = page_score;
      whole("quest, " + few + (page_score == PageScore::kMinMaxInt8 ? ", bounds in 8 bits" : ""),
            make_quest(settings, 0, limits_),
            score_pages_cost(shape_, world_.dtype(), page_score, world_.seqs(), pages), kept);
    }
    choose(base_budget(), s.base, fmt::format("pages, budget {:.0f}", base_budget().tokens.value));
  }

  // All of a backend's launches but the append pass: what a layer of its costs. `kept`: tokens of all lists.
  void whole(const std::string& name, const std::unique_ptr<AttentionBackend>& backend, const Cost& choosing,
             std::int64_t kept) {
    backend->plan(batch_);
    const Cost attending = attend_selected_cost(shape_, world_.dtype(), world_.seqs(), kept);
    KernelRow& row = time("attention", name, choosing + attending, [&](int turn) {
      backend->run(exec_, {.number = turn, .kv = world_.kv(turn), .counters = {}}, world_.q(turn), batch_,
                   world_.out(turn), world_.lse(turn));
    });
    const HostList host(exec_, backend->last_selection());
    row.check = check_attended(row.kernel, world_.dtype(), group_rows(world_.out(0)), truth_->attend(&host.list));
  }

  // Scores and the list in one launch, as the backends have them.
  void both(const std::string& budget) {
    const Scratch s = scratch();
    const HostList composed(exec_, s.pages);
    const std::int64_t pages = std::int64_t{world_.seqs()} * world_.pages();
    KernelRow& row = time(
        "select", "score and choose " + budget,
        choose_pages_cost(shape_, world_.dtype(), PageScore::kMinMax, world_.seqs(), pages, entries_of(exec_, s.pages)),
        [&](int turn) {
          choose_pages(exec_, shape_, world_.q(turn), world_.kv(turn), batch_, PageScore::kMinMax, GroupScore::kMax,
                       page_budget(), {}, {.scores = s.page_scores, .tickets = s.tickets}, s.pages);
        });
    row.check = same_list(row.kernel, HostList(exec_, s.pages), composed);
  }

  void twilight() {
    const Scratch s = scratch();
    const std::int64_t candidates = s.base.index.shape(2) * shape_.page_tokens;
    const auto scores = TensorView<float, 3>(s.token_scores.data(), world_.seqs(), shape_.heads, candidates);
    KernelRow& score = time(
        "score", fmt::format("int4 keys of {} candidates", candidates),
        score_tokens_cost(shape_, world_.dtype(), KeySource::kInt4, world_.seqs(), world_.seqs() * candidates),
        [&](int turn) {
          score_tokens(exec_, shape_, world_.q(turn), world_.kv(turn), batch_, s.base, KeySource::kInt4, {}, scores);
        });
    const int group = shape_.group();
    std::vector<float> expected(static_cast<std::size_t>(group * candidates));
    const HostList base(exec_, s.base);
    score_tokens({}, truth_->shape(), truth_->q(), truth_->kv(), truth_->batch(), base.list, KeySource::kInt4, {},
                 TensorView<float, 3>(expected.data(), 1, group, candidates));
    std::vector<float> found = read_back(exec_, scores);
    found.resize(expected.size());
    // Codes times scale and the zero: at most three times the largest key a product.
    score.check = check_near(score.kernel, found, expected, score_bounds(found.size(), 6.0F * shape_.scale));

    const TopPRule rule{.top_p = kTopP, .min_tokens = 16, .sink_tokens = {}, .window_tokens = {}};
    const auto queue = [&](int) { prune_top_p(exec_, shape_, batch_, scores, s.base, rule, {}, s.tokens); };
    queue(0);
    KernelRow& prune = time("prune", fmt::format("top-p 0.85 of {} candidates", candidates),
                            prune_top_p_cost(shape_, world_.seqs() * candidates, entries_of(exec_, s.tokens)), queue);
    HostList by_cpu(SelectionUnit::kTokens, s.tokens.index.shape(2));
    prune_top_p({}, truth_->shape(), truth_->batch(), TensorView<const float, 3>(found.data(), 1, group, candidates),
                base.list, rule, {}, by_cpu.list);
    prune.check = same_list(prune.kernel, HostList(exec_, s.tokens), by_cpu);
    attend("pruned tokens", s.tokens, kMinSplitTokens);
    const std::int64_t pruned = listed_tokens(exec_, shape_, s.tokens);

    const Cost paging = score_pages_cost(shape_, world_.dtype(), PageScore::kMinMax, world_.seqs(),
                                         std::int64_t{world_.seqs()} * world_.pages());
    const Cost scoring =
        score_tokens_cost(shape_, world_.dtype(), KeySource::kInt4, world_.seqs(), world_.seqs() * candidates);
    TwilightConfig settings;
    settings.top_p = kTopP;
    settings.base_budget = base_budget().tokens;
    whole(fmt::format("twilight, top-p 0.85 of {} candidates", candidates), make_twilight(settings, 0, limits_),
          paging + scoring, pruned);
    attend_spread();
  }

  void vattention() {
    const Scratch s = scratch();
    const StaticRule rule{
        .sink_tokens = {128.0}, .window_tokens = {128.0}, .top_k = {0.025}, .group_score = GroupScore::kMax};
    const TopKScores scores{.of_tokens = {}, .of_pages = s.page_scores};
    const auto choose = [&](int) { select_static(exec_, shape_, batch_, scores, rule, {}, s.sampled); };
    choose(0);
    KernelRow& chosen = time("select", "sink, window, top-k 2.5 % by pages",
                             select_static_cost(s.page_scores.size(), entries_of(exec_, s.sampled)), choose);
    std::vector<float> page_scores = read_back(exec_, s.page_scores);
    HostList by_cpu(SelectionUnit::kTokens, s.sampled.index.shape(2));
    select_static({}, truth_->shape(), truth_->batch(),
                  {.of_tokens = {}, .of_pages = TensorView<const float, 3>(page_scores.data(), 1, 1, world_.pages())},
                  rule, {}, by_cpu.list);
    chosen.check = same_list(chosen.kernel, HostList(exec_, s.sampled), by_cpu);

    SampleRule sample;
    sample.epsilon = 0.1F;
    sample.z = static_cast<float>(inverse_normal(0.95));  // delta 0.1
    // A layer's sample is sized by its own static part.
    const auto lay_out_lists = [&](ScratchCarver& carver) {
      std::vector<Selection> lists;
      lists.reserve(static_cast<std::size_t>(world_.turns()));
      for (int turn = 0; turn < world_.turns(); ++turn) {
        lists.push_back(take_selection(carver, SelectionUnit::kTokens, world_.seqs(), shape_.kv_heads,
                                       world_.pages() * shape_.page_tokens));
      }
      return lists;
    };
    ScratchCarver counter(nullptr);
    (void)lay_out_lists(counter);
    const Buffer memory(world_.memory(), counter.used(), "the layers' sampled lists");
    ScratchCarver carver(memory.data());
    const std::vector<Selection> lists = lay_out_lists(carver);
    const auto entries = [&] {
      std::int64_t sum = 0;
      for (const Selection& list : lists) sum += entries_of(exec_, list);
      return sum / world_.turns();
    };
    const auto attend = [&](int turn) {
      sample.layer = turn;
      attend_sampled(exec_, shape_, world_.q(turn), world_.kv(turn), batch_, sample, {},
                     lists[static_cast<std::size_t>(turn)], {s.guard_hits}, s.sampling, world_.out(turn),
                     world_.lse(turn));
    };
    for (int turn = 0; turn < world_.turns(); ++turn) {
      score_pages(exec_, shape_, world_.q(turn), world_.kv(turn), batch_, PageScore::kMinMax, GroupScore::kMax, {},
                  s.page_scores);
      select_static(exec_, shape_, batch_, scores, rule, {}, lists[static_cast<std::size_t>(turn)]);
    }
    const std::int64_t statics = entries();
    for (int turn = 0; turn < world_.turns(); ++turn) attend(turn);
    const std::int64_t listed = entries();
    KernelRow& attended =
        time("sample", fmt::format("draw, size and attend, {} tokens a list", listed / s.sampled.count.size()),
             attend_sampled_cost(shape_, world_.dtype(), world_.seqs(), listed, listed - statics), attend);
    const HostList found(exec_, lists[0]);
    sample.layer = 0;
    attended.check =
        check_attended(attended.kernel, world_.dtype(), group_rows(world_.out(0)), truth_->attend(&found.list)) + ", " +
        check_sample(*truth_, sample, by_cpu, found);

    VAttentionConfig settings;
    settings.epsilon = 0.1F;
    settings.delta = 0.1F;
    whole("vattention, epsilon and delta 0.1, top-k 2.5 % by pages", make_vattention(settings, 0, limits_),
          score_pages_cost(shape_, world_.dtype(), PageScore::kMinMax, world_.seqs(),
                           std::int64_t{world_.seqs()} * world_.pages()),
          listed);
  }

  void prefill() {
    const int tokens = std::min(kPrefillTokens, world_.context());
    const std::int64_t columns = std::int64_t{shape_.heads} * shape_.head_dim;
    const Buffer queries(world_.memory(), tokens * columns * dtype_bytes(world_.dtype()), "prefill queries");
    const Buffer outputs(world_.memory(), queries.bytes(), "prefill outputs");
    const TensorRef q = queries.ref(world_.dtype(), tokens, columns);
    const TensorRef out = outputs.ref(world_.dtype(), tokens, columns);
    for (int t = 0; t < tokens; ++t) {  // the last one's is that of the decode kernels: their truth serves it too
      copy_bytes(exec_, static_cast<std::byte*>(q.data) + t * columns * dtype_bytes(q.dtype),
                 world_.q(t % world_.turns()).data, columns * dtype_bytes(q.dtype));
    }
    copy_bytes(exec_, static_cast<std::byte*>(q.data) + (tokens - 1) * columns * dtype_bytes(q.dtype), world_.q(0).data,
               columns * dtype_bytes(q.dtype));
    CachedSequence sequence = world_.sequence(0);
    sequence.length = world_.context() - tokens;
    const std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens), 0);
    StepInputs inputs(tokens, 1, world_.pages(), world_.context(), exec_.device);
    const StepEntry entry{.sequence = &sequence, .ids = ids};
    const Batch batch = inputs.prepare(exec_, Phase::kPrefill, {&entry, 1});
    KernelRow& row = time("prefill", fmt::format("the last {} tokens of one sequence", tokens),
                          attend_prefill_cost(shape_, world_.dtype(), tokens, world_.context()),
                          [&](int turn) { attend_prefill(exec_, shape_, q, world_.kv(turn), batch, out); });
    row.batch = 1;
    row.check = check_attended(row.kernel, world_.dtype(), group_rows(out, tokens - 1), truth_->attend(nullptr));
  }

  Exec exec_;
  const AttentionLimits& limits_;
  KernelWorld& world_;
  const AttentionShape& shape_;
  const Batch& batch_;
  int units_;
  Buffer scratch_;
  std::optional<KernelTruth> truth_;
  std::vector<KernelRow> rows_;
};

}  // namespace

std::vector<KernelRow> time_attention_kernels(const Exec& exec, const KernelSetting& setting, KernelWorld& world) {
  const AttentionLimits limits = world.limits(setting);
  return AttentionKernels(exec, limits, world).run(setting);
}

}  // namespace vesper
