#include "engine/core/host_memory.h"

#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>

#include "engine/core/stream.h"
#include "tests/models/files.h"

namespace vesper {
namespace {

// /proc and /sys of a machine with 8 GiB available.
class HostMemory : public testing::Test {
 protected:
  void SetUp() override { put("/proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"); }

  void put(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root_.path() + path;
    std::filesystem::create_directories(file.parent_path());
    write_file(file, text);
  }
  [[nodiscard]] std::int64_t free_bytes() const { return free_host_bytes(root_.path()); }

  TempFolder root_;
};

constexpr std::int64_t kGiB = std::int64_t{1} << 30;

TEST_F(HostMemory, IsTheMachinesWithoutGroups) {
  EXPECT_EQ(free_bytes(), 8 * kGiB);
  put("/proc/self/cgroup", "0::/\n");
  EXPECT_EQ(free_bytes(), 8 * kGiB);
}

TEST_F(HostMemory, IsWhatTheNarrowestGroupLeaves) {
  put("/proc/self/cgroup", "0::/jobs/42\n");
  put("/sys/fs/cgroup/jobs/42/memory.max", "max\n");
  put("/sys/fs/cgroup/jobs/42/memory.current", "1000\n");
  EXPECT_EQ(free_bytes(), 8 * kGiB);
  put("/sys/fs/cgroup/jobs/memory.max", std::to_string(4 * kGiB) + '\n');
  put("/sys/fs/cgroup/jobs/memory.current", std::to_string(3 * kGiB) + '\n');
  EXPECT_EQ(free_bytes(), kGiB);
  put("/sys/fs/cgroup/jobs/memory.stat", "anon 5\ninactive_file 1073741824\nactive_file 536870912\nslab 9\n");
  EXPECT_EQ(free_bytes(), kGiB + kGiB + kGiB / 2);
  put("/sys/fs/cgroup/jobs/memory.current", std::to_string(7 * kGiB) + '\n');
  EXPECT_EQ(free_bytes(), 0);
}

TEST_F(HostMemory, KnowsVersionOneAndAContainersOwnView) {
  put("/proc/self/cgroup", "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n");
  put("/sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(2 * kGiB) + '\n');
  put("/sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(kGiB) + '\n');
  put("/sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 4096\ntotal_active_file 4096\n");
  EXPECT_EQ(free_bytes(), kGiB + 8192);
  put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(free_bytes(), 8 * kGiB);
}

TEST_F(HostMemory, IsUnknownWhereNothingTells) {
  std::filesystem::remove(root_.path() + "/proc/meminfo");
  EXPECT_EQ(free_bytes(), -1);
  EXPECT_GT(device_info(DeviceKind::kCpu).free_bytes, 0);
}

// In a process of its own, which keeps the limit.
TEST(HostMemoryDeathTest, HeedsTheLimitOfAddressSpace) {
  const auto limited = [] {
    const rlimit limit{std::uint64_t{1} << 47U, std::uint64_t{1} << 47U};
    setrlimit(RLIMIT_AS, &limit);
    const TempFolder root;
    std::filesystem::create_directories(root / "proc/self");
    write_file(root / "proc/self/statm",
               std::to_string((std::int64_t{1} << 47) / sysconf(_SC_PAGESIZE) - 3) + " 1 1\n");
    std::fputs((std::to_string(free_host_bytes(root.path()) / sysconf(_SC_PAGESIZE)) + " pages").c_str(), stderr);
    std::_Exit(0);
  };
  EXPECT_EXIT(limited(), testing::ExitedWithCode(0), "^3 pages$");
}

}  // namespace
}  // namespace vesper
