#include "engine/core/host_memory.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string_view>

namespace vesper {
namespace {

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

// The first number of a file; nothing where there is none ("max", or no such file).
std::optional<std::int64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  std::int64_t number = 0;
  if (file >> number) return number;
  return {};
}

// The sum of the values under `keys` in lines "key value"; a unit behind the value is left unread.
std::optional<std::int64_t> sum_of(const std::string& path, std::initializer_list<std::string_view> keys) {
  std::ifstream file(path);
  std::optional<std::int64_t> sum;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string key;
    std::int64_t value = 0;
    if (!(words >> key >> value) || std::find(keys.begin(), keys.end(), key) == keys.end()) continue;
    sum = sum.value_or(0) + value;
  }
  return sum;
}

struct GroupFiles {
  std::string_view limit;
  std::string_view used;
  std::string_view inactive;  // of memory.stat, which counts the group and those below it
  std::string_view active;
};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file", "active_file"};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
                                  "total_active_file"};

// What the group at `mount` + `path` and all above it leave. A container may see its own group as the mount's root
// under a path that it cannot see: folders that are not there limit nothing.
std::int64_t left_in_groups(const std::string& mount, std::string path, const GroupFiles& files) {
  std::int64_t left = kUnlimited;
  for (;;) {
    const std::string folder = mount + path + '/';
    const std::optional<std::int64_t> limit = number_in(folder + std::string(files.limit));
    const std::optional<std::int64_t> used = number_in(folder + std::string(files.used));
    if (limit && used) {
      const std::int64_t cached = sum_of(folder + "memory.stat", {files.inactive, files.active}).value_or(0);
      left = std::min(left, std::max<std::int64_t>(0, *limit - std::max<std::int64_t>(0, *used - cached)));
    }
    if (path.empty()) return left;
    path.erase(std::min(path.rfind('/'), path.size()));
  }
}

// Lines "number:controllers:path"; version 2 has "0::path".
std::int64_t left_by_control_groups(const std::string& root) {
  std::int64_t left = kUnlimited;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = ',' + line.substr(first + 1, second - first - 1) + ',';
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers == ",,") left = std::min(left, left_in_groups(root + "/sys/fs/cgroup", path, kVersion2));
    if (controllers.find(",memory,") != std::string::npos) {
      left = std::min(left, left_in_groups(root + "/sys/fs/cgroup/memory", path, kVersion1));
    }
  }
  return left;
}

std::int64_t left_by_address_space(const std::string& root) {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnlimited;
  const std::int64_t mapped = number_in(root + "/proc/self/statm").value_or(0) * sysconf(_SC_PAGESIZE);
  return std::max<std::int64_t>(0, static_cast<std::int64_t>(limit.rlim_cur) - mapped);
}

}  // namespace

std::int64_t free_host_bytes(const std::string& root) {
  const std::optional<std::int64_t> available_kib = sum_of(root + "/proc/meminfo", {"MemAvailable:"});
  const std::int64_t available = available_kib ? *available_kib * 1024 : kUnlimited;
  const std::int64_t left = std::min({available, left_by_control_groups(root), left_by_address_space(root)});
  return left == kUnlimited ? -1 : left;
}

}  // namespace vesper
