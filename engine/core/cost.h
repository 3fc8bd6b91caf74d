// What an operation cannot do without: the ruler that its measured time is divided by.
#pragma once

#include <cstdint>

namespace vesper {

// Each input read once, each output written once; a multiply-add is two flops.
struct Cost {
  std::int64_t bytes = 0;
  std::int64_t flops = 0;
};

}  // namespace vesper
