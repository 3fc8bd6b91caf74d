#include "models/safetensors.h"

#include <array>
#include <cstring>
#include <nlohmann/json.hpp>

#include "tests/models/files.h"

namespace vesper {
namespace {

class Safetensors : public testing::Test {
 protected:
  // What the reader says of a file with this header and so many bytes of tensors.
  std::string refusal_of(const std::string& header, std::size_t data_bytes) {
    return refusal_of_bytes(safetensors_bytes(header, data_bytes));
  }
  std::string refusal_of_bytes(const std::string& bytes) {
    write_file(path_, bytes);
    std::string message = refusal([&] { SafetensorsFile file(path_); });
    expect_names(message, {path_});
    return message;
  }
  static std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"x":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  }

  TempFolder folder_;
  std::string path_ = folder_ / "x.safetensors";
};

TEST_F(Safetensors, ReadsWhatTheWriterWrote) {
  const std::array<float, 6> floats = {1.0F, -2.0F, 3.5F, 0.0F, 1e-30F, 7.0F};
  const std::array<std::uint16_t, 3> halves = {0x3F80, 0x4000, 0xC000};
  const std::array<std::int32_t, 2> ids = {-1, 5};
  const std::array<std::uint8_t, 3> bytes = {1, 2, 255};
  const float scalar = 42.0F;
  const std::array<NamedTensor, 6> tensors = {{
      {"bytes", DType::kU8, {3}, bytes.data()},
      {"floats", DType::kF32, {2, 3}, floats.data()},
      {"halves", DType::kBf16, {1, 1, 3, 1, 1}, halves.data()},
      {"ids", DType::kI32, {2}, ids.data()},
      {"nothing", DType::kF16, {4, 0}, nullptr},
      {"scalar", DType::kF32, {}, &scalar},
  }};
  write_safetensors(path_, tensors);

  const SafetensorsFile file(path_);
  EXPECT_EQ(file.tensors().size(), tensors.size());
  for (const NamedTensor& written : tensors) {
    const StoredTensor* read = file.find(written.name);
    ASSERT_NE(read, nullptr) << written.name;
    EXPECT_EQ(read->dtype, written.dtype) << written.name;
    EXPECT_EQ(read->shape, written.shape) << written.name;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(read->data) % static_cast<std::uintptr_t>(dtype_bytes(read->dtype)), 0U);
    if (read->bytes > 0) {
      EXPECT_EQ(std::memcmp(read->data, written.data, static_cast<std::size_t>(read->bytes)), 0) << written.name;
    }
  }
  EXPECT_EQ(file.find("floats")->bytes, 24);
  EXPECT_EQ(file.find("nothing")->bytes, 0);
  EXPECT_EQ(file.find("scalar")->bytes, 4);
  EXPECT_EQ(file.find("absent"), nullptr);
}

TEST_F(Safetensors, ReadsTheFormatsOwnOddities) {
  write_file(path_, safetensors_bytes(R"({"__metadata__":{"format":"pt"}})", 0));
  EXPECT_TRUE(SafetensorsFile(path_).tensors().empty());
  // Order in the header is free, spaces may follow it, and tensors of no bytes may share an offset.
  write_file(path_, safetensors_bytes(R"({"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},)"
                                      R"("none":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},)"
                                      R"("a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}   )",
                                      3));
  const SafetensorsFile file(path_);
  EXPECT_EQ(file.find("b")->data, file.find("a")->data + 1);
  // A moved file keeps its tensors.
  std::vector<SafetensorsFile> files;
  files.emplace_back(path_);
  const StoredTensor* before = files[0].find("b");
  files.emplace_back(path_);
  EXPECT_EQ(files[0].find("b"), before);
  EXPECT_EQ(*before->data, std::byte{0});
}

TEST_F(Safetensors, RefusesAFileThatIsTooShortOrTooLong) {
  const std::string good = safetensors_bytes(entry(R"("F32")", "[2]", "[0,8]"), 8);
  expect_names(refusal_of_bytes(""), {"0 bytes", "8 bytes of header length"});
  expect_names(refusal_of_bytes(good.substr(0, 7)), {"7 bytes"});
  expect_names(refusal_of_bytes(good.substr(0, 20)), {"20 bytes", "truncated"});
  expect_names(refusal_of_bytes(good.substr(0, good.size() - 1)), {"7 bytes of tensors", "truncated"});
  expect_names(refusal_of_bytes(good + "x"), {"9 bytes of tensors", "padded"});
}

TEST_F(Safetensors, RefusesAWrongHeaderLength) {
  std::string bytes = safetensors_bytes("{}", 0);
  const std::uint64_t huge = 100'000'001;
  std::memcpy(bytes.data(), &huge, 8);
  expect_names(refusal_of_bytes(bytes), {"100000001", "at most 100000000"});
  std::memset(bytes.data(), 0xFF, 8);
  expect_names(refusal_of_bytes(bytes), {"18446744073709551615"});
  std::memset(bytes.data(), 0, 8);
  expect_names(refusal_of_bytes(bytes), {"header"});
}

TEST_F(Safetensors, RefusesAHeaderThatIsNoSoundJson) {
  expect_names(refusal_of("{\"x\":", 0), {"the header of"});
  expect_names(refusal_of("[]", 0), {"array", "an object"});
  expect_names(refusal_of("7", 0), {"number", "an object"});
  expect_names(refusal_of("{\"\xff\":{}}", 0), {"the header of", "UTF-8"});
  expect_names(refusal_of("{}{}", 0), {"the header of"});
  expect_names(refusal_of(std::string(10000, '[') + std::string(10000, ']'), 0), {"nested deeper than 64"});
  expect_names(refusal_of(R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                          R"("x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                          1),
               {"\"x\" twice"});
  expect_names(refusal_of(R"({"x":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}})", 1),
               {"\"dtype\" twice"});
  expect_names(refusal_of(R"({"__metadata__":{"a":1}})", 0), {"__metadata__", "strings"});
  expect_names(refusal_of(R"({"__metadata__":"a"})", 0), {"__metadata__", "strings"});
}

TEST_F(Safetensors, RefusesAWrongEntry) {
  expect_names(refusal_of(R"({"x":[]})", 0), {"\"x\"", "dtype, shape and data_offsets"});
  expect_names(refusal_of(R"({"x":{"dtype":"U8","shape":[1]}})", 1), {"\"x\"", "dtype, shape and data_offsets"});
  expect_names(refusal_of(R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"y":1}})", 1),
               {"\"x\"", "dtype, shape and data_offsets"});
  expect_names(refusal_of(entry(R"("F64")", "[1]", "[0,8]"), 8),
               {"\"x\"", "dtype \"F64\"", "F32, BF16, F16, I32 or U8"});
  expect_names(refusal_of(entry(R"("f32")", "[1]", "[0,4]"), 4), {"\"x\"", "dtype \"f32\""});
  expect_names(refusal_of(entry("5", "[1]", "[0,4]"), 4), {"\"x\"", "dtype 5"});
  expect_names(refusal_of("{\"a\\u001b[2J\":[]}", 0), {R"("a\u001b[2J")"});
}

TEST_F(Safetensors, RefusesNumbersThatAreNoExactCounts) {
  for (const char* shape : {"[1.0]", "[1e0]", "[-1]", "[-0]", "[\"1\"]", "[null]", "[[1]]", "[9223372036854775808]",
                            "[18446744073709551616]", "1", "{}"}) {
    expect_names(refusal_of(entry(R"("U8")", shape, "[0,1]"), 1), {"\"x\"", "shape", "non-negative"});
  }
  for (const char* offsets : {"[0,1.0]", "[-1,0]", "[0,18446744073709551615]", "[0,\"1\"]", "null"}) {
    expect_names(refusal_of(entry(R"("U8")", "[1]", offsets), 1), {"\"x\"", "data_offsets", "non-negative"});
  }
  expect_names(refusal_of(entry(R"("U8")", "[1]", "[0]"), 1), {"\"x\"", "data_offsets [0]", "[begin, end]"});
  expect_names(refusal_of(entry(R"("U8")", "[1]", "[0,1,1]"), 1), {"\"x\"", "data_offsets [0,1,1]"});
  expect_names(refusal_of(entry(R"("U8")", "[1]", "[1,0]"), 1), {"\"x\"", "data_offsets [1,0]", "begin <= end"});
  expect_names(refusal_of(entry(R"("U8")", "[1,1,1,1,1,1,1,1,1]", "[0,1]"), 1), {"\"x\"", "9 dimensions", "at most 8"});
}

TEST_F(Safetensors, RefusesSizesThatDoNotAgree) {
  expect_names(refusal_of(entry(R"("F32")", "[2,3]", "[0,20]"), 20), {"\"x\"", "20 bytes", "24 bytes", "f32", "[2,3]"});
  expect_names(refusal_of(entry(R"("F32")", "[4611686018427387904]", "[0,0]"), 0), {"\"x\"", "63 bits"});
  expect_names(refusal_of(entry(R"("U8")", "[4294967296,4294967296,4294967296]", "[0,0]"), 0), {"\"x\"", "63 bits"});
  expect_names(refusal_of(entry(R"("U8")", "[9223372036854775807]", "[0,9223372036854775807]"), 4), {"truncated"});
}

TEST_F(Safetensors, RefusesHolesAndOverlaps) {
  const auto two = [](const std::string& first, const std::string& second) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + first +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}";
  };
  expect_names(refusal_of(two("[0,4]", "[3,7]"), 7), {"\"b\"", "begins at 3", "overlapping \"a\"", "expected 4"});
  expect_names(refusal_of(two("[0,4]", "[0,4]"), 4), {"\"b\"", "begins at 0", "overlapping \"a\""});
  expect_names(refusal_of(two("[0,4]", "[5,9]"), 9), {"\"b\"", "begins at 5", "hole after \"a\"", "expected 4"});
  expect_names(refusal_of(two("[1,5]", "[5,9]"), 9), {"\"a\"", "begins at 1", "hole after the header"});
}

TEST_F(Safetensors, NamesAFileThatIsNotThere) {
  expect_names(refusal([&] { SafetensorsFile file(folder_ / "absent.safetensors"); }), {"absent.safetensors"});
  expect_names(refusal([&] { SafetensorsFile file(folder_.path()); }), {folder_.path(), "no regular file"});
}

TEST_F(Safetensors, WritesWholeOrNotAtAll) {
  const float value = 1.0F;
  const std::array<NamedTensor, 1> tensors = {{{"x", DType::kF32, {1}, &value}}};
  const auto write_to = [&](const std::string& path) { return refusal([&] { write_safetensors(path, tensors); }); };
  expect_names(write_to(folder_ / "absent/y.safetensors"), {"absent/y.safetensors", "No such file"});
  expect_names(write_to(folder_.path()), {folder_.path(), "no regular file"});
  expect_names(write_to("/dev/null"), {"/dev/null", "no regular file"});
  write_file(folder_ / "file", "");
  expect_names(write_to(folder_ / "file/y.safetensors"), {"file/y.safetensors"});

  write_file(path_, "what was there");
  write_safetensors(path_, tensors);
  EXPECT_EQ(*reinterpret_cast<const float*>(SafetensorsFile(path_).find("x")->data), 1.0F);
  std::size_t entries = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder_.path())) ++entries;
  EXPECT_EQ(entries, 2U) << "a temporary file was left behind";
}

}  // namespace
}  // namespace vesper
