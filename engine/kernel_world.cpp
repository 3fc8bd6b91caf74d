#include "engine/kernel_world.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "engine/core/error.h"
#include "engine/core/stream.h"
#include "engine/exact_step.h"
#include "engine/kernel_timer.h"
#include "engine/statistics.h"
#include "kvcache/append.h"
#include "kvcache/side_tables.h"
#include "models/fill.h"

namespace vesper {
namespace {

constexpr double kMemoryShare = 0.6;
constexpr int kFewTokens = 256;
constexpr int kChunk = 1024;                // tokens stored at once
constexpr float kQueryRange = kValueRange;  // variance 1 a channel: |q|^2 is head_dim

KvShape kv_shape_of(const AttentionShape& shape, DType dtype, int layers) {
  return {.layers = layers,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .page_tokens = shape.page_tokens,
          .dtype = dtype};
}

std::int64_t row_elements(const AttentionShape& shape) {
  return std::int64_t{shape.heads + 2 * shape.kv_heads} * shape.head_dim;
}

// Rows `first` ... of the tensor's tiles, widened; `tile` elements each.
std::vector<float> widened(const Exec& exec, const TensorRef& tensor, const std::vector<std::int32_t>& pages,
                           std::int64_t kv_heads, std::int64_t tile) {
  std::vector<float> values;
  values.reserve(pages.size() * static_cast<std::size_t>(tile));
  for (const std::int32_t page : pages) {
    const TensorRef part = tensor_ref(
        static_cast<std::byte*>(tensor.data) + page * kv_heads * tile * dtype_bytes(tensor.dtype), tensor.dtype, tile);
    const std::vector<float> read = read_floats(exec, part);
    values.insert(values.end(), read.begin(), read.end());
  }
  return values;
}

template <typename T>
std::vector<T> copied(const Exec& exec, const TensorRef& tensor, const std::vector<std::int32_t>& pages,
                      std::int64_t kv_heads, std::int64_t tile) {
  std::vector<T> values(pages.size() * static_cast<std::size_t>(tile));
  for (std::size_t p = 0; p < pages.size(); ++p) {
    copy_bytes(exec, values.data() + static_cast<std::int64_t>(p) * tile,
               static_cast<const T*>(tensor.data) + pages[p] * kv_heads * tile,
               tile * static_cast<std::int64_t>(sizeof(T)));
  }
  synchronize(exec);
  return values;
}

}  // namespace

std::int64_t KernelWorld::room(DeviceKind device) {
  return static_cast<std::int64_t>(kMemoryShare * static_cast<double>(device_info(device).free_bytes));
}

std::int64_t KernelWorld::layer_bytes(const AttentionShape& shape, DType dtype, int context, int batch) {
  const SideTables own = tables();
  return KvCache::bytes(kv_shape_of(shape, dtype, 1), std::int64_t{batch} * page_count(context, shape.page_tokens),
                        {&own, 1});
}

int KernelWorld::turns_in(std::int64_t room, DeviceKind device, const AttentionShape& shape, DType dtype, int context,
                          int batch) {
  const KvShape layer = kv_shape_of(shape, dtype, 1);
  const std::int64_t touched = std::int64_t{kFewTokens} * batch * layer.page_bytes() / layer.page_tokens;
  return turns_over(device, layer_bytes(shape, dtype, context, batch), touched, room);
}

AttentionLimits KernelWorld::limits(const KernelSetting& setting) const {
  return {.shape = shape_,
          .device = setting.device,
          .dtype = dtype_,
          .max_seqs = seqs(),
          .max_context = context_,
          .seed = static_cast<std::uint32_t>(setting.seed)};
}

KernelWorld::KernelWorld(const Exec& exec, const AttentionShape& shape, DType dtype, int context, int batch, int turns,
                         const KernelSetting& setting)
    : shape_(shape),
      dtype_(dtype),
      context_(context),
      turns_(turns),
      memory_(memory_of(exec.device)),
      cache_(kv_shape_of(shape, dtype, turns), batch * page_count(context, shape.page_tokens), exec.device,
             std::vector<SideTables>(static_cast<std::size_t>(turns), tables())),
      inputs_(std::max(kChunk, batch), batch, page_count(context, shape.page_tokens), context, exec.device),
      sequences_(static_cast<std::size_t>(batch)),
      ids_(static_cast<std::size_t>(std::max(kChunk, batch)), 0),
      numbers_(memory_,
               (std::int64_t{turns} * shape.kv_heads + shape.head_dim + std::int64_t{turns} * batch * shape.heads) * 4,
               "the numbers of a kernel's world"),
      rows_(memory_,
            std::max(kChunk, batch) * (row_elements(shape) + std::int64_t{shape.heads} * shape.head_dim) *
                dtype_bytes(dtype),
            "rows to store"),
      queries_(memory_, std::int64_t{turns} * batch * shape.heads * shape.head_dim * dtype_bytes(dtype), "queries"),
      out_(memory_, queries_.bytes(), "the output of attention") {
  cache_.shuffle_free_pages(setting.seed);
  for (std::size_t s = 0; s < sequences_.size(); ++s) {
    sequences_[s].request = static_cast<std::int32_t>(s);
    if (!cache_.reserve(sequences_[s], context)) fail({"reserving pages for a kernel's world", "too few", "", ""});
  }
  fill(exec, setting);
  for (int turn = 0; turn < turns; ++turn) {
    fill_uniform(exec, q(turn), setting.seed, 0x40000000U + static_cast<std::uint32_t>(turn), kQueryRange);
  }
  fill_uniform(exec, qkv(), setting.seed, 0x50000000U, kQueryRange);
  std::vector<StepEntry> entries;
  for (CachedSequence& sequence : sequences_) {
    sequence.length = context - 1;
    entries.push_back({.sequence = &sequence, .ids = std::span<const std::int32_t>(ids_).first(1)});
  }
  decode_ = inputs_.prepare(exec, Phase::kDecode, entries);
  synchronize(exec);
}

void KernelWorld::fill(const Exec& exec, const KernelSetting& setting) {
  std::vector<float> host(static_cast<std::size_t>(numbers_.bytes()) / 4, 0.0F);
  const std::size_t ranges = static_cast<std::size_t>(turns_) * static_cast<std::size_t>(shape_.kv_heads);
  // sigma = |q| r / sqrt(3 d) with |q|^2 = d. The middle of the range: one kernel, one spread.
  const double sigma = (setting.scores.sigma.least + setting.scores.sigma.largest) / 2;
  std::fill_n(host.begin(), ranges, static_cast<float>(sigma * std::sqrt(3.0)));
  const std::size_t half = static_cast<std::size_t>(shape_.head_dim) / 2;
  for (std::size_t d = 0; d < half; ++d) {
    host[ranges + half + d] =
        static_cast<float>(std::pow(10000.0, -static_cast<double>(d) / static_cast<double>(half)));
  }
  copy_bytes(exec, numbers_.data(), host.data(), numbers_.bytes());
  synchronize(exec);

  auto* numbers = static_cast<float*>(numbers_.data());
  const auto zeros = TensorView<const float, 1>(numbers + ranges, shape_.head_dim / 2);
  const DrawnKv drawn{.key_range = TensorView<const float, 2>(numbers, turns_, shape_.kv_heads),
                      .no_turn = zeros,
                      .run_share = static_cast<float>(std::sqrt(setting.scores.locality)),
                      .token_share = static_cast<float>(std::sqrt(1.0 - setting.scores.locality)),
                      .seed = setting.seed};
  auto* rows = static_cast<std::byte*>(rows_.data());
  zero_bytes(exec, rows, rows_.bytes());
  for (CachedSequence& sequence : sequences_) {
    while (sequence.length < context_) {
      const int count = std::min(kChunk, context_ - sequence.length);
      const StepEntry entry{.sequence = &sequence,
                            .ids = std::span<const std::int32_t>(ids_).first(static_cast<std::size_t>(count))};
      synchronize(exec);
      const Batch batch = inputs_.prepare(exec, Phase::kPrefill, {&entry, 1});
      const TensorRef row = tensor_ref(rows, dtype_, count, row_elements(shape_));
      const TensorRef query =
          tensor_ref(rows + row.bytes(), dtype_, count, std::int64_t{shape_.heads} * shape_.head_dim);
      for (int layer = 0; layer < turns_; ++layer) {
        draw_kv(exec, drawn, layer, batch, shape_.head_dim, row);
        append_kv(exec, row, Rope{.inv_freq = zeros}, batch, cache_.layer(layer), query);
      }
      sequence.length += count;
    }
  }
  synchronize(exec);
}

TensorRef KernelWorld::q(int turn) const {
  const TensorRef all = queries_.ref(dtype_, turns_, seqs(), std::int64_t{shape_.heads} * shape_.head_dim);
  const std::int64_t bytes = all.bytes() / turns_;
  return tensor_ref(static_cast<std::byte*>(all.data) + turn * bytes, dtype_, seqs(),
                    std::int64_t{shape_.heads} * shape_.head_dim);
}

TensorRef KernelWorld::out(int turn) const {
  TensorRef place = q(turn);
  place.data = static_cast<std::byte*>(out_.data()) + turn * place.bytes();
  return place;
}

TensorRef KernelWorld::qkv() const {
  return rows_.ref(dtype_, seqs(), row_elements(shape_));
}

TensorView<float, 2> KernelWorld::lse(int turn) const {
  float* first = static_cast<float*>(numbers_.data()) + std::int64_t{turns_} * shape_.kv_heads + shape_.head_dim;
  return TensorView<float, 2>(first + std::int64_t{turn} * seqs() * shape_.heads, seqs(), shape_.heads);
}

Rope KernelWorld::rope() const {
  auto* numbers = static_cast<float*>(numbers_.data());
  const int half = shape_.head_dim / 2;
  return Rope{.inv_freq = TensorView<const float, 1>(numbers + std::int64_t{turns_} * shape_.kv_heads + half, half)};
}

KernelTruth::KernelTruth(const Exec& exec, const KernelWorld& world) : shape_(world.shape()) {
  const LayerKv& kv = world.kv(0);
  const std::int64_t kv_heads = shape_.kv_heads;
  const int group = shape_.group();
  const std::int64_t head_dim = shape_.head_dim;
  const std::int64_t page_tokens = shape_.page_tokens;
  shape_.heads = group;
  shape_.kv_heads = 1;

  std::vector<std::int32_t> pages(static_cast<std::size_t>(world.pages()));
  copy_bytes(exec, pages.data(), world.decode().page_table.data(), static_cast<std::int64_t>(pages.size()) * 4);
  synchronize(exec);
  k_ = widened(exec, kv.k, pages, kv_heads, page_tokens * head_dim);
  v_ = widened(exec, kv.v, pages, kv_heads, page_tokens * head_dim);
  bounds_ = widened(exec, kv.bounds, pages, kv_heads, 2 * head_dim);
  const std::int64_t spans = bound_spans(head_dim);
  int8_bounds_ = copied<std::uint8_t>(exec, kv.int8_bounds, pages, kv_heads, 2 * head_dim);
  int8_scales_ = copied<bf16>(exec, kv.int8_scales, pages, kv_heads, 2 * spans);
  int4_ = copied<std::uint8_t>(exec, kv.int4, pages, kv_heads, page_tokens * head_dim / 2);
  int4_params_ = copied<f16>(exec, kv.int4_params, pages, kv_heads, page_tokens * 2);
  const std::vector<float> queries = read_floats(exec, world.q(0));
  q_.assign(queries.begin(), queries.begin() + group * head_dim);
  // Lines behind the end hold whatever memory held; nothing reads them, and no bound may be made of them.
  for (std::int64_t t = world.context(); t < std::int64_t{world.pages()} * page_tokens; ++t) {
    for (int d = 0; d < head_dim; ++d) {
      const auto at = static_cast<std::size_t>(t / page_tokens * page_tokens * head_dim +
                                               tile_offset(static_cast<int>(t % page_tokens), d, shape_.head_dim));
      k_[at] = v_[at] = 0.0F;
    }
  }
  absolute_v_ = v_;
  for (float& value : absolute_v_) value = std::abs(value);
  for (const float key : k_) largest_key_ = std::max(largest_key_, std::abs(key));
  for (int h = 0; h < group; ++h) {
    float sum = 0.0F;
    for (std::int64_t d = 0; d < head_dim; ++d) sum += std::abs(q_[static_cast<std::size_t>(h * head_dim + d)]);
    query_sum_ = std::max(query_sum_, sum);
  }

  const auto count = static_cast<std::int64_t>(pages.size());
  kv_.k = tensor_ref(k_.data(), DType::kF32, count, 1, page_tokens, head_dim);
  kv_.v = tensor_ref(v_.data(), DType::kF32, count, 1, page_tokens, head_dim);
  kv_.bounds = tensor_ref(bounds_.data(), DType::kF32, count, 1, 2, head_dim);
  kv_.int8_bounds = tensor_ref(int8_bounds_.data(), DType::kU8, count, 1, 2, head_dim);
  kv_.int8_scales = tensor_ref(int8_scales_.data(), DType::kBf16, count, 1, 2, spans);
  kv_.int4 = tensor_ref(int4_.data(), DType::kU8, count, 1, page_tokens, head_dim / 2);
  kv_.int4_params = tensor_ref(int4_params_.data(), DType::kF16, count, 1, page_tokens, 2);
  for (std::int32_t p = 0; p < static_cast<std::int32_t>(count); ++p) table_.push_back(p);
  numbers_ = {world.context(), world.context() - 1, 0, 0, 1, 0};  // kv_len, position, sequence, query start, request
  using Numbers = TensorView<const std::int32_t, 1>;
  batch_.phase = Phase::kDecode;
  batch_.seqs = batch_.tokens = batch_.max_query_tokens = 1;
  batch_.max_kv_len = world.context();
  batch_.kv_len = Numbers(numbers_.data(), 1);
  batch_.positions = Numbers(numbers_.data() + 1, 1);
  batch_.seq_of_token = Numbers(numbers_.data() + 2, 1);
  batch_.query_start = Numbers(numbers_.data() + 3, 2);
  batch_.request = Numbers(numbers_.data() + 5, 1);
  batch_.page_table = TensorView<const std::int32_t, 2>(table_.data(), 1, count);
  batch_.host_kv_len = std::span<const std::int32_t>(numbers_).first(1);
}

TensorRef KernelTruth::q() const {
  return tensor_ref(const_cast<float*>(q_.data()), DType::kF32, 1, static_cast<std::int64_t>(q_.size()));
}

std::vector<float> KernelTruth::last_bounds() const {
  const std::int64_t row = std::int64_t{2} * shape_.head_dim;
  std::vector<float> last(bounds_.end() - row, bounds_.end());
  last.insert(last.end(), int8_bounds_.end() - row, int8_bounds_.end());
  std::transform(int8_scales_.end() - 2 * bound_spans(shape_.head_dim), int8_scales_.end(), std::back_inserter(last),
                 [](bf16 scale) { return to_float(scale); });
  return last;
}

void KernelTruth::remake_tables() {
  update_side_tables(Exec{}, batch_, kv_);
}

KernelTruth::Attended KernelTruth::attend(const Selection* list) const {
  const Exec cpu;
  Attended attended;
  for (const bool absolute : {false, true}) {
    LayerKv kv = kv_;
    if (absolute) kv.v.data = const_cast<float*>(absolute_v_.data());
    std::vector<float>& out = absolute ? attended.absolute : attended.out;
    out.resize(q_.size());
    const TensorRef to = tensor_ref(out.data(), DType::kF32, 1, static_cast<std::int64_t>(out.size()));
    const int entry_tokens = list != nullptr && list->unit == SelectionUnit::kPages ? shape_.page_tokens : 1;
    const int least = 512 / entry_tokens;
    const int splits = list == nullptr ? page_count(batch_.max_kv_len, 512)
                                       : page_count(static_cast<int>(list->index.shape(2)), least);
    std::vector<float> partials(static_cast<std::size_t>(shape_.heads) * static_cast<std::size_t>(splits) *
                                static_cast<std::size_t>(shape_.head_dim + 1));
    const std::int64_t rows = std::int64_t{shape_.heads} * splits;
    const SplitPartials parts{
        .out = TensorView<float, 4>(partials.data(), 1, shape_.heads, splits, shape_.head_dim),
        .lse = TensorView<float, 3>(partials.data() + rows * shape_.head_dim, 1, shape_.heads, splits)};
    if (list == nullptr) {
      attend_decode(cpu, shape_, q(), kv, batch_, {.splits = splits, .min_tokens = 512}, parts, to, {});
    } else {
      attend_selected(cpu, shape_, q(), kv, batch_, *list, least, {}, parts, to, {});
    }
  }
  return attended;
}

double KernelTruth::sigma() const {
  double sum = 0.0;
  for (int h = 0; h < shape_.heads; ++h) {
    Moments scores;
    const float* q = q_.data() + std::int64_t{h} * shape_.head_dim;
    for (int t = 0; t < batch_.max_kv_len; ++t) {
      const float* page = k_.data() + std::int64_t{t / shape_.page_tokens} * shape_.page_tokens * shape_.head_dim;
      double score = 0.0;
      for (int d = 0; d < shape_.head_dim; ++d) {
        score += static_cast<double>(q[d]) * page[tile_offset(t % shape_.page_tokens, d, shape_.head_dim)];
      }
      scores.add(score * shape_.scale);
    }
    sum += std::sqrt(scores.variance());
  }
  return sum / shape_.heads;
}

HostList::HostList(SelectionUnit unit, std::int64_t capacity)
    : index(static_cast<std::size_t>(capacity)), numbers(2, 0), weight(1, 0.0F) {
  list.unit = unit;
  list.index = TensorView<std::int32_t, 3>(index.data(), 1, 1, capacity);
  list.count = TensorView<std::int32_t, 2>(numbers.data(), 1, 1);
  list.tail_begin = TensorView<std::int32_t, 2>(numbers.data() + 1, 1, 1);
  list.tail_log_weight = TensorView<float, 2>(weight.data(), 1, 1);
}

HostList::HostList(const Exec& exec, const Selection& device) : HostList(device.unit, device.index.shape(2)) {
  copy_bytes(exec, index.data(), device.index.data(), static_cast<std::int64_t>(index.size()) * 4);
  copy_bytes(exec, numbers.data(), device.count.data(), 4);
  copy_bytes(exec, numbers.data() + 1, device.tail_begin.data(), 4);
  copy_bytes(exec, weight.data(), device.tail_log_weight.data(), 4);
  synchronize(exec);
}

std::string check_attended(const std::string& what, DType dtype, const std::vector<float>& found,
                           const KernelTruth::Attended& expected) {
  const float rounding = dtype == DType::kBf16 ? 0x1p-8F : dtype == DType::kF16 ? 0x1p-11F : 0.0F;
  std::vector<float> bound;
  for (const float absolute : expected.absolute) bound.push_back((2 * rounding + 0x1p-12F) * absolute + 1e-30F);
  return check_near(what, found, expected.out, bound);
}

std::string same_list(const std::string& what, const HostList& found, const HostList& expected) {
  if (found.entries() == expected.entries()) return fmt::format("CPU, same list of {}", found.numbers[0]);
  fail({"checking the output of " + what, fmt::format("a list of {} entries", found.numbers[0]),
        fmt::format("the {} that the CPU chooses from the same scores", expected.numbers[0]),
        "this kernel is wrong on this device; report it"});
}

std::string check_sample(const KernelTruth& truth, const SampleRule& rule, HostList& by_cpu, const HostList& found) {
  const int context = truth.batch().max_kv_len;
  const AttentionLimits limits{.shape = truth.shape(), .max_context = context};
  const std::int64_t columns = std::int64_t{limits.shape.heads} * limits.shape.head_dim;
  ScratchCarver counter(nullptr);
  (void)take_sampled_scratch(counter, limits, 1, context);
  const Buffer memory(Memory::kHost, counter.used(), "scratch of the CPU's sample");
  ScratchCarver carver(memory.data());
  std::vector<float> out(static_cast<std::size_t>(columns));
  std::vector<float> lse(static_cast<std::size_t>(limits.shape.heads));
  std::int32_t hits = 0;
  attend_sampled({}, limits.shape, truth.q(), truth.kv(), truth.batch(), rule, {}, by_cpu.list,
                 {TensorView<std::int32_t, 2>(&hits, 1, 1)}, take_sampled_scratch(carver, limits, 1, context),
                 tensor_ref(out.data(), DType::kF32, 1, columns),
                 TensorView<float, 2>(lse.data(), 1, limits.shape.heads));
  const std::int32_t tail = found.numbers[0] - found.numbers[1];
  const std::int32_t expected = by_cpu.numbers[0] - by_cpu.numbers[1];
  const std::int32_t common = std::min(found.numbers[0], by_cpu.numbers[0]);
  if (std::abs(tail - expected) > 2 + expected / 500 ||
      !std::equal(found.index.begin(), found.index.begin() + common, by_cpu.index.begin())) {
    fail({"checking the output of attend_sampled", fmt::format("a sample of {}", tail),
          fmt::format("{} and the same draws as on the CPU", expected),
          "this kernel is wrong on this device; report it"});
  }
  return fmt::format("same draws, {} against {}", tail, expected);
}

}  // namespace vesper
