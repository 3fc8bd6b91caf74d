// Values made on CUDA are those made on the CPU, bit for bit.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "models/fill.h"
#include "tests/device_tensor.h"
#include "tests/gpu.h"

namespace vesper {
namespace {

void expect_equal_bits(DeviceTensor& found, const std::vector<char>& expected, const std::string& what) {
  const std::span<const char> bytes = found.read_bytes(what);
  ASSERT_EQ(bytes.size(), expected.size());
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    ASSERT_EQ(bytes[i], expected[i]) << what << ": byte " << i << " of " << bytes.size();
  }
}

TEST(FillCuda, EqualsTheCpu) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::uint32_t tensor = 0;
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    for (const std::int64_t count : {1, 2, 3, 4, 5, 1023, 1024, 1025, 1000003}) {
      for (const std::int64_t offset : {0, 1, 2}) {
        const std::string what = std::string(dtype_name(dtype)) + ", " + std::to_string(count) + " elements, offset " +
                                 std::to_string(offset);
        const std::uint64_t seed = 0xFEDCBA9876543210ULL + tensor;
        std::vector<char> expected(static_cast<std::size_t>(count * dtype_bytes(dtype)));
        const TensorRef host = tensor_ref(expected.data(), dtype, count);
        DeviceTensor device(stream.exec(), offset, dtype, count);
        cpu::fill_uniform(host, seed, tensor, 0.0173F);
        fill_uniform(stream.exec(), device.ref(), seed, tensor, 0.0173F);
        expect_equal_bits(device, expected, "uniform, " + what);
        cpu::fill_constant(host, -1.003F);
        fill_constant(stream.exec(), device.ref(), -1.003F);
        expect_equal_bits(device, expected, "constant, " + what);
        ++tensor;
      }
    }
  }
}

// Small ranges reach the subnormal halves.
TEST(FillCuda, EqualsTheCpuWhereHalvesAreSubnormal) {
  VESPER_NEEDS_GPU();
  const Stream stream(DeviceKind::kCuda);
  std::vector<char> expected(2 * 4096);
  DeviceTensor device(stream.exec(), 0, DType::kF16, 4096);
  cpu::fill_uniform(tensor_ref(expected.data(), DType::kF16, 4096), 5, 6, 1e-5F);
  fill_uniform(stream.exec(), device.ref(), 5, 6, 1e-5F);
  expect_equal_bits(device, expected, "range 1e-5");
}

}  // namespace
}  // namespace vesper
