#include "engine/attend_step.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/core/error.h"
#include "engine/core/stream.h"
#include "engine/memory_plan.h"
#include "engine/step_inputs.h"
#include "kvcache/append.h"
#include "kvcache/kv_cache.h"

namespace vesper {
namespace {

float element(const TensorRef& tensor, std::int64_t i) {
  switch (tensor.dtype) {
    case DType::kF32:
      return static_cast<const float*>(tensor.data)[i];
    case DType::kBf16:
      return to_float(static_cast<const bf16*>(tensor.data)[i]);
    case DType::kF16:
      return to_float(static_cast<const f16*>(tensor.data)[i]);
    default:
      return NAN;  // check_input lets no other type through
  }
}

void store(const TensorRef& tensor, std::int64_t i, float value) {
  if (tensor.dtype == DType::kF32) static_cast<float*>(tensor.data)[i] = value;
  if (tensor.dtype == DType::kBf16) static_cast<bf16*>(tensor.data)[i] = to_bf16(value);
  if (tensor.dtype == DType::kF16) static_cast<f16*>(tensor.data)[i] = to_f16(value);
}

std::string shape_text(const TensorRef& tensor) {
  std::string text = "[";
  for (int d = 0; d < tensor.rank; ++d) {
    text += (d == 0 ? "" : ", ") + std::to_string(tensor.shape[static_cast<std::size_t>(d)]);
  }
  return text + "]";
}

void check_input(const AttendInput& input) {
  const TensorRef& q = input.q;
  const TensorRef& k = input.k;
  const TensorRef& v = input.v;
  const auto wrong = [&input](const std::string& found, const std::string& expected) {
    refuse({"reading q, k and v of " + input.source, found, expected, ""});
  };
  for (const TensorRef* tensor : {&q, &k, &v}) {
    if (tensor->dtype == DType::kI32 || tensor->dtype == DType::kU8 || tensor->dtype != q.dtype) {
      wrong(std::string(dtype_name(q.dtype)) + ", " + std::string(dtype_name(k.dtype)) + ", " +
                std::string(dtype_name(v.dtype)) + " for q, k, v",
            "f32, bf16 or f16, one for all");
    }
  }
  if (q.rank != 2 || k.rank != 3 || v.rank != 3 || k.shape != v.shape || q.size() == 0 || k.size() == 0) {
    wrong("q " + shape_text(q) + ", k " + shape_text(k) + ", v " + shape_text(v),
          "q [heads, head_dim], k and v [tokens, kv_heads, head_dim], none empty");
  }
  if (q.shape[1] != k.shape[2] || q.shape[1] % 2 != 0) {
    wrong("head_dim " + std::to_string(q.shape[1]) + " in q and " + std::to_string(k.shape[2]) + " in k",
          "one even head_dim");
  }
  if (q.shape[0] % k.shape[1] != 0) {
    wrong(std::to_string(q.shape[0]) + " heads and " + std::to_string(k.shape[1]) + " KV heads",
          "heads a multiple of kv_heads");
  }
}

// The rows of the append pass: q only in the newest token's row, zeros in the others.
Buffer make_qkv(const AttendInput& input, DType dtype) {
  const std::int64_t tokens = input.k.shape[0];
  const std::int64_t q_columns = input.q.size();
  const std::int64_t kv_columns = input.k.size() / tokens;
  const std::int64_t columns = q_columns + 2 * kv_columns;
  Buffer buffer(Memory::kHost, tokens * columns * dtype_bytes(dtype), "the rows of an attention step");
  const TensorRef rows = buffer.ref(dtype, tokens, columns);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t i = 0; i < q_columns; ++i) {
      store(rows, t * columns + i, t + 1 == tokens ? element(input.q, i) : 0.0F);
    }
    for (std::int64_t i = 0; i < kv_columns; ++i) {
      store(rows, t * columns + q_columns + i, element(input.k, t * kv_columns + i));
      store(rows, t * columns + q_columns + kv_columns + i, element(input.v, t * kv_columns + i));
    }
  }
  return buffer;
}

// What was on each KV head's list, as token numbers; a dense step has made none and read everything.
void read_list(const Exec& exec, const Selection& list, int tokens, int page_tokens, AttendOutput& result,
               int kv_heads) {
  const auto heads = static_cast<std::size_t>(kv_heads);
  std::vector<std::vector<std::int32_t>> lists(heads);
  result.tail_begin.assign(heads, tokens);
  if (list.index.data() == nullptr) {
    for (auto& of_head : lists) {
      of_head.resize(static_cast<std::size_t>(tokens));
      std::iota(of_head.begin(), of_head.end(), 0);
    }
  } else {
    const auto capacity = static_cast<std::size_t>(list.index.shape(2));
    std::vector<std::int32_t> index(heads * capacity);
    std::vector<std::int32_t> count(heads);
    copy_bytes(exec, index.data(), list.index.data(), list.index.size() * 4);
    copy_bytes(exec, count.data(), list.count.data(), list.count.size() * 4);
    copy_bytes(exec, result.tail_begin.data(), list.tail_begin.data(), list.tail_begin.size() * 4);
    synchronize(exec);
    const int entry_tokens = list.unit == SelectionUnit::kPages ? page_tokens : 1;
    for (std::size_t g = 0; g < heads; ++g) {
      for (std::int32_t i = 0; i < count[g]; ++i) {
        const std::int32_t first = index[g * capacity + static_cast<std::size_t>(i)] * entry_tokens;
        for (int t = first; t < std::min(tokens, first + entry_tokens); ++t) lists[g].push_back(t);
      }
      if (list.unit == SelectionUnit::kPages) result.tail_begin[g] = static_cast<std::int32_t>(lists[g].size());
    }
  }
  for (const auto& of_head : lists) {
    result.count.push_back(static_cast<std::int32_t>(of_head.size()));
    result.index_columns = std::max(result.index_columns, result.count.back());
  }
  for (auto& of_head : lists) {
    of_head.resize(static_cast<std::size_t>(result.index_columns), -1);
    result.index.insert(result.index.end(), of_head.begin(), of_head.end());
  }
}

}  // namespace

AttendOutput attend_step(const AttendInput& input, const std::string& attention, int page_tokens, std::uint32_t seed,
                         DeviceKind device) {
  check_input(input);
  const Memory memory = memory_of(device);
  const Stream stream(device);
  const Exec exec = stream.exec();
  const DType dtype = activation_dtype(device, input.q.dtype);
  const int tokens = static_cast<int>(input.k.shape[0]);
  const AttentionShape shape{.heads = static_cast<int>(input.q.shape[0]),
                             .kv_heads = static_cast<int>(input.k.shape[1]),
                             .head_dim = static_cast<int>(input.q.shape[1]),
                             .page_tokens = page_tokens,
                             .scale = 1.0F / std::sqrt(static_cast<float>(input.q.shape[1]))};
  const AttentionConfig config = parse_attention(attention, 1, 0);
  ModelAttention backend(
      config,
      AttentionLimits{
          .shape = shape, .device = device, .dtype = dtype, .max_seqs = 1, .max_context = tokens, .seed = seed},
      exec);
  const KvShape kv{
      .layers = 1, .kv_heads = shape.kv_heads, .head_dim = shape.head_dim, .page_tokens = page_tokens, .dtype = dtype};
  const int pages = page_count(tokens, page_tokens);
  KvCache cache(kv, pages, device, ModelAttention::side_tables({&config, 1}));
  CachedSequence sequence;
  if (!cache.reserve(sequence, tokens)) fail({"reserving pages", "too few", "one cache a sequence", ""});

  // Store the keys and values through the append pass; frequencies of zero leave rotated keys as they are.
  const std::int64_t q_columns = std::int64_t{shape.heads} * shape.head_dim;
  const std::int64_t columns = q_columns + std::int64_t{2} * shape.kv_heads * shape.head_dim;
  const Buffer host_rows = make_qkv(input, dtype);
  const Buffer rows(memory, host_rows.bytes(), "the rows of an attention step");
  copy_bytes(exec, rows.data(), host_rows.data(), host_rows.bytes());
  const Buffer frequencies(memory, shape.head_dim / 2 * std::int64_t{4}, "rotary frequencies");
  zero_bytes(exec, frequencies.data(), frequencies.bytes());
  const Buffer q(memory, tokens * q_columns * dtype_bytes(dtype), "the queries of an attention step");
  StepInputs inputs(tokens, 1, pages, tokens, device);
  const std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens), 0);
  const StepEntry all{.sequence = &sequence, .ids = ids};
  append_kv(exec, rows.ref(dtype, tokens, columns), Rope{.inv_freq = frequencies.view<const float>(shape.head_dim / 2)},
            inputs.prepare(exec, Phase::kPrefill, {&all, 1}), cache.layer(0), q.ref(dtype, tokens, q_columns));
  stream.synchronize();

  // The newest token's decode step.
  sequence.length = tokens - 1;
  const StepEntry newest{.sequence = &sequence, .ids = std::span(ids).first(1)};
  const Batch batch = inputs.prepare(exec, Phase::kDecode, {&newest, 1});
  backend.plan(batch);
  auto* last_q = static_cast<std::byte*>(q.data()) + (tokens - 1) * q_columns * dtype_bytes(dtype);
  const Buffer out(memory, q_columns * dtype_bytes(dtype), "the output of an attention step");
  const Buffer lse(memory, shape.heads * std::int64_t{4}, "its log-sum-exp");
  backend.run(exec, 0, tensor_ref(last_q, dtype, 1, q_columns), cache.layer(0), batch, out.ref(dtype, 1, q_columns),
              lse.view<float>(1, shape.heads));

  AttendOutput result;
  Buffer host_out(Memory::kHost, out.bytes(), "the output of an attention step");
  copy_bytes(exec, host_out.data(), out.data(), out.bytes());
  result.lse.resize(static_cast<std::size_t>(shape.heads));
  copy_bytes(exec, result.lse.data(), lse.data(), lse.bytes());
  stream.synchronize();
  const TensorRef host_values = host_out.ref(dtype, q_columns);
  for (std::int64_t i = 0; i < q_columns; ++i) result.out.push_back(element(host_values, i));
  read_list(exec, backend.last_selection(0), tokens, page_tokens, result, shape.kv_heads);
  return result;
}

}  // namespace vesper
