// Drawn keys and values: their distribution, and that sequences, positions and chunks do not matter to each other.
#include "models/synthetic_kv.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "engine/core/buffer.h"
#include "engine/core/stream.h"
#include "tests/gpu.h"

namespace vesper {
namespace {

constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kHeadDim = 64;
constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kColumns = (kHeads + 2 * kKvHeads) * kHeadDim;

// A prefill step of one sequence, with the arrays that a draw reads.
struct Tokens {
  std::vector<std::int32_t> positions;
  std::vector<std::int32_t> zeros;
  std::int32_t request;

  Tokens(int first, int count, std::int32_t of_request)
      : zeros(static_cast<std::size_t>(count), 0), request(of_request) {
    for (int t = 0; t < count; ++t) positions.push_back(first + t);
  }
  [[nodiscard]] Batch batch() const {
    using Numbers = TensorView<const std::int32_t, 1>;
    Batch batch;
    batch.phase = Phase::kPrefill;
    batch.seqs = 1;
    batch.tokens = static_cast<int>(positions.size());
    batch.positions = Numbers(positions.data(), batch.tokens);
    batch.seq_of_token = Numbers(zeros.data(), batch.tokens);
    batch.request = Numbers(&request, 1);
    return batch;
  }
};

const std::vector<float> kRanges = {1.0F, 2.0F, 0.5F, 3.0F};

DrawnKv drawn_of(float locality) {
  return {.key_range = TensorView<const float, 2>(kRanges.data(), kLayers, kKvHeads),
          .no_turn = {},
          .run_share = std::sqrt(locality),
          .token_share = std::sqrt(1.0F - locality),
          .seed = 7};
}

std::vector<float> rows_of(const DrawnKv& drawn, int layer, const Tokens& tokens) {
  std::vector<float> rows(tokens.positions.size() * kColumns, -9.0F);
  draw_kv({}, drawn, layer, tokens.batch(), kHeadDim,
          tensor_ref(rows.data(), DType::kF32, static_cast<std::int64_t>(tokens.positions.size()), kColumns));
  return rows;
}

TEST(SyntheticKv, QueriesStayAndRangesAreKept) {
  const std::vector<float> rows = rows_of(drawn_of(0.9F), 1, Tokens(0, 256, 3));
  std::vector<double> squares(4, 0.0);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto column = static_cast<std::int64_t>(i % kColumns);
    if (column < kHeads * kHeadDim) {
      EXPECT_EQ(rows[i], -9.0F);
      continue;
    }
    squares[static_cast<std::size_t>(column / kHeadDim - kHeads)] += static_cast<double>(rows[i]) * rows[i];
  }
  for (double& square : squares) square /= 256.0 * kHeadDim;
  // 16 runs of 64 channels carry nine tenths of the keys' variance: 1024 draws, 3 % a standard error.
  EXPECT_NEAR(squares[0] / (0.25 / 3), 1.0, 0.1);
  EXPECT_NEAR(squares[1] / (9.0 / 3), 1.0, 0.1);
  EXPECT_NEAR(squares[2], 1.0, 0.2);  // half of it are 64 draws
  EXPECT_NEAR(squares[3], 1.0, 0.2);
}

TEST(SyntheticKv, ATokenDependsOnItsSequenceAndPositionAlone) {
  const DrawnKv drawn = drawn_of(0.5F);
  const std::vector<float> whole = rows_of(drawn, 0, Tokens(0, 64, 1));
  const std::vector<float> part = rows_of(drawn, 0, Tokens(37, 20, 1));
  EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + 37 * kColumns));
  EXPECT_NE(rows_of(drawn, 0, Tokens(0, 64, 2)), whole);
  EXPECT_NE(rows_of(drawn, 1, Tokens(0, 64, 1)), whole);
}

TEST(SyntheticKv, NeighboursOfARunAreAsAlikeAsAsked) {
  for (const float locality : {0.0F, 0.5F, 0.9F, 1.0F}) {
    const std::vector<float> rows = rows_of(drawn_of(locality), 0, Tokens(0, 2048, 0));
    double same_run = 0.0;
    double next_run = 0.0;
    int pairs = 0;
    for (std::size_t t = 0; t + kDrawnRun < 2048; t += kDrawnRun, ++pairs) {
      for (std::size_t c = kHeads * kHeadDim; c < static_cast<std::size_t>(kHeads + 1) * kHeadDim; ++c) {
        const double key = rows[t * kColumns + c];
        same_run += key * rows[(t + 5) * kColumns + c];
        next_run += key * rows[(t + kDrawnRun) * kColumns + c];
      }
    }
    EXPECT_NEAR(same_run / pairs / kHeadDim * 3, locality, 0.05);
    EXPECT_NEAR(next_run / pairs / kHeadDim * 3, 0.0, 0.05);
  }
}

TEST(SyntheticKv, CudaDrawsTheSameBits) {
  if constexpr (!kHaveCuda) GTEST_SKIP() << "this build has no CUDA half";
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  const Exec exec = stream.exec();
  const Tokens tokens(41, 50, 2);
  const std::vector<float> expected = rows_of(drawn_of(0.7F), 1, tokens);
  const Buffer numbers(Memory::kDevice, 4096, "what a draw reads");
  auto* to = static_cast<std::int32_t*>(numbers.data());
  copy_bytes(exec, to, tokens.positions.data(), 200);
  copy_bytes(exec, to + 64, tokens.zeros.data(), 200);
  copy_bytes(exec, to + 128, &tokens.request, 4);
  copy_bytes(exec, to + 192, kRanges.data(), 16);
  Batch batch = tokens.batch();
  batch.positions = TensorView<const std::int32_t, 1>(to, 50);
  batch.seq_of_token = TensorView<const std::int32_t, 1>(to + 64, 50);
  batch.request = TensorView<const std::int32_t, 1>(to + 128, 1);
  DrawnKv drawn = drawn_of(0.7F);
  drawn.key_range = TensorView<const float, 2>(reinterpret_cast<float*>(to + 192), kLayers, kKvHeads);
  const Buffer rows(Memory::kDevice, 50 * kColumns * 2, "drawn rows");
  zero_bytes(exec, rows.data(), rows.bytes());
  draw_kv(exec, drawn, 1, batch, kHeadDim, rows.ref(DType::kBf16, 50, kColumns));
  std::vector<bf16> found(50 * kColumns);
  copy_bytes(exec, found.data(), rows.data(), rows.bytes());
  stream.synchronize();
  for (std::size_t i = 0; i < found.size(); ++i) {
    const bool query = i % kColumns < static_cast<std::size_t>(kHeads) * kHeadDim;
    ASSERT_EQ(found[i].bits, query ? 0 : to_bf16(expected[i]).bits) << "element " << i;
  }
}

}  // namespace
}  // namespace vesper
