#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "engine/core/stream.h"
#include "engine/exact_step.h"
#include "engine/kernel_cases.h"
#include "engine/kernel_timer.h"
#include "engine/sampling.h"
#include "models/fill.h"
#include "models/norm.h"
#include "models/projections.h"
#include "models/rows.h"

namespace vesper {
namespace {

constexpr std::int64_t kCheckedRows = 32;  // of a weight matrix
constexpr float kEps = 1e-5F;

// Half a unit in the last place, relative: what one rounding to the type costs.
float rounding(DType dtype) {
  return dtype == DType::kBf16 ? 0x1p-8F : dtype == DType::kF16 ? 0x1p-11F : 0x1p-24F;
}

class DenseKernels {
 public:
  DenseKernels(const Exec& exec, const ModelConfig& config, DType dtype, int batch, std::int64_t room,
               std::uint64_t seed)
      : exec_(exec),
        config_(config),
        dtype_(dtype),
        batch_(batch),
        room_(room),
        seed_(seed),
        memory_(exec.on_cuda() ? Memory::kDevice : Memory::kHost),
        context_(exec.device) {}

  std::vector<KernelRow> run() {
    const std::int64_t qkv_rows = config_.q_rows() + 2 * config_.kv_rows();
    product("qkv", qkv_rows, config_.hidden, dtype_);
    product("o", config_.hidden, config_.q_rows(), dtype_);
    product("gate_up", std::int64_t{2} * config_.ffn, config_.hidden, dtype_);
    product("down", config_.hidden, config_.ffn, dtype_);
    product("head", config_.vocab, config_.hidden, DType::kF32);
    fused_ffn();
    norm();
    activation();
    draw();
    return std::move(rows_);
  }

 private:
  Buffer drawn(std::int64_t elements, DType dtype, std::uint32_t tensor, float range) const {
    Buffer buffer(memory_, elements * dtype_bytes(dtype), "the data of a kernel");
    fill_uniform(exec_, buffer.ref(dtype, elements), seed_, tensor, range);
    return buffer;
  }

  KernelRow& add(const char* stage, const std::string& kernel, int turns, std::vector<double> seconds,
                 const Cost& cost) {
    rows_.push_back({.stage = stage,
                     .kernel = kernel,
                     .context = 0,
                     .batch = batch_,
                     .seconds = std::move(seconds),
                     .cost = cost,
                     .turns = turns,
                     .rival_s = {},
                     .check = {}});
    return rows_.back();
  }

  void product(const char* name, std::int64_t rows, std::int64_t columns, DType out_dtype) {
    const std::int64_t bytes = rows * columns * dtype_bytes(dtype_);
    const int turns = turns_over(exec_.device, bytes, bytes, room_);
    if (turns == 0) return;
    const Buffer weights = drawn(turns * rows * columns, dtype_, 1, std::sqrt(3.0F / static_cast<float>(columns)));
    const Buffer inputs = drawn(batch_ * columns, dtype_, 2, 1.7F);
    const Buffer outputs(memory_, std::int64_t{batch_} * rows * dtype_bytes(out_dtype), "a product");
    const TensorRef x = inputs.ref(dtype_, batch_, columns);
    const TensorRef out = outputs.ref(out_dtype, batch_, rows);
    const auto matrix = [&](int turn) {
      return tensor_ref(static_cast<std::byte*>(weights.data()) + turn * bytes, dtype_, rows, columns);
    };
    const auto multiply = [&](int turn) {
      LinearWeight weight;
      weight.blocks[0] = matrix(turn);
      weight.count = 1;
      linear(exec_, context_, x, weight, out);
    };
    KernelRow& row = add("linear", fmt::format("{} {} x {}", name, rows, columns), turns,
                         time_turns(exec_, turns, multiply), linear_cost(dtype_, out_dtype, batch_, rows, columns));
    multiply(0);
    row.check = check_product(row.kernel, x, matrix(0), out);
    if constexpr (kHaveCuda) {
      if (!exec_.on_cuda() || batch_ > kMaxGemvRows) return;
      row.rival_s = quantile(
          time_turns(exec_, turns, [&](int turn) { cuda::linear_cublaslt(exec_, context_, x, matrix(turn), out); }),
          0.5);
    }
  }

  // Some rows of the matrix, evenly over it, in fp64. Two roundings of sums: columns * 2^-24 of the terms' sum each
  // way.
  std::string check_product(const std::string& what, const TensorRef& x, const TensorRef& matrix,
                            const TensorRef& out) {
    const std::int64_t rows = matrix.shape[0];
    const std::int64_t columns = matrix.shape[1];
    const std::vector<float> inputs = read_floats(exec_, x);
    const std::vector<float> outputs = read_floats(exec_, out);
    std::vector<float> found;
    std::vector<float> expected;
    std::vector<float> bound;
    for (std::int64_t i = 0; i < std::min(kCheckedRows, rows); ++i) {
      const std::int64_t r = i * (rows - 1) / std::max<std::int64_t>(1, std::min(kCheckedRows, rows) - 1);
      const std::vector<float> weight = read_floats(
          exec_, tensor_ref(static_cast<std::byte*>(matrix.data) + r * columns * dtype_bytes(dtype_), dtype_, columns));
      for (std::int64_t t = 0; t < batch_; ++t) {
        double sum = 0.0;
        double terms = 0.0;
        for (std::int64_t c = 0; c < columns; ++c) {
          const double term = static_cast<double>(weight[static_cast<std::size_t>(c)]) *
                              static_cast<double>(inputs[static_cast<std::size_t>(t * columns + c)]);
          sum += term;
          terms += std::abs(term);
        }
        found.push_back(outputs[static_cast<std::size_t>(t * rows + r)]);
        expected.push_back(static_cast<float>(sum));
        bound.push_back(
            static_cast<float>(static_cast<double>(columns) * 0x1p-24 * terms + rounding(out.dtype) * std::abs(sum)));
      }
    }
    return check_near(what, found, expected, bound);
  }

  // What a decode step on CUDA does in one kernel, against its composition of the fronts.
  void fused_ffn() {
    if (!exec_.on_cuda() || batch_ > kMaxGemvRows) return;
    const std::int64_t hidden = config_.hidden;
    const std::int64_t ffn = config_.ffn;
    const std::int64_t elements = 2 * ffn * hidden;
    const std::int64_t bytes = elements * dtype_bytes(dtype_);
    const int turns = turns_over(exec_.device, bytes, bytes, room_);
    if (turns == 0) return;
    const Buffer weights = drawn(turns * elements, dtype_, 8, std::sqrt(3.0F / static_cast<float>(hidden)));
    const Buffer x = drawn(batch_ * hidden, dtype_, 9, 1.7F);
    const Buffer gate_up(memory_, batch_ * 2 * ffn * dtype_bytes(dtype_), "gates and ups");
    const Buffer out(memory_, std::int64_t{2} * batch_ * ffn * dtype_bytes(dtype_), "two activations");
    const TensorRef input = x.ref(dtype_, batch_, hidden);
    const TensorRef wide = gate_up.ref(dtype_, batch_, 2 * ffn);
    const TensorRef to = out.ref(dtype_, batch_, ffn);
    const TensorRef composed = tensor_ref(static_cast<std::byte*>(out.data()) + to.bytes(), dtype_, batch_, ffn);
    const auto weight_of = [&](int turn) {
      LinearWeight weight;
      weight.blocks[0] = tensor_ref(static_cast<std::byte*>(weights.data()) + turn * bytes, dtype_, 2 * ffn, hidden);
      weight.count = 1;
      return weight;
    };
    const auto run_turn = [&](int turn) { project_ffn(exec_, context_, input, weight_of(turn), wide, to); };
    KernelRow& row = add("linear", fmt::format("gate and up, silu_mul {} x {}", 2 * ffn, hidden), turns,
                         time_turns(exec_, turns, run_turn), project_ffn_cost(dtype_, batch_, hidden, ffn));
    run_turn(0);
    linear(exec_, context_, input, weight_of(0), wide);
    silu_mul(exec_, wide, composed);
    const std::vector<float> expected = read_floats(exec_, composed);
    (void)check_near(row.kernel, read_floats(exec_, to), expected, std::vector<float>(expected.size(), 0.0F));
    row.check = "linear and silu_mul, same bits";
  }

  void norm() {
    const std::int64_t hidden = config_.hidden;
    const std::int64_t elements = batch_ * hidden;
    const std::int64_t row_bytes = elements * dtype_bytes(dtype_);
    const int turns = turns_over(exec_.device, row_bytes, row_bytes, room_);
    if (turns == 0) return;
    const Buffer x = drawn(turns * elements, dtype_, 3, 1.7F);
    const Buffer addend = drawn(elements, dtype_, 4, 1.7F);
    const Buffer weight = drawn(hidden, dtype_, 5, 1.7F);
    const Buffer out(memory_, elements * dtype_bytes(dtype_), "a norm");
    const TensorRef to = out.ref(dtype_, batch_, hidden);
    const auto run_turn = [&](int turn) {
      const TensorRef row =
          tensor_ref(static_cast<std::byte*>(x.data()) + turn * elements * dtype_bytes(dtype_), dtype_, batch_, hidden);
      rms_norm(exec_, row, weight.ref(dtype_, hidden), kEps, to);
    };
    KernelRow& row = add("norm", fmt::format("rms_norm {}", hidden), turns, time_turns(exec_, turns, run_turn),
                         rms_norm_cost(dtype_, batch_, hidden));
    run_turn(0);
    std::vector<float> in = read_floats(exec_, tensor_ref(x.data(), dtype_, batch_, hidden));
    std::vector<float> scale = read_floats(exec_, weight.ref(dtype_, hidden));
    std::vector<float> expected(in.size());
    rms_norm(Exec{}, tensor_ref(in.data(), DType::kF32, batch_, hidden), tensor_ref(scale.data(), DType::kF32, hidden),
             kEps, tensor_ref(expected.data(), DType::kF32, batch_, hidden));
    row.check = check_near(row.kernel, read_floats(exec_, to), expected,
                           relative(expected, rounding(dtype_) + static_cast<float>(hidden) * 0x1p-24F));
  }

  void activation() {
    const std::int64_t ffn = config_.ffn;
    const std::int64_t elements = std::int64_t{2} * batch_ * ffn;
    const std::int64_t row_bytes = elements * dtype_bytes(dtype_);
    const int turns = turns_over(exec_.device, row_bytes, row_bytes, room_);
    if (turns == 0) return;
    const Buffer gate_up = drawn(turns * elements, dtype_, 6, 1.7F);
    const Buffer out(memory_, elements / 2 * dtype_bytes(dtype_), "an activation");
    const TensorRef to = out.ref(dtype_, batch_, ffn);
    const auto run_turn = [&](int turn) {
      silu_mul(exec_,
               tensor_ref(static_cast<std::byte*>(gate_up.data()) + turn * elements * dtype_bytes(dtype_), dtype_,
                          batch_, 2 * ffn),
               to);
    };
    KernelRow& row = add("activate", fmt::format("silu_mul {}", ffn), turns, time_turns(exec_, turns, run_turn),
                         silu_mul_cost(dtype_, batch_, ffn));
    run_turn(0);
    std::vector<float> in = read_floats(exec_, tensor_ref(gate_up.data(), dtype_, batch_, 2 * ffn));
    std::vector<float> expected(static_cast<std::size_t>(batch_ * ffn));
    silu_mul(Exec{}, tensor_ref(in.data(), DType::kF32, batch_, 2 * ffn),
             tensor_ref(expected.data(), DType::kF32, batch_, ffn));
    // The device's exponential may be a few units of fp32 off.
    row.check =
        check_near(row.kernel, read_floats(exec_, to), expected, relative(expected, rounding(dtype_) + 0x1p-20F));
  }

  void draw() {
    const std::int64_t vocab = config_.vocab;
    const std::int64_t elements = batch_ * vocab;
    const int turns = turns_over(exec_.device, elements * 4, elements * 4, room_);
    if (turns == 0) return;
    const Buffer logits = drawn(turns * elements, DType::kF32, 7, 5.0F);
    const Buffer params(memory_, batch_ * static_cast<std::int64_t>(sizeof(SamplingParams)), "how to sample");
    const Buffer numbers(memory_, std::int64_t{2} * batch_ * 4, "sampled ids");
    const std::vector<SamplingParams> greedy(static_cast<std::size_t>(batch_));
    copy_bytes(exec_, params.data(), greedy.data(), params.bytes());
    zero_bytes(exec_, numbers.data(), numbers.bytes());
    synchronize(exec_);
    auto* ids = static_cast<std::int32_t*>(numbers.data()) + batch_;
    const auto run_turn = [&](int turn) {
      sample(exec_, TensorView<const float, 2>(static_cast<float*>(logits.data()) + turn * elements, batch_, vocab),
             params.view<const SamplingParams>(batch_), numbers.view<const std::int32_t>(batch_),
             TensorView<std::int32_t, 1>(ids, batch_));
    };
    KernelRow& row = add("draw", fmt::format("greedy over {}", vocab), turns, time_turns(exec_, turns, run_turn),
                         sample_cost(batch_, vocab));
    run_turn(0);
    const std::vector<float> values = read_floats(exec_, tensor_ref(logits.data(), DType::kF32, elements));
    std::vector<float> found;
    std::vector<float> expected;
    const std::vector<std::int32_t> drawn_ids = read_back(exec_, TensorView<std::int32_t, 1>(ids, batch_));
    for (std::int64_t s = 0; s < batch_; ++s) {
      const auto begin = values.begin() + s * vocab;
      found.push_back(static_cast<float>(drawn_ids[static_cast<std::size_t>(s)]));
      expected.push_back(static_cast<float>(std::max_element(begin, begin + vocab) - begin));
    }
    (void)check_near(row.kernel, found, expected, std::vector<float>(found.size(), 0.0F));
    row.check = "CPU, same ids";
  }

  static std::vector<float> relative(const std::vector<float>& values, float share) {
    std::vector<float> bound;
    bound.reserve(values.size());
    for (const float value : values) bound.push_back(share * std::abs(value) + 1e-30F);
    return bound;
  }

  Exec exec_;
  const ModelConfig& config_;
  DType dtype_;
  int batch_;
  std::int64_t room_;
  std::uint64_t seed_;
  Memory memory_;
  LinearContext context_;
  std::vector<KernelRow> rows_;
};

}  // namespace

std::vector<KernelRow> time_dense_kernels(const Exec& exec, const ModelConfig& config, DType dtype, int batch,
                                          std::int64_t room, std::uint64_t seed) {
  return DenseKernels(exec, config, dtype, batch, room, seed).run();
}

}  // namespace vesper
