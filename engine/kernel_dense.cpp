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
#include "models/small_gemm.h"

namespace vesper {
namespace {

constexpr std::int64_t kCheckedRows = 32;  // of a weight matrix
constexpr float kEps = 1e-5F;

// Half a unit in the last place, relative: what one rounding to the type costs.
float rounding(DType dtype) {
  return dtype == DType::kBf16 ? 0x1p-8F : dtype == DType::kF16 ? 0x1p-11F : 0x1p-24F;
}

// `count` distinct matrices [rows, columns], stored as they are or in 4 bits.
class DrawnMatrices {
 public:
  enum class Format { kStored, kInt4 };

  static std::int64_t bytes(Format format, DType dtype, std::int64_t rows, std::int64_t columns) {
    if (format == Format::kStored) return rows * columns * dtype_bytes(dtype);
    return Int4Matrix{nullptr, rows, columns}.bytes();
  }

  DrawnMatrices(const Exec& exec, Format format, DType dtype, std::int64_t rows, std::int64_t columns, int count,
                std::uint64_t seed)
      : exec_(exec),
        format_(format),
        dtype_(dtype),
        rows_(rows),
        columns_(columns),
        one_(bytes(format, dtype, rows, columns)),
        data_(memory_of(exec.device), count * one_, "the weights of a kernel") {
    const float range = std::sqrt(3.0F / static_cast<float>(columns));
    if (format == Format::kStored) {
      fill_uniform(exec, data_.ref(dtype, count * rows * columns), seed, kTensor, range);
      return;
    }
    const Buffer drawn(memory_of(exec.device), rows * columns * dtype_bytes(dtype), "weights to quantise");
    for (int turn = 0; turn < count; ++turn) {
      fill_uniform(exec, drawn.ref(dtype, rows * columns), seed + static_cast<std::uint64_t>(turn), kTensor, range);
      clear_int4_padding(exec, int4(turn));
      quantise_int4(exec, drawn.ref(dtype, rows, columns), 0, int4(turn));
    }
    synchronize(exec);
  }

  [[nodiscard]] LinearWeight weight(int turn) const {
    LinearWeight made;
    if (format_ == Format::kInt4) {
      made.int4 = int4(turn);
    } else {
      made.blocks[0] = tensor_ref(at(turn), dtype_, rows_, columns_);
      made.count = 1;
    }
    return made;
  }

  // Row r of the first one.
  [[nodiscard]] std::vector<float> row(std::int64_t r) const {
    if (format_ == Format::kStored) {
      return read_floats(exec_, tensor_ref(at(0) + r * columns_ * dtype_bytes(dtype_), dtype_, columns_));
    }
    const std::int64_t first = r / kInt4CellRows * kInt4CellRows;
    const std::int64_t count = std::min<std::int64_t>(kInt4CellRows, rows_ - first);
    const Buffer wide(memory_of(exec_.device), count * columns_ * 4, "dequantised rows");
    dequantise_int4(exec_, int4(0), first, wide.ref(DType::kF32, count, columns_));
    const std::vector<float> rows = read_floats(exec_, wide.ref(DType::kF32, count * columns_));
    const auto begin = rows.begin() + (r - first) * columns_;
    return {begin, begin + columns_};
  }

 private:
  static constexpr std::uint32_t kTensor = 1;

  [[nodiscard]] std::byte* at(int turn) const { return static_cast<std::byte*>(data_.data()) + turn * one_; }
  [[nodiscard]] Int4Matrix int4(int turn) const { return {at(turn), rows_, columns_}; }

  Exec exec_;
  Format format_;
  DType dtype_;
  std::int64_t rows_;
  std::int64_t columns_;
  std::int64_t one_;
  Buffer data_;
};
using Format = DrawnMatrices::Format;

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
        memory_(memory_of(exec.device)),
        context_(exec.device) {}

  std::vector<KernelRow> run() {
    const std::int64_t qkv_rows = config_.q_rows() + 2 * config_.kv_rows();
    for (const Format format : {Format::kStored, Format::kInt4}) {
      product("qkv", format, qkv_rows, config_.hidden, dtype_);
      product("o", format, config_.hidden, config_.q_rows(), dtype_);
      product("gate_up", format, std::int64_t{2} * config_.ffn, config_.hidden, dtype_);
      product("down", format, config_.hidden, config_.ffn, dtype_);
      product("head", format, config_.vocab, config_.hidden, DType::kF32);
      fused_ffn(format);
    }
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

  // Whether the product is one of our own kernels, which can also do the step after it.
  [[nodiscard]] bool has_own_product(Format format) const {
    if constexpr (kHaveCuda) {
      if (!exec_.on_cuda()) return false;
      if (batch_ <= kMaxGemvRows) return true;
      return format == Format::kStored && batch_ <= kMaxSmallGemmRows && cuda::has_small_gemm();
    }
    return false;
  }

  static const char* suffix(Format format) { return format == Format::kInt4 ? ", int4" : ""; }

  void product(const char* name, Format format, std::int64_t rows, std::int64_t columns, DType out_dtype) {
    const std::int64_t bytes = DrawnMatrices::bytes(format, dtype_, rows, columns);
    const int turns = turns_over(exec_.device, bytes, bytes, room_);
    if (turns == 0) return;
    const DrawnMatrices matrices(exec_, format, dtype_, rows, columns, turns, seed_);
    const Buffer inputs = drawn(batch_ * columns, dtype_, 2, 1.7F);
    const Buffer outputs(memory_, std::int64_t{batch_} * rows * dtype_bytes(out_dtype), "a product");
    const TensorRef x = inputs.ref(dtype_, batch_, columns);
    const TensorRef out = outputs.ref(out_dtype, batch_, rows);
    const LinearContext context(exec_.device, format == Format::kInt4 ? LinearContext::panel_bytes(rows, columns) : 0);
    const auto multiply = [&](int turn) { linear(exec_, context, x, matrices.weight(turn), out); };
    KernelRow& row = add("linear", fmt::format("{} {} x {}{}", name, rows, columns, suffix(format)), turns,
                         time_turns(exec_, turns, multiply),
                         format == Format::kInt4 ? linear_int4_cost(dtype_, out_dtype, batch_, rows, columns)
                                                 : linear_cost(dtype_, out_dtype, batch_, rows, columns));
    multiply(0);
    row.check = check_product(row.kernel, x, matrices, rows, out);
    if constexpr (kHaveCuda) {
      if (!has_own_product(format) || format == Format::kInt4) return;
      row.rival_s = quantile(
          time_turns(exec_, turns,
                     [&](int turn) { cuda::linear_cublaslt(exec_, context, x, matrices.weight(turn).blocks[0], out); }),
          0.5);
    }
  }

  // Some rows of the matrix, evenly over it, in fp64. Two roundings of sums: columns * 2^-24 of the terms' sum each
  // way.
  std::string check_product(const std::string& what, const TensorRef& x, const DrawnMatrices& matrices,
                            std::int64_t rows, const TensorRef& out) {
    const std::int64_t columns = x.shape[1];
    const std::vector<float> inputs = read_floats(exec_, x);
    const std::vector<float> outputs = read_floats(exec_, out);
    std::vector<float> found;
    std::vector<float> expected;
    std::vector<float> bound;
    for (std::int64_t i = 0; i < std::min(kCheckedRows, rows); ++i) {
      const std::int64_t r = i * (rows - 1) / std::max<std::int64_t>(1, std::min(kCheckedRows, rows) - 1);
      const std::vector<float> weight = matrices.row(r);
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
  void fused_ffn(Format format) {
    if (!has_own_product(format)) return;
    const std::int64_t hidden = config_.hidden;
    const std::int64_t ffn = config_.ffn;
    const std::int64_t bytes = DrawnMatrices::bytes(format, dtype_, 2 * ffn, hidden);
    const int turns = turns_over(exec_.device, bytes, bytes, room_);
    if (turns == 0) return;
    const DrawnMatrices matrices(exec_, format, dtype_, 2 * ffn, hidden, turns, seed_);
    const Buffer x = drawn(batch_ * hidden, dtype_, 9, 1.7F);
    const Buffer gate_up(memory_, std::int64_t{2} * batch_ * ffn * dtype_bytes(dtype_), "gates and ups");
    const Buffer out(memory_, std::int64_t{2} * batch_ * ffn * dtype_bytes(dtype_), "two activations");
    const TensorRef input = x.ref(dtype_, batch_, hidden);
    const TensorRef wide = gate_up.ref(dtype_, batch_, 2 * ffn);
    const TensorRef to = out.ref(dtype_, batch_, ffn);
    const TensorRef composed = tensor_ref(static_cast<std::byte*>(out.data()) + to.bytes(), dtype_, batch_, ffn);
    const auto run_turn = [&](int turn) { project_ffn(exec_, context_, input, matrices.weight(turn), wide, to); };
    Cost cost = project_ffn_cost(dtype_, batch_, hidden, ffn);
    cost.bytes += bytes - DrawnMatrices::bytes(Format::kStored, dtype_, 2 * ffn, hidden);
    KernelRow& row = add("linear", fmt::format("gate and up, silu_mul {} x {}{}", 2 * ffn, hidden, suffix(format)),
                         turns, time_turns(exec_, turns, run_turn), cost);
    run_turn(0);
    linear(exec_, context_, input, matrices.weight(0), wide);
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
