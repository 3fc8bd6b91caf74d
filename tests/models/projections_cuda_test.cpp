// The one-kernel projections of a decode step against the compositions they stand for, bit for bit: both round the same
// values, and their sums run in one order.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "models/projections.h"
#include "models/rows.h"
#include "models/small_gemm.h"
#include "tests/device_tensor.h"
#include "tests/gpu.h"
#include "tests/paged_device.h"

namespace vesper {
namespace {

struct Kind {
  DType dtype;
  bool int4;
};
// Those of the GEMV kernels, and some of small_gemm's.
constexpr std::array kTokens = {1, 2, 3, 4, 5, 6, 7, 8, 9, 24, 64};
// Whether the weight is read by a kernel that can do more than multiply.
bool reaches(int tokens, bool int4) {
  return tokens <= kMaxGemvRows || (cuda::has_small_gemm() && !int4);
}

constexpr std::array kKinds = {Kind{DType::kBf16, false}, Kind{DType::kF16, false}, Kind{DType::kBf16, true},
                               Kind{DType::kF16, true}};

DeviceTensor random_rows(const Exec& exec, std::mt19937& random, DType dtype, int tokens, int hidden) {
  DeviceTensor x(exec, 0, dtype, tokens, hidden);
  x.write(random_floats(random, static_cast<std::size_t>(tokens) * hidden, -3.0F, 3.0F));
  return x;
}

void expect_equal(DeviceTensor& one, DeviceTensor& other, const std::string& what) {
  const std::span<const char> found = one.read_bytes(what);
  const std::span<const char> expected = other.read_bytes(what);
  std::size_t wrong = 0;
  std::size_t first = 0;
  for (std::size_t i = found.size(); i-- > 0;) {
    if (found[i] == expected[i]) continue;
    ++wrong;
    first = i;
  }
  EXPECT_EQ(wrong, 0U) << what << ": bytes differ, the first is byte " << first << " of " << found.size();
}

DeviceTensor random_matrix(const Exec& exec, std::mt19937& random, DType dtype, int rows, int columns) {
  DeviceTensor matrix(exec, 0, dtype, rows, columns);
  const float scale = 1.0F / std::sqrt(static_cast<float>(columns));
  matrix.write(random_floats(random, static_cast<std::size_t>(rows) * columns, -scale, scale));
  return matrix;
}

// A weight as it is stored or in 4 bits, and what it lies in.
struct AnyWeight {
  DeviceTensor stored;
  Buffer packed;
  LinearWeight weight;

  AnyWeight(const Exec& exec, std::mt19937& random, DType dtype, int rows, int columns, bool int4)
      : stored(random_matrix(exec, random, dtype, rows, columns)) {
    if (!int4) {
      weight.blocks[0] = stored.ref();
      weight.count = 1;
      return;
    }
    weight.int4 = {nullptr, rows, columns};
    packed = Buffer(Memory::kDevice, weight.int4.bytes(), "a weight in 4 bits");
    weight.int4.data = static_cast<std::byte*>(packed.data());
    clear_int4_padding(exec, weight.int4);
    quantise_int4(exec, stored.ref(), 0, weight.int4);
  }
};

TEST(ProjectionsCuda, FfnIsItsComposition) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  const LinearContext context(DeviceKind::kCuda);
  std::mt19937 random(1);
  struct Shape {
    int hidden, ffn;
  };
  for (const Shape& shape :
       {Shape{64, 8}, Shape{264, 40}, Shape{1000, 344}, Shape{4096, 1024}, Shape{8192, 64}, Shape{8, 17000}}) {
    for (const int tokens : kTokens) {
      for (const auto& [dtype, int4] : kKinds) {
        if (int4 && tokens > 9) continue;  // nothing new
        const std::string what = std::string(dtype_name(dtype)) + (int4 ? " and int4, " : ", ") +
                                 std::to_string(tokens) + " tokens, hidden " + std::to_string(shape.hidden) + ", ffn " +
                                 std::to_string(shape.ffn);
        const DeviceTensor x = random_rows(exec, random, dtype, tokens, shape.hidden);
        const AnyWeight any(exec, random, dtype, 2 * shape.ffn, shape.hidden, int4);
        const LinearWeight& weight = any.weight;
        DeviceTensor out(exec, 0, dtype, tokens, shape.ffn);
        const bool done = cuda::project_ffn(exec, context, x.ref(), weight, out.ref());
        ASSERT_EQ(done, reaches(tokens, int4) && (!int4 || shape.ffn % kInt4CellRows == 0)) << what;
        if (!done) continue;

        const DeviceTensor gate_up(exec, 0, dtype, tokens, 2 * shape.ffn);
        DeviceTensor expected(exec, 0, dtype, tokens, shape.ffn);
        linear(exec, context, x.ref(), weight, gate_up.ref());
        silu_mul(exec, gate_up.ref(), expected.ref());
        expect_equal(out, expected, what);
      }
    }
  }
}

TEST(ProjectionsCuda, QkvIsItsComposition) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  const LinearContext context(DeviceKind::kCuda);
  std::mt19937 random(2);
  struct Shape {
    int hidden, heads, kv_heads, head_dim, page_tokens;
  };
  for (const Shape& shape : {Shape{64, 4, 4, 64, 16}, Shape{264, 6, 2, 128, 32}, Shape{4096, 8, 1, 128, 16},
                             Shape{128, 2, 1, 16, 64}, Shape{512, 3, 3, 96, 16}}) {
    for (const int tokens : kTokens) {
      for (const auto& [dtype, int4] : kKinds) {
        if (int4 && tokens > 9) continue;  // nothing new
        const int rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        const std::string what = std::string(dtype_name(dtype)) + (int4 ? " and int4, " : ", ") +
                                 std::to_string(tokens) + " tokens, hidden " + std::to_string(shape.hidden) +
                                 ", heads " + std::to_string(shape.heads) + " and " + std::to_string(shape.kv_heads) +
                                 " of " + std::to_string(shape.head_dim);
        std::vector<int> lengths;
        for (int s = 0; s < tokens; ++s) lengths.push_back(1 + static_cast<int>(random() % 300));
        const RaggedBatch ragged(random, Phase::kDecode, lengths, std::vector<int>(lengths.size(), 1),
                                 shape.page_tokens);
        const DeviceBatch batch(stream, ragged);
        std::vector<float> frequencies;
        for (int d = 0; d < tokens * shape.head_dim / 2; ++d) {
          frequencies.push_back(std::pow(10000.0F, -static_cast<float>(d % 64) / 64.0F));
        }
        const Buffer device_frequencies = upload(stream, frequencies);
        const Rope rope{.inv_freq = device_frequencies.view<const float>(static_cast<std::int64_t>(frequencies.size())),
                        .seq_stride = tokens % 2 == 0 ? shape.head_dim / 2 : 0,
                        .attention_factor = tokens % 4 == 0 ? 1.25F : 1.0F};

        const DeviceTensor x = random_rows(exec, random, dtype, tokens, shape.hidden);
        const AnyWeight any(exec, random, dtype, rows, shape.hidden, int4);
        const LinearWeight& weight = any.weight;
        const auto cache = [&] {
          return DeviceTensor(exec, 0, dtype, ragged.pages, shape.kv_heads, shape.page_tokens, shape.head_dim);
        };
        DeviceTensor k = cache();
        DeviceTensor v = cache();
        DeviceTensor query(exec, 0, dtype, tokens, shape.heads * shape.head_dim);
        const bool done = cuda::project_qkv(exec, context, x.ref(), weight, rope, batch.batch,
                                            {.k = k.ref(), .v = v.ref()}, query.ref());
        const bool tiled = int4 || tokens > kMaxGemvRows;  // by whole sixteens of a half
        ASSERT_EQ(done, reaches(tokens, int4) && (!tiled || shape.head_dim / 2 % 16 == 0)) << what;
        if (!done) continue;

        const DeviceTensor qkv(exec, 0, dtype, tokens, rows);
        DeviceTensor expected_k = cache();
        DeviceTensor expected_v = cache();
        DeviceTensor expected_query(exec, 0, dtype, tokens, shape.heads * shape.head_dim);
        linear(exec, context, x.ref(), weight, qkv.ref());
        append_kv(exec, qkv.ref(), rope, batch.batch, {.k = expected_k.ref(), .v = expected_v.ref()},
                  expected_query.ref());
        expect_equal(query, expected_query, what + ", q");
        expect_equal(k, expected_k, what + ", k");
        expect_equal(v, expected_v, what + ", v");
      }
    }
  }
}

// What they do not take is left to the composition, untouched.
TEST(ProjectionsCuda, LeaveOtherShapesAlone) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  const LinearContext context(DeviceKind::kCuda);
  std::mt19937 random(3);
  struct Shape {
    int tokens, hidden, ffn;
  };
  for (const Shape& shape : {Shape{65, 64, 8}, Shape{1, 63, 8}, Shape{9, 63, 8}, Shape{1, 64, 12}}) {
    const DeviceTensor x = random_rows(exec, random, DType::kBf16, shape.tokens, shape.hidden);
    const DeviceTensor matrix = random_matrix(exec, random, DType::kBf16, 2 * shape.ffn, shape.hidden);
    DeviceTensor out(exec, 0, DType::kBf16, shape.tokens, shape.ffn);
    EXPECT_FALSE(
        cuda::project_ffn(exec, context, x.ref(), LinearWeight{.blocks = {matrix.ref()}, .count = 1}, out.ref()))
        << shape.tokens << ' ' << shape.hidden << ' ' << shape.ffn;
    for (const float value : out.read("out")) ASSERT_TRUE(std::isnan(value));
  }
}

}  // namespace
}  // namespace vesper
