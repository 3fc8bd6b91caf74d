// vesper attend: dense attention over a file's tensors against the formula in double precision.
#include <array>
#include <numeric>

#include "models/safetensors.h"
#include "tests/apps/run_vesper.h"
#include "tests/attend_reference.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

void write_input(const std::string& path, const AttendTensors& tensors) {
  const auto [heads, kv_heads, head_dim, tokens, dtype] = tensors.shape;
  const std::vector<std::byte> q = tensors.bytes(tensors.q);
  const std::vector<std::byte> k = tensors.bytes(tensors.k);
  const std::vector<std::byte> v = tensors.bytes(tensors.v);
  const std::array<NamedTensor, 3> all = {{{"q", dtype, {heads, head_dim}, q.data()},
                                           {"k", dtype, {tokens, kv_heads, head_dim}, k.data()},
                                           {"v", dtype, {tokens, kv_heads, head_dim}, v.data()}}};
  write_safetensors(path, all);
}

std::vector<std::string> attend(const std::string& input, const std::string& output,
                                const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments = {"attend",      "--device", "cpu",      "--input", input,
                                        "--attention", "dense",    "--output", output};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

// The values of a tensor that must have this type and shape.
template <typename T>
std::vector<T> read(const SafetensorsFile& file, const std::string& name, const std::vector<std::int64_t>& shape) {
  const StoredTensor* tensor = file.find(name);
  if (tensor == nullptr || tensor->shape != shape || tensor->dtype != DTypeOf<T>::value) {
    ADD_FAILURE() << "no tensor " << name << " of the expected type and shape";
    return {};
  }
  const auto* values = reinterpret_cast<const T*>(tensor->data);
  return {values, values + tensor->bytes / static_cast<std::int64_t>(sizeof(T))};
}

class Attend : public testing::Test {
 protected:
  void check(const AttendCase& shape, const std::string& page_tokens) {
    const AttendTensors tensors(shape);
    write_input(input_, tensors);
    EXPECT_EQ(run_well(attend(input_, output_, {"--page-tokens", page_tokens})).out, "");
    const SafetensorsFile file(output_);
    EXPECT_EQ(file.tensors().size(), 5U);
    const std::int64_t heads = shape.heads;
    const std::int64_t kv_heads = shape.kv_heads;
    const std::string what = shape.text() + ", pages of " + page_tokens;
    const AttendTruth truth = attend_truth(tensors, DType::kF32);
    expect_within(read<float>(file, "out", {heads, shape.head_dim}), truth.out, truth.out_bound, what + ", out");
    expect_within(read<float>(file, "lse", {heads}), truth.lse, truth.lse_bound, what + ", lse");
    const std::vector<std::int32_t> counts(static_cast<std::size_t>(kv_heads), shape.tokens);
    EXPECT_EQ(read<std::int32_t>(file, "count", {kv_heads}), counts) << what;
    EXPECT_EQ(read<std::int32_t>(file, "tail_begin", {kv_heads}), counts) << what;
    const auto index = read<std::int32_t>(file, "index", {kv_heads, shape.tokens});
    for (std::size_t i = 0; i < index.size(); ++i) {
      ASSERT_EQ(index[i], static_cast<std::int32_t>(i) % shape.tokens) << what << ", at " << i;
    }
  }

  TempFolder folder_;
  std::string input_ = folder_ / "in.safetensors";
  std::string output_ = folder_ / "out.safetensors";
};

TEST_F(Attend, IsTheFormula) {
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    check({8, 2, 64, 100, dtype}, "16");
    check({7, 1, 128, 333, dtype}, "32");
    check({4, 4, 16, 65, dtype}, "64");
    check({6, 3, 6, 1, dtype}, "16");
  }
}

TEST_F(Attend, StacksRunsOnAFirstAxis) {
  const AttendTensors tensors({4, 2, 64, 20, DType::kF32});
  write_input(input_, tensors);
  (void)run_well(attend(input_, output_));
  const SafetensorsFile once(output_);
  const std::string stacked = folder_ / "stacked.safetensors";
  (void)run_well(attend(input_, stacked, {"--repeat", "3", "--seed", "5"}));
  const SafetensorsFile thrice(stacked);
  const auto out = read<float>(once, "out", {4, 64});
  std::vector<float> expected;
  for (int i = 0; i < 3; ++i) expected.insert(expected.end(), out.begin(), out.end());
  EXPECT_EQ(read<float>(thrice, "out", {3, 4, 64}), expected);
  (void)read<float>(thrice, "lse", {3, 4});
  (void)read<std::int32_t>(thrice, "count", {3, 2});
  (void)read<std::int32_t>(thrice, "tail_begin", {3, 2});
  (void)read<std::int32_t>(thrice, "index", {3, 2, 20});

  (void)run_well(attend(input_, stacked, {"--repeat", "1"}));
  (void)read<float>(SafetensorsFile(stacked), "out", {1, 4, 64});
}

TEST_F(Attend, RefusesTensorsThatDoNotGoTogetherAndWritesNothing) {
  const std::vector<float> zeros(4096, 0.0F);
  const auto refusal_of = [&](const std::vector<NamedTensor>& tensors) {
    write_safetensors(input_, tensors);
    const std::string message = refused(attend(input_, output_));
    expect_names(message, {input_});
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_.path()), {}), 1) << message;
    return message;
  };
  const auto tensor = [&](const std::string& name, const std::vector<std::int64_t>& shape, DType dtype = DType::kF32) {
    return NamedTensor{name, dtype, shape, zeros.data()};
  };
  expect_names(refusal_of({tensor("q", {2, 15}), tensor("k", {3, 1, 15}), tensor("v", {3, 1, 15})}),
               {"head_dim 15", "even head_dim"});
  expect_names(refusal_of({tensor("q", {2, 16}), tensor("k", {3, 1, 8}), tensor("v", {3, 1, 8})}),
               {"head_dim 16 in q and 8 in k"});
  expect_names(refusal_of({tensor("q", {2, 16}), tensor("k", {3, 1, 16}), tensor("v", {2, 1, 16})}),
               {"k [3, 1, 16], v [2, 1, 16]"});
  expect_names(refusal_of({tensor("q", {3, 16}), tensor("k", {3, 2, 16}), tensor("v", {3, 2, 16})}),
               {"3 heads and 2 KV heads"});
  expect_names(refusal_of({tensor("q", {2, 16}), tensor("k", {0, 1, 16}), tensor("v", {0, 1, 16})}), {"none empty"});
  expect_names(refusal_of({tensor("q", {2, 16}), tensor("k", {3, 1, 16}, DType::kBf16), tensor("v", {3, 1, 16})}),
               {"f32, bf16, f32"});
  expect_names(refusal_of({tensor("q", {2, 16}), tensor("v", {3, 1, 16})}), {"\"k\"", "q, k and v"});
  expect_names(refusal_of({tensor("q", {1, 1, 1, 2, 16}), tensor("k", {3, 1, 16}), tensor("v", {3, 1, 16})}),
               {"\"q\"", "rank 5"});
}

}  // namespace
}  // namespace vesper
