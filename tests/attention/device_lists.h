// Lists of selected tokens on the device, for tests that compare them with the host's.
#pragma once

#include "attention/sample_tail.h"
#include "tests/attention/list_buffers.h"
#include "tests/gpu.h"
#include "tests/paged_device.h"

namespace vesper {

// Lists on the device that start as their host twins are.
struct DeviceLists {
  Buffer index, count, tail_begin, tail_log_weight, guard_hits;
  Selection list;
  SampleReport report;

  DeviceLists(const Stream& stream, const ListBuffers& host)
      : index(upload(stream, host.index)),
        count(upload(stream, host.count)),
        tail_begin(upload(stream, host.tail_begin)),
        tail_log_weight(upload(stream, host.tail_log_weight)),
        guard_hits(upload(stream, host.guard_hits)) {
    const auto extent = [&](int d) { return host.list.index.shape(d); };
    list = {.unit = SelectionUnit::kTokens,
            .index = index.view<std::int32_t>(extent(0), extent(1), extent(2)),
            .count = count.view<std::int32_t>(extent(0), extent(1)),
            .tail_begin = tail_begin.view<std::int32_t>(extent(0), extent(1)),
            .tail_log_weight = tail_log_weight.view<float>(extent(0), extent(1))};
    report = {.guard_hits = guard_hits.view<std::int32_t>(extent(0), extent(1))};
  }
  void read(const Stream& stream, ListBuffers& host) const {
    host.index = download<std::int32_t>(stream, index, host.index.size());
    host.count = download<std::int32_t>(stream, count, host.count.size());
    host.tail_begin = download<std::int32_t>(stream, tail_begin, host.tail_begin.size());
    host.tail_log_weight = download<float>(stream, tail_log_weight, host.tail_log_weight.size());
    host.guard_hits = download<std::int32_t>(stream, guard_hits, host.guard_hits.size());
    host.look();
  }
};

}  // namespace vesper
