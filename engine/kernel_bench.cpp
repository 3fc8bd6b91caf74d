#include "engine/kernel_bench.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/engine.h"
#include "engine/kernel_cases.h"
#include "engine/kernel_timer.h"

namespace vesper {

bool is_cold(const KernelRow& row, std::int64_t cache_bytes) {
  return row.turns * row.cost.bytes > 2 * cache_bytes;
}

KernelReport run_kernel_bench(const KernelSetting& setting,
                              const std::function<void(std::int64_t done, std::int64_t total)>& progress) {
  const ModelConfig config = model_config_of(setting.model);
  const AttentionShape shape = attention_shape(config, setting.page_tokens);
  const DType dtype = activation_dtype(setting.device, config.dtype);
  if constexpr (kHaveCuda) {
    if (setting.device == DeviceKind::kCuda) cuda::check_attention_shape(shape);
  }
  KernelReport report;
  report.roof = probe_roof(setting.device);
  report.cache_bytes = last_cache_bytes(setting.device);
  report.clocks_before = read_clocks();
  const Stream stream(setting.device);
  const std::int64_t room = KernelWorld::room(setting.device);
  const bool products = setting.wants("products");
  const std::vector<int> contexts =
      setting.families == std::vector<std::string>{"products"} ? std::vector<int>{} : setting.contexts;
  const auto total = static_cast<std::int64_t>(setting.batches.size() * (contexts.size() + (products ? 1 : 0)));
  std::int64_t done = 0;
  const auto add = [&](std::vector<KernelRow> rows) {
    std::move(rows.begin(), rows.end(), std::back_inserter(report.rows));
    if (progress) progress(++done, total);
  };
  for (const int batch : setting.batches) {
    if (products) add(time_dense_kernels(stream.exec(), config, dtype, batch, room, setting.seed));
    for (const int context : contexts) {
      const int turns = KernelWorld::turns_in(room, setting.device, shape, dtype, context, batch);
      if (turns == 0) {
        report.skipped.push_back(fmt::format("attention at context {}, batch {}: two layers do not fit in {}", context,
                                             batch, format_bytes(room)));
        add({});
        continue;
      }
      KernelWorld world(stream.exec(), shape, dtype, context, batch, turns, setting);
      add(time_attention_kernels(stream.exec(), setting, world));
    }
  }
  report.clocks_after = read_clocks();
  report.roof = higher(report.roof, probe_roof(setting.device));
  return report;
}

}  // namespace vesper
