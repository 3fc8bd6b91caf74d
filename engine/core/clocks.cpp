#include "engine/core/clocks.h"

#include <dlfcn.h>

#include <array>
#include <memory>
#include <utility>

#include "engine/core/device.h"

namespace vesper {
namespace {

// NVML's C interface, as its documentation states it (NVML API reference, device queries): handles are opaque pointers,
// a result of 0 is success, clock kinds are 1 for the multiprocessors and 2 for the memory, sensor 0 is the chip's.
using NvmlDevice = void*;
constexpr unsigned kSmClock = 1;
constexpr unsigned kMemoryClock = 2;
constexpr unsigned kChipSensor = 0;

// nvmlClocksEventReasons: the bits that mean slower than asked for. Idle and the clocks that a user has set are none.
constexpr std::array kReasons = {
    std::pair{0x4ULL, "power cap"},         std::pair{0x8ULL, "hardware slowdown"},
    std::pair{0x20ULL, "software thermal"}, std::pair{0x40ULL, "hardware thermal"},
    std::pair{0x80ULL, "power brake"},
};

struct CloseLibrary {
  void operator()(void* library) const noexcept { dlclose(library); }
};

class Nvml {
 public:
  Nvml() : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
    const auto init = function<int()>("nvmlInit_v2");
    running_ = init != nullptr && init() == 0;
  }
  ~Nvml() {
    const auto shutdown = function<int()>("nvmlShutdown");
    if (running_ && shutdown != nullptr) shutdown();
  }
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;
  Nvml(Nvml&&) = delete;
  Nvml& operator=(Nvml&&) = delete;

  [[nodiscard]] bool running() const { return running_; }

  // Whether NVML has the function and answers with success.
  template <typename... Parameters, typename... Arguments>
  bool ask(const char* name, int (* /*signature*/)(Parameters...), Arguments... arguments) const {
    const auto call = function<int(Parameters...)>(name);
    return call != nullptr && call(arguments...) == 0;
  }

 private:
  template <typename Signature>
  [[nodiscard]] Signature* function(const char* name) const {
    return library_ == nullptr ? nullptr : reinterpret_cast<Signature*>(dlsym(library_.get(), name));
  }

  std::unique_ptr<void, CloseLibrary> library_;
  bool running_ = false;
};

using FindDevice = int (*)(const char*, NvmlDevice*);
using ReadNumber = int (*)(NvmlDevice, unsigned*);
using ReadKind = int (*)(NvmlDevice, unsigned, unsigned*);
using ReadMask = int (*)(NvmlDevice, unsigned long long*);

}  // namespace

std::optional<ClockState> read_clocks() {
  if (!cuda::unavailable_reason().empty()) return std::nullopt;
  const Nvml nvml;
  NvmlDevice device = nullptr;
  // CUDA's numbers and NVML's differ; the place on the bus is what both know.
  if (!nvml.running() ||
      !nvml.ask("nvmlDeviceGetHandleByPciBusId_v2", FindDevice{}, cuda::current_bus_id().c_str(), &device)) {
    return std::nullopt;
  }
  ClockState state;
  unsigned milliwatts = 0;
  unsigned long long reasons = 0;
  const bool answered =
      nvml.ask("nvmlDeviceGetClockInfo", ReadKind{}, device, kSmClock, &state.sm_mhz) &&
      nvml.ask("nvmlDeviceGetMaxClockInfo", ReadKind{}, device, kSmClock, &state.max_sm_mhz) &&
      nvml.ask("nvmlDeviceGetClockInfo", ReadKind{}, device, kMemoryClock, &state.memory_mhz) &&
      nvml.ask("nvmlDeviceGetMaxClockInfo", ReadKind{}, device, kMemoryClock, &state.max_memory_mhz) &&
      nvml.ask("nvmlDeviceGetTemperature", ReadKind{}, device, kChipSensor, &state.temperature_c) &&
      nvml.ask("nvmlDeviceGetPowerUsage", ReadNumber{}, device, &milliwatts) &&
      nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons", ReadMask{}, device, &reasons);
  if (!answered) return std::nullopt;
  state.power_w = milliwatts * 1e-3;
  for (const auto& [bit, name] : kReasons) {
    if ((reasons & bit) != 0) state.throttled_by.emplace_back(name);
  }
  return state;
}

std::string describe_clocks(const std::optional<ClockState>& clocks) {
  if (!clocks) return "not available";
  std::string text = std::to_string(clocks->sm_mhz) + " of " + std::to_string(clocks->max_sm_mhz) + " MHz, memory " +
                     std::to_string(clocks->memory_mhz) + " of " + std::to_string(clocks->max_memory_mhz) + " MHz, " +
                     std::to_string(clocks->temperature_c) + " C, " +
                     std::to_string(static_cast<int>(clocks->power_w)) + " W, ";
  if (clocks->throttled_by.empty()) return text + "not throttled";
  text += "throttled by ";
  for (std::size_t i = 0; i < clocks->throttled_by.size(); ++i)
    text += (i == 0 ? "" : " and ") + clocks->throttled_by[i];
  return text;
}

}  // namespace vesper
